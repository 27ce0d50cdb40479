"""Plan the training step for a slice that need not exist: which remat policies fit, and what a step costs.

model, slice → mesh (given, or the best of `rank`) → `lower` with each policy → the compiler, ahead of time → memory and
cost → `plan.result.Plan` with the step `train`: of the policies that fit the fastest. It is the step that `build` makes
for a run: layers stacked and scanned, AdamW with float32 moments, one micro-batch, the state donated. A scanned layer
is compiled once, so depth costs no compile time, and `plan.cost` counts its rounds.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import moe_parallel
from qwen3_jax.plan.chips import Chip, Topology
from qwen3_jax.plan.compile import compiled, devices_of, mesh_of, subject, text_file
from qwen3_jax.plan.meshes import Shape, meshes
from qwen3_jax.plan.programs import bytes_per_device
from qwen3_jax.plan.result import Memory, Plan, PlanError, Refused, Step, gb, mesh_name, none_fits
from qwen3_jax.sharding import make_mesh
from qwen3_jax.train import build, objectives, optim, stacked
from qwen3_jax.train.step import RefusalConfig, TrainStep

POLICIES = tuple(stacked.REMAT)
MOMENTS_BYTES = 8
"""Of a parameter: Adam's two float32 moments."""


class Candidate(NamedTuple):
    """A mesh that divides and whose state fits, and the seconds that a step is expected to take."""

    mesh: dict[str, int]
    seconds: float


def plan(
    model: str,
    slice_name: str,
    *,
    batch: int,
    context: int,
    mesh: str = "auto",
    remat: str = "all",
    dtype: str = "bfloat16",
    hlo_dir: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile a model's training step for a slice and say what it needs.

    Args:
        model: a released name ("Qwen3-8B") or a Hugging Face folder.
        slice_name: "v5p:2x2x4"; see `chips.topology_names`.
        batch: rows of a step over all devices, in one micro-batch.
        context: positions of a row.
        mesh: "fsdp=8,expert=2", or "auto" for the best of `rank`.
        remat: a name in `stacked.REMAT`, or "all" to compare them.
        dtype: of activations, parameters and gradients; moments are float32.
        hlo_dir: keeps each compiled program there as text.
        progress: called with a line before each compile.

    Raises:
        PlanError: an unknown model, slice, dtype or policy; no mesh that divides; or the compiler is missing.
    """
    name, config, found = subject(model, slice_name, batch=batch, context=context, dtype=dtype)
    if remat not in (*POLICIES, "all"):
        raise PlanError(f"remat {remat!r} is unknown: use {', '.join(POLICIES)} or all")
    refused: list[Refused] = []
    if mesh == "auto":
        ranked, refused = rank(config, found, batch=batch, context=context, dtype=dtype)
        if not ranked:
            raise none_fits(f"no mesh of {found} trains {name} at batch {batch} and context {context}", refused)
        sizes, best = ranked[0]
        losers = [Refused(c.mesh, f"estimated {c.seconds * 1e3:.0f} ms (chosen {best * 1e3:.0f})") for c in ranked[1:]]
        refused = losers + refused
    else:
        sizes = mesh_of(mesh, found)
        if wrong := problems(config, sizes, batch):
            raise PlanError(wrong[0])
    tried: dict[str, Step | str] = {}
    for policy in POLICIES if remat == "all" else (remat,):
        progress(f"compiling train, remat {policy}, of {name} for {found}, {mesh_name(sizes)}")
        file = text_file(hlo_dir, name, found, sizes, f"train_{policy}")
        try:
            tried[policy] = compile_step(config, found, sizes, policy, batch, context, dtype, hlo_file=file)
        except PlanError as error:
            tried[policy] = str(error)
    steps = [step for step in tried.values() if isinstance(step, Step)]
    fitting = [step for step in steps if step.memory.total <= found.chip.hbm_bytes]
    chosen = min(fitting, key=lambda s: s.cost.schedule_s, default=None)
    chosen = chosen or min(steps, key=lambda s: s.memory.total, default=None)
    error = None if chosen else f"train: {next(why for why in tried.values() if isinstance(why, str))}"
    shown = {} if chosen is None else {"train": chosen}
    return Plan(name, found, sizes, batch, context, dtype, shown, refused, error, tried)


def compile_step(
    config: Qwen3Config,
    found: Topology,
    sizes: dict[str, int],
    policy: str,
    batch: int,
    context: int,
    dtype: str,
    *,
    devices: Sequence[Any] | None = None,
    hlo_file: Path | None = None,
) -> Step:
    """Compile the step with one remat policy on one mesh and price it.

    Args:
        config: the model.
        found: the slice, whose chip prices the program.
        sizes: of the mesh axes.
        policy: a name in `stacked.REMAT`.
        batch, context, dtype: as in `plan`.
        devices: to compile for instead of the slice's, to look at the step on a CPU.
        hlo_file: keeps the compiled program there as text.

    Raises:
        PlanError: the compiler refuses, most often because the program does not fit; its first line.
    """
    mesh = make_mesh(**sizes, devices=devices_of(found) if devices is None else devices)
    step = step_on(config, mesh, policy, dtype)
    cost, analysis, seconds = compiled(lambda: step.lower(1, batch, context), found, mesh, hlo_file=hlo_file)
    state = step.abstract_state()
    weights, optimizer = bytes_of(state["params"]), bytes_of(state["opt"])
    flops = model_flops(config, batch, context) / found.devices
    moved_s = 2 * (weights + optimizer) / found.chip.hbm_bytes_s  # the state is read and written once
    return Step(
        tokens=batch * context,
        memory=Memory.of(analysis, state=weights + optimizer, weights=weights, optimizer=optimizer),
        cost=cost,
        aliased_bytes=analysis.alias_size_in_bytes,
        compile_s=seconds,
        floor_s=max(flops / found.chip.bf16_flops, moved_s),
        gradients=weights,  # with one micro-batch they have the parameters' dtype
        model_flops=flops,
    )


def step_on(config: Qwen3Config, mesh: Mesh, policy: str, dtype: str) -> TrainStep:
    """Make the step of a run with the default objective and optimiser; nothing is compiled or allocated.

    Schedules, coefficients and clipping change no shape; a router's losses are on, as in every run with one.
    """
    kind = jnp.dtype(dtype)
    ops = build.mesh_ops(mesh.devices.flat[0].platform, mesh)
    network = stacked.Network(config, dtype=kind, param_dtype=kind, ops=ops, remat=policy)
    losses: dict[str, Any] = {"balance_loss": 1e-3, "router_z_loss": 1e-3} if config.num_experts else {}
    rate = optim.schedule(optim.ScheduleConfig(peak=1e-4, warmup=10), 1000)
    return TrainStep(
        objectives.make(network, objectives.ObjectiveConfig(**losses)),
        optim.Optimizer(optim.OptimizerConfig(), rate),
        RefusalConfig(),
        abstract=network.abstract(),
        shardings=network.shardings(mesh, build.RULE),
        mesh=mesh,
        rules=build.RULE,
    )


def bytes_of(tree: Any) -> int:
    """Count the bytes that one device holds of a tree of abstract arrays with shardings."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def model_flops(config: Qwen3Config, batch: int, context: int) -> float:
    """Count three times the forward pass of a step, its attention causal within whole rows, over all chips."""
    attention = config.flops_per_token(1) - config.flops_per_token(0)
    return 3.0 * batch * context * (config.flops_per_token(0) + attention * (context + 1) / 2)


# Which mesh


def problems(config: Qwen3Config, sizes: dict[str, int], batch: int) -> list[str]:
    """Return one line for each thing that does not divide over a mesh in training."""
    found = build.undivided(config, Shape(sizes))  # type: ignore[arg-type]
    ways = math.prod(sizes[axis] for axis in build.RULE["batch"])
    if batch % ways:
        found.append(f"batch {batch} does not divide over {' × '.join(build.RULE['batch'])} {ways}")
    return found


def rank(
    config: Qwen3Config, found: Topology, *, batch: int, context: int, dtype: str
) -> tuple[list[Candidate], list[Refused]]:
    """Sort the meshes whose state and gradients fit by their expected times; say why the others are out.

    Parameters are split over `fsdp` wherever serving would copy them over `data`.
    """
    good, refused = [], []
    for serving in meshes(config, found.devices):
        sizes = serving | {"data": 1, "fsdp": serving["data"]}
        if why := problems(config, sizes, batch):
            refused.append(Refused(sizes, why[0]))
            continue
        ops = build.training_ops(found.chip.kind)
        weights, _ = bytes_per_device(config, sizes, ops=ops, dtype=dtype, batch=1, context=1, rules="train")
        item = jnp.dtype(dtype).itemsize
        state, gradients = weights + weights // item * MOMENTS_BYTES, weights
        if (over := state + gradients - found.chip.hbm_bytes) > 0:
            reason = f"weights and moments {gb(state)} and gradients {gb(gradients)} are {gb(over)} more than a chip's "
            refused.append(Refused(sizes, reason + gb(found.chip.hbm_bytes), over))
            continue
        good.append(Candidate(sizes, estimate_s(config, found.chip, sizes, batch, context, item)))
    return sorted(good, key=lambda c: c.seconds), refused


def estimate_s(
    config: Qwen3Config, chip: Chip, sizes: dict[str, int], batch: int, context: int, itemsize: int
) -> float:
    """Estimate a step by arithmetic: its products or the parameters' way over `fsdp`, and the activations' way.

    Every layer's parameters are gathered for the forward and for the backward pass and their gradients scattered, which
    can run beside the products; copies over `expert` sum their gradients. What stands in the way of the products: sums
    of activations over `model`, two a layer in each direction, and the rows that experts exchange, there and back.
    """
    D, L, F, E, M = config.hidden_size, config.num_hidden_layers, sizes["fsdp"], sizes["expert"], sizes["model"]
    devices = math.prod(sizes.values())
    moe_layers = sum(map(config.is_moe_layer, range(L)))
    experts = 3 * config.num_experts * D * config.moe_intermediate_size * moe_layers
    dense = config.num_parameters() - experts
    ring = 2 * chip.link_bytes_s or 1e10  # GPUs without links talk through the host
    compute_s = model_flops(config, batch, context) / devices / chip.bf16_flops
    gathered = (dense / M + experts / (E * M)) * itemsize * (F - 1) / F
    state_sent = 3 * gathered + 2 * (E - 1) / E * dense / (F * M) * itemsize
    rows = itemsize * D * batch * context / (devices // M)  # one device's activations of one layer
    around = 2 * rows * (M - 1) / M  # a sum over `model`
    exchanged = 0.0
    if moe_layers and E > 1:
        place = moe_parallel.island(sizes, {**build.RULE, "length": build.RULE["stream"]})
        hops = min(moe_parallel.transfers(place, config.num_experts_per_tok, chip.kind), E - 1)
        exchanged = 2 * rows * hops
    sent = 2 * (L * around + (L - moe_layers) * around + moe_layers * (exchanged + around))
    return max(compute_s, state_sent / ring) + sent / ring

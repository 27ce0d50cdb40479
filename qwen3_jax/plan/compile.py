"""Compile for a pod you do not own: does it fit, what does a step cost, which mesh is best.

model, topology → mesh (given, or the best of all that divide, see `meshes`) → `programs` → the real compiler, ahead of
time → `memory_analysis` and `cost.walk` → `result.Plan`, for `show` to lay out.

No accelerator is needed: libtpu compiles for TPU slices that are described and not present. What it prints is the
compiler's own program; the times are derived from that program and public peak rates, never measured.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from qwen3_jax.config import ConfigError, Qwen3Config
from qwen3_jax.ops import for_platform
from qwen3_jax.plan import hlo
from qwen3_jax.plan.chips import ChipError, Topology, topology
from qwen3_jax.plan.cost import Cost, walk
from qwen3_jax.plan.meshes import Candidate, floor_s, problems, rank
from qwen3_jax.plan.programs import PHASES, bytes_per_device, programs, rows_of
from qwen3_jax.plan.result import Memory, Plan, PlanError, Refused, Step, mesh_name, none_fits
from qwen3_jax.plan.wires import places_of
from qwen3_jax.sharding import ShardingError, make_mesh, parse_mesh

# Without the first, libtpu asks a metadata server that only Google's machines have; without the second, a second
# process on the same host dies on a lock file; without the others it complains on stderr, whatever their values are.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
DTYPES = ("bfloat16", "float32")
SHALLOW = 4
"""Layers of the programs that decide between meshes: a full one takes minutes."""
CLOSE = 1.1
"""A mesh whose estimate is more than this many times the best's is not compiled: arithmetic is not that wrong."""


def config_of(model: str) -> tuple[str, Qwen3Config]:
    """Return a model's name and config from a released name or a folder.

    Raises:
        PlanError: neither; one line with the names.
    """
    try:
        if Path(model).exists():
            return Path(model).resolve().name, Qwen3Config.from_file(model)
        config = Qwen3Config.from_name(model)
    except ConfigError as error:
        raise PlanError(str(error).splitlines()[0]) from None
    known = {name.lower(): name for name in Qwen3Config.names()}
    return known[model.lower().removeprefix("qwen/")], config


def devices_of(found: Topology) -> list[Any]:
    """Describe the slice to the compiler and return its devices; nothing of it needs to exist.

    Raises:
        PlanError: the compiler for this platform is not installed.
    """
    if found.chip.kind != "tpu":
        from qwen3_jax.plan import gpu

        try:
            return gpu.devices(found)
        except ChipError as error:
            raise PlanError(str(error)) from None
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    try:
        described = topologies.get_topology_desc(str(found), platform="tpu")
    except Exception as error:  # jax raises RuntimeError, NotImplementedError or a C++ status by version
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(f"cannot compile for {found}: {first}; needs pip install 'qwen3-jax[tpu]'") from None
    return list(described.devices)


def compiled(
    lower: Callable[[], jax.stages.Lowered], found: Topology, mesh: Mesh, *, hlo_file: Path | None = None
) -> tuple[Cost, Any, float]:
    """Lower and compile a program for a mesh; return its cost, the compiler's account of its memory, and the seconds.

    Raises:
        PlanError: the compiler refuses, most often because the program does not fit; its first line.
    """
    started = time.perf_counter()
    lowered = lower()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise PlanError(_first_line(error)) from None
    seconds = time.perf_counter() - started
    text = program.as_text()
    assert text is not None
    if hlo_file is not None:
        hlo_file.parent.mkdir(parents=True, exist_ok=True)
        hlo_file.write_text(text)
    cost = walk(hlo.parse(text), found.chip, partitions=found.devices, places=places_of(mesh.devices.flat))
    return cost, program.memory_analysis(), seconds


def compile_step(
    config: Qwen3Config,
    found: Topology,
    sizes: dict[str, int],
    phase: str,
    *,
    batch: int,
    context: int,
    dtype: str,
    hlo_file: Path | None = None,
) -> Step:
    """Compile one phase on one mesh and price it; raises PlanError as `compiled` does."""
    ops = for_platform(found.chip.kind)
    mesh = make_mesh(**sizes, devices=devices_of(found))
    shape: dict[str, Any] = {"ops": ops, "dtype": dtype, "context": context}
    cost, analysis, seconds = compiled(
        lambda: programs(config, mesh, phases=(phase,), batch=batch, **shape)[phase],
        found,
        mesh,
        hlo_file=hlo_file,
    )
    weights, cache = bytes_per_device(config, sizes, batch=batch, **shape)
    rows = rows_of(phase, sizes, batch)
    own = 0
    if phase != "first":
        rules = PHASES[phase].rules
        _, own = bytes_per_device(config, sizes, batch=rows, rules=rules, **shape)
    return Step(
        tokens=rows * context if phase == "prefill" else rows,
        # The cache of rows that this phase does not touch is there.
        memory=Memory.of(analysis, state=weights + own, weights=weights, cache=cache),
        cost=cost,
        aliased_bytes=analysis.alias_size_in_bytes,
        compile_s=seconds,
        floor_s=floor_s(config, found, phase, rows=rows, context=context, itemsize=jnp.dtype(dtype).itemsize),
    )


def subject(model: str, slice_name: str, *, batch: int, context: int, dtype: str) -> tuple[str, Qwen3Config, Topology]:
    """Return a model's name and config and the slice of a plan.

    Raises:
        PlanError: an unknown model, slice or dtype, or a batch or context that cannot be; one line.
    """
    name, config = config_of(model)
    try:
        found = topology(slice_name)
    except ChipError as error:
        raise PlanError(str(error)) from None
    if dtype not in DTYPES:
        raise PlanError(f"dtype {dtype!r} is unknown: use {' or '.join(DTYPES)}")
    if batch < 1 or context < 1:
        raise PlanError(f"batch {batch} and context {context}: both must be at least 1")
    if context > config.max_position_embeddings:
        raise PlanError(
            f"context {context} exceeds max_position_embeddings {config.max_position_embeddings} of {name}: lower it"
        )
    return name, config, found


def mesh_of(text: str, found: Topology) -> dict[str, int]:
    """Read a mesh of all devices of a slice; raises PlanError with the first thing that is wrong."""
    try:
        sizes = parse_mesh(text)
    except ShardingError as error:
        raise PlanError(str(error).splitlines()[0]) from None
    devices = math.prod(sizes.values())
    if devices != found.devices:
        raise PlanError(f"mesh {text} has {devices} devices, {found} has {found.devices}")
    return sizes


def text_file(folder: Path | None, name: str, found: Topology, sizes: dict[str, int], step: str) -> Path | None:
    """Return where the text of a compiled program is kept, None without a folder."""
    label = f"{name}_{found}_{mesh_name(sizes)}_{step}".replace(":", "-").replace(",", "_")
    return folder and folder / f"{label}.hlo"


def plan(
    model: str,
    slice_name: str,
    *,
    batch: int,
    context: int,
    mesh: str = "auto",
    dtype: str = "bfloat16",
    phases: Sequence[str] = tuple(PHASES),
    hlo_dir: Path | None = None,
    compile_best: int = 3,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile a model's steps for a slice and say what they need.

    Args:
        model: a released name ("Qwen3-8B") or a Hugging Face folder.
        slice_name: "v5e:4x4"; see `chips.topology_names`.
        batch: rows of a decode step; the cache has this many.
        context: slots per row.
        mesh: "expert=4,model=4", or "auto" for the best of all: ranked by arithmetic; where the first ones lie close
            together, up to `compile_best` of them by what a few of their layers compile to.
        phases: keys of `programs.PHASES`.
        hlo_dir: keeps each compiled program there as text.
        progress: called with a line before each compile.

    Raises:
        PlanError: an unknown model, slice, dtype or phase; no mesh that divides; or the compiler is missing.
    """
    name, config, found = subject(model, slice_name, batch=batch, context=context, dtype=dtype)
    if unknown := [phase for phase in phases if phase not in PHASES]:
        raise PlanError(f"phase {unknown[0]!r} is unknown: use {', '.join(PHASES)}")
    shape = {"batch": batch, "context": context, "dtype": dtype}

    def attempt(config: Qwen3Config, sizes: dict[str, int], *, keep: bool) -> tuple[dict[str, Step], str | None]:
        done: dict[str, Step] = {}
        for phase in phases:
            progress(f"compiling {phase}, {config.num_hidden_layers} layers, of {name} for {found}, {mesh_name(sizes)}")
            file = text_file(hlo_dir if keep else None, name, found, sizes, phase)
            try:
                done[phase] = compile_step(config, found, sizes, phase, hlo_file=file, **shape)
            except PlanError as error:
                return done, f"{phase}: {error}"
        return done, None

    if mesh != "auto":
        sizes = mesh_of(mesh, found)
        if wrong := problems(config, sizes, phases, batch):
            raise PlanError(wrong[0])
        steps, error = attempt(config, sizes, keep=True)
        return Plan(name, found, sizes, batch, context, dtype, steps, [], error)

    ranked, refused = rank(config, found, phases=phases, **shape)
    if not ranked:
        raise none_fits(f"no mesh of {found} holds {name} at batch {batch} and context {context}", refused)
    close = [c for c in ranked[:compile_best] if c.score <= CLOSE * ranked[0].score]
    refused += [Refused(c.mesh, f"estimated {_against(c, ranked[0])}") for c in ranked[len(close) :]]
    order, losses = [c.mesh for c in close], {}
    if len(close) > 1:
        few = dataclasses.replace(config, num_hidden_layers=min(SHALLOW, config.num_hidden_layers))
        tried = [(sizes, attempt(few, sizes, keep=False)) for sizes in order]
        times = {mesh_name(sizes): _times(steps) for sizes, (steps, error) in tried if error is None}
        losses = {mesh_name(sizes): f"{few.num_hidden_layers} layers: {error}" for sizes, (_, error) in tried if error}
        best = {phase: min((t[phase] for t in times.values()), default=1.0) for phase in phases}
        score = {mesh: sum(t[phase] / best[phase] for phase in phases) for mesh, t in times.items()}
        order.sort(key=lambda sizes: score.get(mesh_name(sizes), math.inf))
        for mesh, t in times.items():
            against = ", ".join(f"{phase} {t[phase] * 1e6:.2f} (best {best[phase] * 1e6:.2f})" for phase in phases)
            losses[mesh] = f"compiled, {few.num_hidden_layers} layers, µs a token: {against}"
    steps, error = attempt(config, order[0], keep=True)
    chosen = Plan(name, found, order[0], batch, context, dtype, steps, refused, error)
    for sizes in order[1:]:
        if chosen.fits:
            refused.append(Refused(sizes, losses[mesh_name(sizes)]))
            continue
        steps, error = attempt(config, sizes, keep=True)
        other = Plan(name, found, sizes, batch, context, dtype, steps, refused, error)
        loser = chosen if other.fits else other
        refused.append(Refused(loser.mesh, loser.error or "compiled: does not fit"))
        chosen = other if other.fits else chosen
    return chosen


def _times(steps: dict[str, Step]) -> dict[str, float]:
    """Return each phase's schedule in seconds per token."""
    return {phase: step.cost.schedule_s / step.tokens for phase, step in steps.items()}


def _against(candidate: Candidate, best: Candidate) -> str:
    return ", ".join(
        f"{phase} {seconds * 1e3:.2f} ms (best mesh {best.seconds[phase] * 1e3:.2f})"
        for phase, seconds in candidate.seconds.items()
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__

"""Which mesh: every split of a slice, what rules it out, and a ranking by arithmetic before anything is compiled.

config, topology → `meshes` → those that divide and whose weights and cache fit → `estimate_s` of each phase that is
asked for → sorted. Also here, because it is the same arithmetic: `floor_s`, the time that no program undercuts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import for_platform, moe_parallel
from qwen3_jax.plan.chips import Chip, Topology
from qwen3_jax.plan.programs import PHASES, bytes_per_device, rows_of
from qwen3_jax.plan.result import Refused, gb
from qwen3_jax.sharding import RULES, check


class Candidate(NamedTuple):
    """A mesh that divides and fits, and the seconds that a step of each phase is expected to take."""

    mesh: dict[str, int]
    seconds: dict[str, float]
    score: float
    """The sum over the phases of its time as a multiple of the best mesh's."""


LANES = 128
"""Of a matrix unit: experts are not cut into slices that are no multiple of it."""


def meshes(config: Qwen3Config, devices: int, *, slices: bool = False) -> list[dict[str, int]]:
    """List the serving meshes of a number of devices: every split into data, expert (MoE only) and model.

    Args:
        slices: instead those that also cut every expert in slices, along `fsdp`.
    """
    found = []
    for model in _divisors(devices):
        for expert in _divisors(devices // model) if config.num_experts else [1]:
            rest = devices // model // expert
            for fsdp in (_cuts(config, rest) if config.num_experts else []) if slices else [1]:
                found.append({"data": rest // fsdp, "fsdp": fsdp, "expert": expert, "model": model})
    return found


def _cuts(config: Qwen3Config, devices: int) -> list[int]:
    return [n for n in _divisors(devices) if n > 1 and config.moe_intermediate_size % (n * LANES) == 0]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


class Shape:
    """Stands for a mesh where only its axis sizes are asked for."""

    def __init__(self, shape: dict[str, int]):
        self.shape = shape


def problems(config: Qwen3Config, mesh: dict[str, int], phases: Sequence[str], batch: int) -> list[str]:
    """Return one line for each thing that does not divide over a mesh."""
    found = check(config, Shape(mesh), RULES["serve"])  # type: ignore[arg-type]
    ways = math.prod(mesh[axis] for axis in RULES["serve"]["batch"])
    if "decode" in phases and batch % ways:
        found.append(f"batch {batch} does not divide over data × fsdp × expert {ways}")
    return found


def rank(
    config: Qwen3Config, found: Topology, *, phases: Sequence[str], batch: int, context: int, dtype: str
) -> tuple[list[Candidate], list[Refused]]:
    """Sort the meshes that divide and can fit, best first, by their expected times; say why the others are out."""
    ops = for_platform(found.chip.kind)
    good: list[tuple[dict[str, int], dict[str, float]]] = []
    refused = []
    for slices in (False, True):
        if good:  # slices of experts are for models whose whole experts do not fit: their rows go to more chips
            break
        for mesh in meshes(config, found.devices, slices=slices):
            if why := problems(config, mesh, phases, batch):
                refused.append(Refused(mesh, why[0]))
                continue
            # Without a decode step the cache is that of the prefilled rows.
            rows, table = (batch, "serve") if "decode" in phases else (rows_of("prefill", mesh, batch), "prefill")
            weights, cache = bytes_per_device(
                config, mesh, ops=ops, dtype=dtype, batch=rows, context=context, rules=table
            )
            if weights + cache > found.chip.hbm_bytes:
                over = weights + cache - found.chip.hbm_bytes
                reason = f"weights {gb(weights)} and cache {gb(cache)} are {gb(over)} more than a chip's "
                refused.append(Refused(mesh, reason + gb(found.chip.hbm_bytes), over))
                continue
            times = {
                phase: estimate_s(config, found.chip, mesh, phase, weights, cache, rows_of(phase, mesh, batch), context)
                for phase in phases
            }
            good.append((mesh, times))

    def per_token(phase: str, mesh: dict[str, int], seconds: float) -> float:
        return seconds / rows_of(phase, mesh, batch)

    best = {p: min((per_token(p, mesh, times[p]) for mesh, times in good), default=1.0) for p in phases}
    ranked = [
        Candidate(mesh, times, sum(per_token(p, mesh, times[p]) / best[p] for p in phases)) for mesh, times in good
    ]
    return sorted(ranked, key=lambda c: c.score), refused


def estimate_s(
    config: Qwen3Config,
    chip: Chip,
    mesh: dict[str, int],
    phase: str,
    weights: int,
    cache: int,
    rows: int,
    context: int,
) -> float:
    """Estimate a step by arithmetic: its matrix products or its HBM reads, whichever takes longer, and its ICI time.

    A chip reads its weights once (of the experts only those that its rows are expected to choose), and in decode its
    cache. Each layer sums activations over `model`, gathers keys over `expert` in a prefill, and sends rows to the
    experts and back.

    Args:
        weights, cache: bytes of one chip.
        rows: of one step, over all chips.
    """
    D, L = config.hidden_size, config.num_hidden_layers
    M, E, S = mesh["model"], mesh["expert"], mesh["fsdp"]
    replicas = math.prod(mesh[axis] for axis in RULES[PHASES[phase].rules]["batch"])
    ring = 2 * chip.link_bytes_s or 1e10  # GPUs without links talk through the host
    if phase == "first":
        return 2.0 * config.vocab_size * D / (E * M) / chip.hbm_bytes_s
    moe_layers = sum(config.is_moe_layer(i) for i in range(L))
    tokens = rows if phase == "decode" else rows * context
    # Rows that do not divide over the replicas are computed by each of them.
    local = tokens / replicas if rows % replicas == 0 else float(tokens)
    if phase == "prefill":
        local /= E * S
    routed = local * E * S  # rows whose experts lie on the devices that hold one copy of them
    read = float(weights) + (cache if phase == "decode" else 0)
    if moe_layers:
        untouched = (1 - config.num_experts_per_tok / config.num_experts) ** routed
        experts = 2 * 3 * config.num_experts * D * config.moe_intermediate_size * moe_layers
        read -= experts / (E * M * S) * untouched
    flops = local * config.flops_per_token(context if phase == "decode" else context // 2) / M
    around = 2 * 2 * D * local * (M - 1) / M  # a sum over `model`, or a gather and a scatter
    if phase == "decode":
        together, all_ = E * S, E * S * M
        experts_sent = 2 * D * routed * ((together - 1) / together + 2 * (all_ - 1) / all_)
    elif moe_layers:
        rules = RULES[PHASES[phase].rules]
        place = moe_parallel.island(mesh, {**rules, "length": rules["stream"]})
        group, choices = place.ways(place.shared), config.num_experts_per_tok
        hops = min(moe_parallel.transfers(place.whole(), choices, chip.kind), group - 1) if group > 1 else 0
        experts_sent = 2 * 2 * D * local / M * (S * hops + S - 1)
    else:
        experts_sent = 0.0
    sent = L * around + (L - moe_layers) * around + moe_layers * experts_sent
    if phase == "prefill":
        heads = max(config.num_key_value_heads, M) / M
        sent += L * 2 * 2 * heads * config.head_dim * routed * (E * S - 1) / (E * S)  # keys and values
    return max(flops / chip.bf16_flops, read / chip.hbm_bytes_s) + sent / ring


def floor_s(config: Qwen3Config, found: Topology, phase: str, *, rows: int, context: int, itemsize: int = 2) -> float:
    """Return the least time of a step: its FLOPs, or its weights and cache read once, at peak rates over all chips.

    Nothing is sent, logits are of one position a row, the embedding's rows are not counted, and of the experts those
    that `rows` fair routes are expected to choose.

    Args:
        rows: of the step.
        context: slots read per row in decode, tokens per row in a prefill.
        itemsize: bytes of a weight and of a cached number.
    """
    embedding = config.vocab_size * config.hidden_size
    head_flops = 2 * embedding
    flops = {
        "prefill": rows * (context * (config.flops_per_token(0) - head_flops)),
        "first": rows * head_flops,
        "decode": rows * config.flops_per_token(context),
    }[phase]
    if phase == "prefill":  # a causal prompt attends to (T + 1) / 2 positions on average
        attention = config.flops_per_token(1) - config.flops_per_token(0)
        flops += rows * attention * context * (context + 1) // 2
    weights = config.num_parameters(embedding=False)
    if config.num_experts:
        tokens = rows if phase == "decode" else rows * context
        moe_layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
        experts = 3 * config.num_experts * config.hidden_size * config.moe_intermediate_size * moe_layers
        weights -= experts * (1 - config.num_experts_per_tok / config.num_experts) ** tokens
    bytes_ = {
        "prefill": weights * itemsize,
        "first": embedding * itemsize,
        "decode": (weights + embedding) * itemsize + rows * context * config.kv_bytes_per_token(itemsize),
    }[phase]
    return max(flops / found.chip.bf16_flops, bytes_ / found.chip.hbm_bytes_s) / found.devices

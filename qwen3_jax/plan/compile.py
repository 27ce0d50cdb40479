"""Compile for a pod you do not own: does it fit, what does a step cost, which mesh is best.

model, topology → mesh (given, or the best of all that divide) → `programs` → the real compiler, ahead of time →
`memory_analysis` and `cost.walk` → `Plan`: a table, an HTML page, or JSON.

No accelerator is needed: libtpu compiles for TPU slices that are described and not present. What it prints is the
compiler's own program; the times are derived from that program and public peak rates, never measured.
"""

import html
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_jax.config import ConfigError, Qwen3Config
from qwen3_jax.plan import cost as costs
from qwen3_jax.plan import hlo
from qwen3_jax.plan.chips import Chip, ChipError, Topology, topology
from qwen3_jax.sharding import AXES, RULES, ShardingError, check, parse_mesh

# Without the first, libtpu asks a metadata server that only Google's machines have; without the second, a second
# process on the same host dies on a lock file.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
DTYPES = ("bfloat16", "float32")


class PlanError(ValueError):
    """A plan that cannot be made; one line with what would be possible."""


@dataclass(frozen=True)
class Memory:
    """Bytes per chip. `code` is the program, `temp` what a step needs beside its arguments and results."""

    weights: int
    cache: int
    temp: int
    code: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temp + self.code


@dataclass(frozen=True)
class Step:
    """One phase, compiled: tokens per execution over all chips, its memory and its cost per chip."""

    tokens: int
    memory: Memory
    cost: costs.Cost
    aliased_bytes: int
    compile_s: float

    @property
    def bound_s(self) -> float:
        """The slowest pipe alone: no schedule of this program is faster."""
        return max(self.cost.compute_s, self.cost.hbm_s, self.cost.ici_s)


@dataclass(frozen=True)
class Refused:
    """A mesh that was not chosen, and why."""

    mesh: dict[str, int]
    reason: str


@dataclass(frozen=True)
class Plan:
    """What `plan` found for one mesh."""

    model: str
    topology: Topology
    mesh: dict[str, int]
    batch: int
    context: int
    dtype: str
    steps: dict[str, Step]
    refused: list[Refused] = field(default_factory=list)
    error: str | None = None
    """The compiler's message if the program does not fit or does not compile."""

    @property
    def chip(self) -> Chip:
        return self.topology.chip

    @property
    def memory(self) -> Memory | None:
        """The phase that needs most; the cache is that of the whole batch in every phase."""
        return max((s.memory for s in self.steps.values()), key=lambda m: m.total, default=None)

    @property
    def fits(self) -> bool:
        return self.error is None and self.memory is not None and self.memory.total <= self.chip.hbm_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the stable form: bytes, seconds, per chip and per step."""
        memory = self.memory
        return {
            "model": self.model,
            "topology": str(self.topology),
            "mesh": self.mesh,
            "chips": self.topology.devices,
            "batch": self.batch,
            "context": self.context,
            "dtype": self.dtype,
            "fits": self.fits,
            "error": self.error,
            "hbm_bytes_per_chip": None
            if memory is None
            else {name: getattr(memory, name) for name in ("weights", "cache", "temp", "code", "total")},
            "hbm_limit_bytes": int(self.chip.hbm_bytes),
            "step": {phase: self._step_json(step) for phase, step in self.steps.items()},
            "compile_s": round(sum(step.compile_s for step in self.steps.values()), 1),
            "refused": [{"mesh": r.mesh, "reason": r.reason} for r in self.refused],
        }

    def _step_json(self, step: Step) -> dict[str, Any]:
        cost = step.cost
        return {
            "flops": cost.flops,
            "hbm_bytes": cost.hbm_bytes,
            "ici_bytes": cost.ici_bytes,
            "collectives": {k: {"count": c.count, "bytes": c.bytes} for k, c in sorted(cost.collectives.items())},
            "roofline_s": {"compute": cost.compute_s, "hbm": cost.hbm_s, "ici": cost.ici_s},
            "schedule_s": cost.schedule_s,
            "bound": cost.bound,
            "copied_bytes": cost.copied_bytes,
            "aliased_bytes": step.aliased_bytes,
            "tokens": step.tokens,
            "tokens_per_s_per_chip": step.tokens / cost.schedule_s / self.topology.devices,
            "unpriced": cost.unpriced,
        }


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
    from jax.experimental import topologies

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


# Choosing a mesh


def meshes(config: Qwen3Config, devices: int) -> list[dict[str, int]]:
    """List the serving meshes of a number of devices: every split into data, expert (MoE only) and model."""
    found = []
    for model in _divisors(devices):
        for expert in _divisors(devices // model) if config.num_experts else [1]:
            found.append(
                dict.fromkeys(AXES, 1) | {"data": devices // model // expert, "expert": expert, "model": model}
            )
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


class _Shape:
    """Stands for a mesh where only its axis sizes are asked for."""

    def __init__(self, shape: dict[str, int]):
        self.shape = shape


def estimate_s(config: Qwen3Config, chip: Chip, mesh: dict[str, int], weights: int, cache: int, batch: int) -> float:
    """Estimate a decode step by arithmetic, to rank meshes before compiling: HBM time plus ICI time.

    Every chip reads its weights (of the experts only those that the batch is expected to choose) and its cache once,
    and each layer reduces activations over `model` and gathers and scatters rows over `expert`.
    """
    rows = batch / (mesh["data"] * mesh["fsdp"])
    read = float(weights)
    if config.num_experts:
        E, C = config.num_experts, config.num_experts_per_tok
        layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
        experts = 2 * 3 * E * config.hidden_size * config.moe_intermediate_size * layers
        untouched = (1 - C / E) ** rows
        read -= experts / (mesh["expert"] * mesh["model"]) * untouched
    per_row = 2 * config.hidden_size
    local_rows = rows / mesh["expert"]
    ring = 2 * chip.link_bytes_s or 1e9
    reduce = 2 * (mesh["model"] - 1) / mesh["model"] * per_row
    ici = config.num_hidden_layers * 2 * local_rows * reduce / ring
    if config.num_experts:
        ici += config.num_hidden_layers * 2 * rows * per_row * (mesh["expert"] - 1) / mesh["expert"] / ring
    return (read + cache) / chip.hbm_bytes_s + ici


def rank(
    config: Qwen3Config, found: Topology, *, batch: int, context: int, dtype: str
) -> tuple[list[tuple[dict[str, int], float]], list[Refused]]:
    """Sort the meshes that divide and can fit by estimated decode time; say why the others are out."""
    from qwen3_jax.ops import for_platform
    from qwen3_jax.plan.programs import bytes_per_device

    ops = for_platform(found.chip.kind)
    good, refused = [], []
    for mesh in meshes(config, found.devices):
        rows = mesh["data"] * mesh["fsdp"] * mesh["expert"]
        problems = check(config, _Shape(mesh), RULES["serve"])  # type: ignore[arg-type]
        if batch % rows:
            problems.append(f"batch {batch} does not divide over data × fsdp × expert {rows}")
        if problems:
            refused.append(Refused(mesh, problems[0]))
            continue
        weights, cache = bytes_per_device(config, mesh, ops=ops, dtype=dtype, batch=batch, context=context)
        if weights + cache > found.chip.hbm_bytes:
            over = weights + cache - found.chip.hbm_bytes
            refused.append(
                Refused(
                    mesh,
                    f"weights {_gb(weights)} and cache {_gb(cache)} are {_gb(over)} more than a chip's "
                    f"{_gb(found.chip.hbm_bytes)}",
                )
            )
            continue
        good.append((mesh, estimate_s(config, found.chip, mesh, weights, cache, batch)))
    return sorted(good, key=lambda g: g[1]), refused


# Compiling


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
    """Compile one phase on one mesh and price it.

    Raises:
        PlanError: the compiler refuses, most often because the program does not fit; its first line.
    """
    import jax

    from qwen3_jax.ops import for_platform
    from qwen3_jax.plan.programs import bytes_per_device, prefill_rows, programs
    from qwen3_jax.sharding import make_mesh

    ops = for_platform(found.chip.kind)
    mesh = make_mesh(**sizes, devices=devices_of(found))
    started = time.perf_counter()
    lowered = programs(config, mesh, ops=ops, dtype=dtype, batch=batch, context=context, phases=(phase,))[phase]
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise PlanError(_first_line(error)) from None
    seconds = time.perf_counter() - started
    text = compiled.as_text()
    assert text is not None
    if hlo_file is not None:
        hlo_file.parent.mkdir(parents=True, exist_ok=True)
        hlo_file.write_text(text)
    analysis: Any = compiled.memory_analysis()
    weights, cache = bytes_per_device(config, sizes, ops=ops, dtype=dtype, batch=batch, context=context)
    rows = batch if phase == "decode" else prefill_rows(mesh, batch)
    own = cache * rows // batch
    used = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Step(
        tokens=rows if phase == "decode" else rows * context,
        # Padding of arguments to tiles counts as temporary; the cache of rows that this phase does not touch is there.
        memory=Memory(
            weights=weights,
            cache=cache,
            temp=analysis.temp_size_in_bytes + max(0, used - weights - own),
            code=analysis.generated_code_size_in_bytes,
        ),
        cost=costs.walk(hlo.parse(text), found.chip, partitions=found.devices),
        aliased_bytes=analysis.alias_size_in_bytes,
        compile_s=seconds,
    )


def plan(
    model: str,
    slice_name: str,
    *,
    batch: int,
    context: int,
    mesh: str = "auto",
    dtype: str = "bfloat16",
    phases: Sequence[str] = ("prefill", "decode"),
    hlo_dir: Path | None = None,
    compile_best: int = 2,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile a model's steps for a slice and say what they need.

    Args:
        model: a released name ("Qwen3-8B") or a Hugging Face folder.
        slice_name: "v5e:4x4"; see `chips.topology_names`.
        batch: rows of a decode step; the cache has this many.
        context: slots per row.
        mesh: "expert=4,model=4", or "auto" for the best of all: ranked by arithmetic, then the `compile_best` first
            ones by their compiled decode step.
        hlo_dir: keeps each compiled program there as text.
        progress: called with a line before each compile.

    Raises:
        PlanError: an unknown model, slice, dtype; no mesh that divides; or the compiler is missing.
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
    shape = {"batch": batch, "context": context, "dtype": dtype}
    refused: list[Refused] = []
    if mesh == "auto":
        ranked, refused = rank(config, found, **shape)
        if not ranked:
            reasons = "; ".join(f"{_mesh_name(r.mesh)}: {r.reason}" for r in refused[:3])
            raise PlanError(f"no mesh of {found} holds {name} at batch {batch} and context {context}: {reasons}")
        candidates = [sizes for sizes, _ in ranked[:compile_best]]
        refused += [
            Refused(sizes, f"estimated {s * 1e3:.2f} ms a decode step, the best {ranked[0][1] * 1e3:.2f} ms")
            for sizes, s in ranked[compile_best:]
        ]
    else:
        try:
            sizes = parse_mesh(mesh)
            problems = check(config, _Shape(sizes), RULES["serve"])  # type: ignore[arg-type]
        except ShardingError as error:
            raise PlanError(str(error).splitlines()[0]) from None
        if math.prod(sizes.values()) != found.devices:
            raise PlanError(f"mesh {mesh} has {math.prod(sizes.values())} devices, {found} has {found.devices}")
        rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        if batch % rows:
            problems.append(f"batch {batch} does not divide over data × fsdp × expert {rows}")
        if problems:
            raise PlanError(problems[0])
        candidates = [sizes]

    def steps_of(sizes: dict[str, int], wanted: Sequence[str]) -> tuple[dict[str, Step], str | None]:
        done: dict[str, Step] = {}
        for phase in wanted:
            progress(f"compiling {phase} of {name} for {found} on {_mesh_name(sizes)}")
            file = hlo_dir and hlo_dir / f"{name}_{slice_name.replace(':', '-')}_{_mesh_name(sizes)}_{phase}.hlo"
            try:
                done[phase] = compile_step(config, found, sizes, phase, hlo_file=file, **shape)
            except PlanError as error:
                return done, f"{phase}: {error}"
        return done, None

    first = "decode" if "decode" in phases else phases[0]
    best: tuple[dict[str, int], dict[str, Step], str | None] | None = None
    for sizes in candidates:
        done, error = steps_of(sizes, [first])
        fits = error is None and done[first].memory.total <= found.chip.hbm_bytes
        if best is None:
            best = sizes, done, error
        elif fits and (best[2] is not None or done[first].cost.schedule_s < best[1][first].cost.schedule_s):
            refused.append(Refused(best[0], best[2] or _slower(first, best[1][first], done[first])))
            best = sizes, done, error
        else:
            refused.append(Refused(sizes, error or _slower(first, done[first], best[1].get(first))))
    assert best is not None
    sizes, done, error = best
    if error is None:
        more, error = steps_of(sizes, [phase for phase in phases if phase != first])
        done = {phase: (done | more)[phase] for phase in phases if phase in done | more}
    return Plan(name, found, sizes, batch, context, dtype, done, refused, error)


def _slower(phase: str, step: Step, best: Step | None) -> str:
    than = f", the best {best.cost.schedule_s * 1e3:.2f} ms" if best else ""
    return f"compiled {phase} {step.cost.schedule_s * 1e3:.2f} ms{than}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _mesh_name(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def _gb(amount: float) -> str:
    return f"{amount / 1e9:.2f} GB"


# Showing


def table(plan: Plan) -> Any:
    """Lay a plan out as rich tables, for a terminal."""
    from rich.console import Group
    from rich.table import Table

    memory, limit = plan.memory, plan.chip.hbm_bytes
    title = f"{plan.model} on {plan.topology} ({plan.topology.devices} devices), mesh {_mesh_name(plan.mesh)}, "
    title += f"batch {plan.batch}, context {plan.context}, {plan.dtype}"
    holds = Table(title=title, title_justify="left")
    parts = ("weights", "cache", "temp", "code", "total")
    for part in (*parts, "limit", "verdict"):
        holds.add_column(part, justify="right")
    if memory is not None:
        spare = limit - memory.total
        verdict = f"fits, {_gb(spare)} spare" if plan.fits else f"does not fit by {_gb(-spare)}"
        holds.add_row(*(_gb(getattr(memory, part)) for part in parts), _gb(limit), verdict)
    if plan.error:
        holds.add_row(*[""] * 6, f"does not compile: {plan.error}")
    runs = Table(title="per step and chip: each pipe alone, and in the compiled order", title_justify="left")
    for column in ("phase", "hbm ms", "mxu ms", "ici ms", "schedule ms", "bound", "tokens/s/chip", "copied", "aliased"):
        runs.add_column(column, justify="left" if column in ("phase", "bound") else "right")
    for phase, step in plan.steps.items():
        c = step.cost
        rate = step.tokens / c.schedule_s / plan.topology.devices
        times = (f"{s * 1e3:.2f}" for s in (c.hbm_s, c.compute_s, c.ici_s, c.schedule_s))
        runs.add_row(phase, *times, c.bound, f"{rate:,.0f}", _gb(c.copied_bytes), _gb(step.aliased_bytes))
    sends = Table(title="collectives per step: count, bytes sent by each chip", title_justify="left")
    for column in ("phase", "kind", "count", "MB"):
        sends.add_column(column, justify="left" if column in ("phase", "kind") else "right")
    for phase, step in plan.steps.items():
        for kind, c in sorted(step.cost.collectives.items()):
            sends.add_row(phase, kind, str(c.count), f"{c.bytes / 1e6:.2f}")
    others = Table(title="other meshes", title_justify="left")
    others.add_column("mesh")
    others.add_column("why not")
    for refused in plan.refused:
        others.add_row(_mesh_name(refused.mesh), refused.reason)
    groups = [holds, runs, sends, *([others] if plan.refused else [])]
    unpriced = [line for step in plan.steps.values() for line in step.cost.unpriced]
    return Group(*groups, *([f"not priced: {', '.join(unpriced)}"] if unpriced else []))


PARTS = {"weights": "#4269d0", "cache": "#efb118", "temp": "#ff725c", "code": "#9498a0"}


def page(plans: Sequence[Plan]) -> str:
    """Write plans as one self-contained HTML page with a chart of HBM per chip."""
    rows, charts = [], []
    for p in plans:
        label = html.escape(f"{p.model} · {p.topology} · {_mesh_name(p.mesh)} · batch {p.batch} × {p.context}")
        charts.append(f"<h3>{label}</h3>" + _chart(p))
        for phase, step in p.steps.items():
            c = step.cost
            cells = [f"{p.model}", f"{p.topology}", _mesh_name(p.mesh), phase]
            cells += [f"{s * 1e3:.2f}" for s in (c.hbm_s, c.compute_s, c.ici_s, c.schedule_s)]
            cells += [c.bound, f"{step.tokens / c.schedule_s / p.topology.devices:,.0f}"]
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = ("model", "slice", "mesh", "phase", "hbm ms", "mxu ms", "ici ms", "schedule ms", "bound", "tokens/s/chip")
    legend = " ".join(f'<span style="color:{colour}">■</span> {part}' for part, colour in PARTS.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>qwen3-jax plan</title>'
        "<style>body{font:15px system-ui;max-width:64rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:left}"
        "</style><h1>Plans</h1><p>Derived from the compiled programs and public peak rates; nothing was run.</p>"
        f"<h2>HBM per chip</h2><p>{legend}; the line is the chip's limit</p>{''.join(charts)}"
        f"<h2>Steps</h2><table><tr>{''.join(f'<th>{h}</th>' for h in heads)}</tr>{''.join(rows)}</table></html>"
    )


def _chart(plan: Plan) -> str:
    width, limit = 720, plan.chip.hbm_bytes
    phases = {phase: step.memory for phase, step in plan.steps.items()}
    if not phases:
        return f"<p>{html.escape(plan.error or 'nothing compiled')}</p>"
    scale = width / max(limit * 1.05, *(m.total for m in phases.values()))
    height, bars = 30 * len(phases), []
    for row, (phase, memory) in enumerate(phases.items()):
        x = 0.0
        bars.append(f'<text x="0" y="{row * 30 + 19}" font-size="13">{phase}</text>')
        for part, colour in PARTS.items():
            amount = getattr(memory, part)
            bars.append(
                f'<rect x="{70 + x:.1f}" y="{row * 30 + 4}" width="{amount * scale:.1f}" height="22" fill="{colour}">'
                f"<title>{part} {_gb(amount)}</title></rect>"
            )
            x += amount * scale
    edge = 70 + limit * scale
    bars.append(f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="{height}" stroke="black" stroke-width="2"/>')
    return f'<svg width="{width + 80}" height="{height}" role="img">{"".join(bars)}</svg>'


def to_json(plans: Sequence[Plan]) -> str:
    """Write plans as JSON: one object, or a list of several."""
    found = [p.to_json() for p in plans]
    return json.dumps(found[0] if len(found) == 1 else found, indent=2)

"""A plan for people: rich tables for a terminal, one self-contained HTML page with a chart of HBM per chip."""

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from qwen3_jax.plan.result import Memory, Plan, Step, gb, mesh_name


def table(plan: Plan) -> Any:
    """Lay a plan out as rich tables, for a terminal."""
    from rich.console import Group
    from rich.table import Table

    title = f"{plan.model} on {plan.topology} ({plan.topology.devices} devices), mesh {mesh_name(plan.mesh)}, "
    title += f"batch {plan.batch}, context {plan.context}, {plan.dtype}"
    holds = Table(title=title, title_justify="left")
    parts = ("weights", "optimizer" if plan.remat else "cache", "temp", "code", "total")
    for part in (*["remat"] * bool(plan.remat), *parts, "limit", "verdict"):
        holds.add_column(part, justify="left" if part == "remat" else "right")
    for label, memory in _memories(plan):
        start = [label] if plan.remat else []
        if isinstance(memory, str):
            holds.add_row(*start, *[""] * 6, f"does not compile: {memory}")
        else:
            sizes = (gb(getattr(memory, part)) for part in parts)
            holds.add_row(*start, *sizes, gb(plan.chip.hbm_bytes), _verdict(memory, plan.chip.hbm_bytes))
    runs = Table(title="per step and chip: each pipe alone, and in the compiled order", title_justify="left")
    for column in ("phase", *TIMES, "bound", "tokens/s/chip"):
        runs.add_column(column, justify="left" if column in ("phase", "bound") else "right")
    works = Table(title="work per step and chip, and what is written in place", title_justify="left")
    for column in ("phase", *WORK):
        works.add_column(column, justify="left" if column == "phase" else "right")
    for phase, step in plan.steps.items():
        runs.add_row(phase, *_milliseconds(step), step.cost.bound, _rate(plan, step))
        works.add_row(phase, *_work(step))
    sends = Table(title="collectives per step: count, bytes sent by each chip", title_justify="left")
    for column in ("phase", "kind", "count", "MB"):
        sends.add_column(column, justify="left" if column in ("phase", "kind") else "right")
    for phase, step in plan.steps.items():
        for kind, c in sorted(step.cost.collectives.items()):
            sends.add_row(phase, kind, str(c.count), f"{c.bytes / 1e6:.2f}")
    touched = Table(title="weights and cache within the step: copied, sent or not donated", title_justify="left")
    for column in TOUCHED:
        touched.add_column(column, justify="right" if column in ("count", "MB") else "left")
    for row in _touched(plan):
        touched.add_row(*row)
    others = Table(title="other meshes", title_justify="left")
    others.add_column("mesh")
    others.add_column("why not")
    for refused in plan.refused:
        others.add_row(mesh_name(refused.mesh), refused.reason)
    groups = [holds, runs, works, sends, *[touched] * bool(touched.rows), *[others] * bool(plan.refused)]
    return Group(*groups, *notes(plan))


TIMES = ("hbm ms", "mxu ms", "ici ms", "schedule ms", "floor ms")
WORK = ("GFLOP", "HBM GB", "ICI MB", "copied", "aliased", "compile s")
TOUCHED = ("phase", "what", "array", "count", "MB")


def _work(step: Step) -> list[str]:
    c = step.cost
    amounts = [f"{c.flops / 1e9:,.1f}", f"{c.hbm_bytes / 1e9:.2f}", f"{c.ici_bytes / 1e6:,.2f}"]
    return [*amounts, gb(c.copied_bytes), gb(step.aliased_bytes), f"{step.compile_s:.0f}"]


def _touched(plan: Plan) -> list[list[str]]:
    return [
        [phase, what, array, str(count), f"{amount / 1e6:.2f}"]
        for phase, step in plan.steps.items()
        for what, array, count, amount in step.cost.touched()
    ]


def _memories(plan: Plan) -> list[tuple[str, Memory | str]]:
    """Return what is held: the phase that needs most, then what does not compile; of training, each remat policy."""
    if plan.remat:
        return [(name, step if isinstance(step, str) else step.memory) for name, step in plan.remat.items()]
    found = [plan.memory, plan.error]
    return [("", one) for one in found if one is not None]


def _verdict(memory: Memory, limit: float) -> str:
    spare = limit - memory.total
    return f"fits, {gb(spare)} spare" if spare >= 0 else f"does not fit by {gb(-spare)}"


def notes(plan: Plan) -> list[str]:
    """Say what the numbers leave out, a line each."""
    unpriced = [line for step in plan.steps.values() for line in step.cost.unpriced]
    found = [f"not priced: {', '.join(unpriced)}"] if unpriced else []
    clean = [phase for phase, step in plan.steps.items() if not step.cost.touched()]
    if clean:
        found.append(f"{', '.join(clean)}: no weight and no part of the cache is copied, sent or left undonated")
    for phase, step in plan.steps.items():
        if step.model_flops:
            bound = f"{step.mfu_bound(plan.chip):.0%} model FLOPs utilisation at most"
            found.append(f"train: remat {plan.policy}, {bound}; temp holds {gb(step.gradients)} of gradients")
        once = len(step.cost.billed_once)
        if phase == "decode" and once:
            found.append("decode: one round of its loop, a token for every row")
        elif once:
            found.append(f"{phase}: {once} loops of the experts billed one round, as balanced routing takes")
        if never := len(step.cost.not_billed):
            found.append(
                f"{phase}: {never} loops of further rounds of the experts not billed: balanced routing takes none"
            )
    return found


def markdown(plans: Sequence[Plan]) -> str:
    """Write plans as a Markdown table, a line per phase; milliseconds are of one step, per chip."""
    heads = ("model", "slice", "mesh", "step", "weights + cache + rest, of GB", "hbm / mxu / ici", "schedule", "floor")
    heads += ("ratio", "binds", "compile s")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for p in plans:
        if not p.steps:
            lines.append(f"| {p.model} | {p.topology} | {mesh_name(p.mesh)} | {p.error} |" + " |" * (len(heads) - 4))
        for phase, step in p.steps.items():
            c, m = step.cost, step.memory
            rows = p.batch if phase == "decode" else step.tokens // (p.context if phase == "prefill" else 1)
            held = f"{m.weights / 1e9:.2f} + {m.cache / 1e9:.2f} + {(m.temp + m.code) / 1e9:.2f}"
            pipes = " / ".join(f"{s * 1e3:.2f}" for s in (c.hbm_s, c.compute_s, c.ici_s))
            ratio = c.schedule_s / step.floor_s if step.floor_s else math.nan
            cells = [p.model, str(p.topology), mesh_name(p.mesh), f"{phase}, {rows} × {p.context}"]
            cells += [f"{held}, of {p.chip.hbm_bytes / 1e9:.0f}", pipes, f"{c.schedule_s * 1e3:.2f}"]
            cells += [f"{step.floor_s * 1e3:.2f}", f"{ratio:.2f}", c.bound, f"{step.compile_s:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def train_markdown(plans: Sequence[Plan]) -> str:
    """Write plans of training as a Markdown table, a line per remat policy; milliseconds are of one step, per chip."""
    heads = ("model", "slice", "mesh", "rows", "remat", "weights + moments + rest, of GB", "fits", "hbm / mxu / ici")
    heads += ("schedule", "floor", "binds", "MFU at most", "tokens/s/chip", "compile s")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for p in plans:
        for policy, step in p.remat.items():
            cells = [p.model, str(p.topology), mesh_name(p.mesh), f"{p.batch} × {p.context}", policy]
            if isinstance(step, str):
                lines.append("| " + " | ".join([*cells, step, "no"]) + " |" + " |" * (len(heads) - 7))
                continue
            c, m, limit = step.cost, step.memory, p.chip.hbm_bytes
            held = f"{m.weights / 1e9:.2f} + {m.optimizer / 1e9:.2f} + {(m.temp + m.code) / 1e9:.2f}"
            spare = (limit - m.total) / 1e9
            cells += [f"{held}, of {limit / 1e9:.0f}", f"{spare:.1f} spare" if spare >= 0 else f"no, by {-spare:.1f}"]
            cells += [" / ".join(f"{s * 1e3:.0f}" for s in (c.hbm_s, c.compute_s, c.ici_s))]
            cells += [f"{c.schedule_s * 1e3:.0f}", f"{step.floor_s * 1e3:.0f}", c.bound]
            cells += [f"{step.mfu_bound(p.chip):.0%}", _rate(p, step), f"{step.compile_s:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PARTS = {"weights": "#4269d0", "optimizer": "#3ca951", "cache": "#efb118", "temp": "#ff725c", "code": "#9498a0"}


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
.note { color: #666 } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0 }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: left; white-space: nowrap }
td.number, th.number { text-align: right } td.reason { white-space: normal }
svg { display: block; max-width: 100%; height: auto; font: 13px system-ui, sans-serif }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } td, th { border-color: #333 } .note { color: #999 }
  svg text { fill: #ddd } svg .track { fill: #2a2a2a }
}
"""


def page(plans: Sequence[Plan]) -> str:
    """Write plans as one self-contained HTML page: a chart of HBM per chip, the steps' times, the meshes that lost."""
    title = html.escape(", ".join(dict.fromkeys(f"{p.model} on {p.topology}" for p in plans)))
    legend = " ".join(f'<span style="color:{colour}">■</span> {part}' for part, colour in PARTS.items())
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><h1>{title}</h1>',
        '<p class="note">Derived from the compiled programs and public peak rates; nothing was run.</p>',
        f'<h2>HBM per chip</h2><p class="note">{legend}; grey up to the limit of a chip</p>',
    ]
    for p in plans:
        label = f"{p.model}, {p.topology}, {mesh_name(p.mesh)}, batch {p.batch} × {p.context}, {p.dtype}"
        parts += [f"<h3>{html.escape(label)}</h3>", _chart(p)]
    steps = [
        [p.model, str(p.topology), mesh_name(p.mesh), phase, step.cost.bound, *_milliseconds(step), _rate(p, step)]
        for p in plans
        for phase, step in p.steps.items()
    ]
    heads = ["model", "slice", "mesh", "step", "binds", "hbm", "mxu", "ici", "schedule", "floor", "tokens/s/chip"]
    parts += ["<h2>Milliseconds per step</h2>", _table(heads, steps, numbers_from=5)]
    works = [[p.model, phase, *_work(step)] for p in plans for phase, step in p.steps.items()]
    parts += ["<h2>Work per step and chip</h2>", _table(["model", "step", *WORK], works, numbers_from=2)]
    sends = [
        [str(p.model), phase, kind, f"{c.count:,}", f"{c.bytes / 1e6:,.2f}"]
        for p in plans
        for phase, step in p.steps.items()
        for kind, c in sorted(step.cost.collectives.items())
    ]
    if sends:
        heads = ["model", "step", "collective", "per step", "MB sent by a chip"]
        parts += ["<h2>Collectives</h2>", _table(heads, sends, numbers_from=3)]
    touched = [[p.model, *row] for p in plans for row in _touched(p)]
    if touched:
        parts += ["<h2>Weights and cache within the step</h2>", _table(["model", *TOUCHED], touched, numbers_from=4)]
    others = [[str(p.model), mesh_name(r.mesh), r.reason] for p in plans for r in p.refused]
    if others:
        parts += ["<h2>Other meshes</h2>", _table(["model", "mesh", "why not"], others, numbers_from=3)]
    remarks = [f"{p.model}: {line}" for p in plans for line in notes(p)]
    parts += [f'<p class="note">{html.escape(line)}</p>' for line in remarks]
    return "\n".join([*parts, "</html>"]) + "\n"


def _milliseconds(step: Step) -> list[str]:
    c = step.cost
    return [f"{s * 1e3:.2f}" for s in (c.hbm_s, c.compute_s, c.ici_s, c.schedule_s, step.floor_s)]


def _rate(plan: Plan, step: Step) -> str:
    return f"{step.tokens / step.cost.schedule_s / plan.topology.devices:,.0f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [
            "number" if i >= numbers_from else "reason" if head == "why not" else "" for i, head in enumerate(heads)
        ]
        filled = "".join(f'<{tag} class="{k}">{html.escape(c)}</{tag}>' for k, c in zip(kinds, cells, strict=True))
        return f"<tr>{filled}</tr>"

    return f'<div class="scroll"><table>{line("th", heads)}{"".join(line("td", row) for row in rows)}</table></div>'


def _chart(plan: Plan) -> str:
    """Draw a bar per phase, or per remat policy, on a track as long as the chip's memory."""
    limit = plan.chip.hbm_bytes
    drawn = {name: step for name, step in plan.remat.items() if isinstance(step, Step)} or plan.steps
    phases = {name: step.memory for name, step in drawn.items()}
    if not phases:
        return f"<p>{html.escape(plan.error or 'nothing compiled')}</p>"
    left, width, right = 64, 640, 200
    scale = width / max(limit, *(m.total for m in phases.values()))
    bars = []
    for row, (phase, memory) in enumerate(phases.items()):
        x, y = float(left), row * 30 + 4
        bars.append(f'<text x="0" y="{y + 15}">{phase}</text>')
        bars.append(f'<rect class="track" x="{left}" y="{y}" width="{limit * scale:.1f}" height="22" fill="#eee"/>')
        for part, colour in PARTS.items():
            amount = getattr(memory, part)
            bars.append(
                f'<rect x="{x:.1f}" y="{y}" width="{amount * scale:.1f}" height="22" fill="{colour}">'
                f"<title>{part} {gb(amount)}</title></rect>"
            )
            x += amount * scale
        full = f"{memory.total / 1e9:.2f} of {limit / 1e9:.0f} GB" + ("" if memory.total <= limit else ", too much")
        bars.append(f'<text x="{left + width + 10}" y="{y + 15}">{full}</text>')
    size = f"0 0 {left + width + right} {30 * len(phases)}"
    return f'<svg viewBox="{size}" width="{left + width + right}" role="img">{"".join(bars)}</svg>'


def to_json(plans: Sequence[Plan]) -> str:
    """Write plans as JSON: one object, or a list of several."""
    found = [p.to_json() for p in plans]
    return json.dumps(found[0] if len(found) == 1 else found, indent=2)

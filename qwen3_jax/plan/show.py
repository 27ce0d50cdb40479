"""A plan for people: rich tables for a terminal, one self-contained HTML page with a chart of HBM per chip."""

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from qwen3_jax.plan.result import Plan, gb, mesh_name


def table(plan: Plan) -> Any:
    """Lay a plan out as rich tables, for a terminal."""
    from rich.console import Group
    from rich.table import Table

    memory, limit = plan.memory, plan.chip.hbm_bytes
    title = f"{plan.model} on {plan.topology} ({plan.topology.devices} devices), mesh {mesh_name(plan.mesh)}, "
    title += f"batch {plan.batch}, context {plan.context}, {plan.dtype}"
    holds = Table(title=title, title_justify="left")
    parts = ("weights", "cache", "temp", "code", "total")
    for part in (*parts, "limit", "verdict"):
        holds.add_column(part, justify="right")
    if memory is not None:
        spare = limit - memory.total
        verdict = f"fits, {gb(spare)} spare" if plan.fits else f"does not fit by {gb(-spare)}"
        holds.add_row(*(gb(getattr(memory, part)) for part in parts), gb(limit), verdict)
    if plan.error:
        holds.add_row(*[""] * 6, f"does not compile: {plan.error}")
    runs = Table(title="per step and chip: each pipe alone, and in the compiled order", title_justify="left")
    heads = ("phase", "hbm ms", "mxu ms", "ici ms", "schedule ms", "floor ms", "bound", "tokens/s/chip", "copied")
    for column in (*heads, "aliased"):
        runs.add_column(column, justify="left" if column in ("phase", "bound") else "right")
    for phase, step in plan.steps.items():
        c = step.cost
        rate = step.tokens / c.schedule_s / plan.topology.devices
        times = (f"{s * 1e3:.2f}" for s in (c.hbm_s, c.compute_s, c.ici_s, c.schedule_s, step.floor_s))
        runs.add_row(phase, *times, c.bound, f"{rate:,.0f}", gb(c.copied_bytes), gb(step.aliased_bytes))
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
        others.add_row(mesh_name(refused.mesh), refused.reason)
    groups = [holds, runs, sends, *([others] if plan.refused else [])]
    return Group(*groups, *notes(plan))


def notes(plan: Plan) -> list[str]:
    """Say what the numbers leave out, a line each."""
    unpriced = [line for step in plan.steps.values() for line in step.cost.unpriced]
    found = [f"not priced: {', '.join(unpriced)}"] if unpriced else []
    for phase, step in plan.steps.items():
        once = len(step.cost.billed_once)
        if phase == "decode" and once:
            found.append("decode: one round of its loop, a token for every row")
        elif once:
            found.append(f"{phase}: {once} loops of the experts billed one round, as balanced routing takes")
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


PARTS = {"weights": "#4269d0", "cache": "#efb118", "temp": "#ff725c", "code": "#9498a0"}


def page(plans: Sequence[Plan]) -> str:
    """Write plans as one self-contained HTML page with a chart of HBM per chip."""
    rows, charts = [], []
    for p in plans:
        label = html.escape(f"{p.model} · {p.topology} · {mesh_name(p.mesh)} · batch {p.batch} × {p.context}")
        charts.append(f"<h3>{label}</h3>" + _chart(p))
        for phase, step in p.steps.items():
            c = step.cost
            cells = [f"{p.model}", f"{p.topology}", mesh_name(p.mesh), phase]
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
                f"<title>{part} {gb(amount)}</title></rect>"
            )
            x += amount * scale
    edge = 70 + limit * scale
    bars.append(f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="{height}" stroke="black" stroke-width="2"/>')
    return f'<svg width="{width + 80}" height="{height}" role="img">{"".join(bars)}</svg>'


def to_json(plans: Sequence[Plan]) -> str:
    """Write plans as JSON: one object, or a list of several."""
    found = [p.to_json() for p in plans]
    return json.dumps(found[0] if len(found) == 1 else found, indent=2)

"""A report as one self-contained HTML page: no script, no outside address, light and dark.

`Report` → two plots by layer as inline SVG (isolated and accumulated differences, logarithmic) → a table of every
place. All text is escaped; folder names come from users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qwen3_jax.parity.report import Difference, Measure, Report

WIDTH, HEIGHT = 920, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 40

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #57606a; --line: #d8dee4; --red: #c4203a;
  --green: #177245; --s0: #1f6feb; --s1: #b35900; --s2: #0b7a75; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161c; --ink: #e6e9ee; --faint: #9aa4b1; --line: #303843;
  --red: #ff7b89; --green: #58c990; --s0: #6ea8fe; --s1: #ffa657; --s2: #56d4c8; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1120px; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2rem 0 .2rem; }
p { margin: .2rem 0 .6rem; } .faint { color: var(--faint); }
.verdict { border-left: 5px solid; padding: .4rem .8rem; font-weight: 600; margin: 1rem 0; }
.ok { color: var(--green); } .bad { color: var(--red); font-weight: 700; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .6rem; margin: 1rem 0; }
dt { color: var(--faint); font-size: .8rem; } dd { margin: 0; font-variant-numeric: tabular-nums; font-size: 1.1rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--faint); font-size: 12px; }
.grid { stroke: var(--line); } .bound { stroke: var(--red); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg .bound-label { fill: var(--red); } .series { fill: none; stroke-width: 1.8; }
.s0 { stroke: var(--s0); color: var(--s0); } .s1 { stroke: var(--s1); color: var(--s1); }
.s2 { stroke: var(--s2); color: var(--s2); } .mark { fill: var(--paper); stroke-width: 1.8; }
.mark.out { fill: var(--red); stroke: var(--red); } .legend span { margin-right: 1.2rem; }
.legend i { display: inline-block; width: 1.4rem; border-top: 3px solid currentColor; vertical-align: middle;
  margin-right: .35rem; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--faint); font-weight: 600; }
.grouped td:nth-child(3n+2), .grouped tr + tr th:nth-child(3n+2) { border-left: 1px solid var(--line);
  padding-left: 1rem; }
.grouped tr:first-child th { text-align: center; }
"""


class Series(NamedTuple):
    """One line of a plot: a value per layer (None where the layer has no such place) and whether it may be so large."""

    name: str
    values: list[float | None]
    ok: list[bool]


def render(report: Report) -> str:
    """Return the page."""
    layers = report.layers
    logits = report.logits
    facts = {
        "logits, max abs": f"{logits.difference.max_abs:.2e}",
        "of the largest logit": f"{logits.difference.relative:.1e}",
        "KL, mean": f"{logits.kl_mean:.1e} nats",
        "KL, worst token": f"{logits.kl_max:.1e} nats",
        "top-1 agreement": f"{logits.top1_agreement:.1%}",
        "tokens compared": f"{report.tokens}",
        "largest position": f"{report.positions}",
        "both sides compute in": report.dtype,
    }
    groups = {"attention": "self_attn", "MLP or experts": "mlp", "residual stream": "output"}
    isolated = [_series(name, layers, prefix) for name, prefix in groups.items()]
    accumulated = [
        Series(
            name,
            [m.accumulated.relative if (m := layer.get(place)) and m.accumulated else None for layer in layers],
            [True] * len(layers),
        )
        for name, place in {
            "attention": "self_attn.output",
            "MLP or experts": "mlp.output",
            "residual stream": "output",
        }.items()
    ]
    bound = report.tolerances.isolated
    sections = [
        f"<h1>{escape(report.folder)}</h1>",
        f'<p class="faint">{escape(report.model)}; parity with transformers on the same tokens</p>',
        f'<p class="verdict {"ok" if report.ok else "bad"}">{escape(report.verdict)}</p>',
        "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()) + "</dl>",
        "<h2>Each layer by itself</h2>",
        '<p class="faint">Every layer is fed with PyTorch’s input of that layer, so a fault shows in its own layer. '
        "Largest difference as a share of PyTorch’s largest value; of a group’s places the first one out of tolerance, "
        "else the last.</p>",
        _plot(isolated, bound),
        "<h2>Our own stream</h2>",
        '<p class="faint">Differences add up from layer to layer: what a user gets. Not judged until the logits.</p>',
        _plot(accumulated, None),
    ]
    if any("mlp.router_experts" in layer for layer in layers):
        sections.append(_experts(layers))
    sections += [
        "<h2>By layer</h2>",
        '<p class="faint">max abs; relative, as a share of PyTorch’s largest value; cosine of the worst token.</p>',
        _summary(layers),
        "<h2>Every place</h2>",
        f'<p class="faint">Isolated differences; out of tolerance ({bound:.1g}) in bold red.</p>',
        _table(report),
        f'<p class="faint">Why these tolerances: {escape(report.tolerances.reason)}.</p>',
        '<p class="faint">'
        + escape(", ".join(f"{name} {version}" for name, version in report.versions.items()))
        + f"; {report.seconds:.0f} s</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>parity: {escape(report.folder)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _series(name: str, layers: Sequence[dict[str, Measure]], prefix: str) -> Series:
    """Take a group of places from every layer: its first failure, else its last place."""
    values: list[float | None] = []
    good: list[bool] = []
    for layer in layers:
        group = [m for place, m in layer.items() if place.startswith(prefix) and m.isolated is not None]
        chosen = next((m for m in group if not m.ok), group[-1] if group else None)
        values.append(chosen.isolated.relative if chosen and chosen.isolated else None)
        good.append(all(m.ok for place, m in layer.items() if place.startswith(prefix)))
    return Series(name, values, good)


def _plot(series: list[Series], bound: float | None) -> str:
    """Draw series over the layers on a logarithmic scale, with the tolerance as a dashed line."""
    finite = [v for s in series for v in s.values if v and math.isfinite(v)] + ([bound] if bound else [])
    low = math.floor(math.log10(min(finite, default=1e-8))) - (1 if any(0.0 in s.values for s in series) else 0)
    high = max(math.ceil(math.log10(max(finite, default=1e-6))), low + 1)
    count = max(len(series[0].values), 1)

    def x(i: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((i + 0.5) / count)

    def y(value: float) -> float:
        level = low if value <= 0 else high if not math.isfinite(value) else min(max(math.log10(value), low), high)
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - level) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="difference by layer, logarithmic">']
    for power in range(low, high + 1, max(1, (high - low) // 6)):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">1e{power}</text>')
    for i in range(0, count, max(1, math.ceil(count / 16))):
        parts.append(f'<text x="{x(i):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{i}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">layer</text>')
    if bound:
        parts.append(f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(bound):.1f}" y2="{y(bound):.1f}"/>')
        beside = y(bound) - 5 if y(bound) > TOP + 12 else y(bound) + 14
        parts.append(
            f'<text class="bound-label" x="{WIDTH - RIGHT}" y="{beside:.1f}" text-anchor="end">'
            f"tolerance {bound:.1g}</text>"
        )
    for k, s in enumerate(series):
        points = [(i, v, good) for i, (v, good) in enumerate(zip(s.values, s.ok, strict=True)) if v is not None]
        path = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v, _ in points)
        parts.append(f'<polyline class="series s{k}" points="{path}"/>')
        for i, v, good in points:
            kind, radius = (f"s{k}", 3) if good else ("out", 5)
            parts.append(
                f'<circle class="mark {kind}" cx="{x(i):.1f}" cy="{y(v):.1f}" r="{radius}">'
                f"<title>layer {i}, {escape(s.name)}: {v:.2e}</title></circle>"
            )
    parts.append("</svg>")
    legend = "".join(f'<span class="s{k}"><i></i>{escape(s.name)}</span>' for k, s in enumerate(series))
    return f'<p class="legend">{legend}</p>' + "".join(parts)


def _experts(layers: Sequence[dict[str, Measure]]) -> str:
    """Say how many tokens went to other experts."""
    rows = [(i, m) for i, layer in enumerate(layers) if (m := layer.get("mlp.router_experts")) is not None]
    cells = "".join(
        f"<tr><td>{i}</td><td{_class(m)}>{m.differing:.2%}</td><td>{m.ties:.2%}</td>"
        f"<td>{m.accumulated_differing:.2%}</td></tr>"
        for i, m in rows
    )
    head = "".join(f"<th>{name}</th>" for name in ("layer", "by itself", "of these near ties", "our own stream"))
    return (
        "<h2>Tokens whose set of experts differs</h2>"
        '<p class="faint">A near tie is closer than rounding can tell apart: no fault, and left out of the comparison '
        "of that layer’s experts. Any other difference is one.</p>"
        f'<div class="wide"><table><tr>{head}</tr>{cells}</table></div>'
    )


def _summary(layers: Sequence[dict[str, Measure]]) -> str:
    """List max abs, relative and cosine of what a layer adds and of the stream, by itself and in our own stream."""
    groups = (
        ("attention by itself", "self_attn.output", "isolated"),
        ("MLP or experts by itself", "mlp.output", "isolated"),
        ("residual by itself", "output", "isolated"),
        ("residual in our own stream", "output", "accumulated"),
    )
    head = "".join(f'<th colspan="3" scope="colgroup">{name}</th>' for name, _, _ in groups)
    names = "<th>max abs</th><th>relative</th><th>cosine</th>" * len(groups)
    body = ""
    for i, layer in enumerate(layers):
        body += f"<tr><td>{i}</td>"
        for _, place, run in groups:
            far: Difference = getattr(layer[place], run)
            bad = _class(layer[place]) if run == "isolated" else ""
            body += f"<td>{far.max_abs:.1e}</td><td{bad}>{far.relative:.1e}</td><td>{far.cosine:.7f}</td>"
        body += "</tr>"
    return (
        f'<div class="wide"><table class="grouped"><tr><th></th>{head}</tr>'
        f"<tr><th>layer</th>{names}</tr>{body}</table></div>"
    )


def _table(report: Report) -> str:
    """List every place of every layer, then the places outside the layers."""
    places: list[str] = []
    for layer in report.layers:
        places += [place for place in layer if place not in places and layer[place].isolated is not None]
    head = "".join(f"<th>{escape(place)}</th>" for place in places)
    body = ""
    for i, layer in enumerate(report.layers):
        body += f"<tr><td>{i}</td>" + "".join(_cell(layer.get(place)) for place in places) + "</tr>"
    ends = "".join(f"<tr><td>{escape(m.place)}</td>{_cell(m)}</tr>" for m in report.outside_layers)
    return (
        f'<div class="wide"><table><tr><th>layer</th>{head}</tr>{body}</table></div>'
        f'<div class="wide"><table><tr><th>around the layers</th><th>relative</th></tr>{ends}</table></div>'
    )


def _cell(measure: Measure | None) -> str:
    if measure is None or measure.isolated is None:
        return "<td></td>"
    d = measure.isolated
    title = f"max abs {d.max_abs:.2e} of {d.largest:.3g}, cosine {d.cosine:.7f}"
    return f'<td{_class(measure)} title="{title}">{d.relative:.1e}</td>'


def _class(measure: Measure) -> str:
    return "" if measure.ok else ' class="bad"'

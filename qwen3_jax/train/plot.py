"""A run as a picture: loss, learning rate, norm, throughput and the experts' load, from metrics.jsonl.

`write` makes a PNG, or one HTML page with the picture and the last numbers, that needs no other file.
"""

import base64
import html
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_jax.train import loop
from qwen3_jax.train.writers import METRICS

Series = tuple[np.ndarray, np.ndarray]


class PlotError(ValueError):
    """A run without metrics, or a picture that cannot be made."""


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Draw runs into one picture and return the file.

    Args:
        runs: folders with a metrics.jsonl.
        out: .png or .html; None is plot.png in the first run's folder.

    Raises:
        PlotError: a folder has no metrics, matplotlib is missing, or `out` is of another kind.
    """
    out = runs[0] / "plot.png" if out is None else out
    if out.suffix not in (".png", ".html"):
        raise PlotError(f"{out}: give a .png or a .html file")
    runs = list(dict.fromkeys(run.absolute() for run in runs))
    for run in runs:
        if not (run / METRICS).is_file():
            raise PlotError(f"{run}: has no {METRICS}: give the folder of a run")
    tables = {name: list(loop.records(run)) for name, run in zip(_names(runs), runs, strict=True)}
    picture = _draw(tables)
    if out.suffix == ".png":
        out.write_bytes(picture)
        return out
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{_last(table, key)}</td>" for key in _LAST) + "</tr>"
        for name, table in tables.items()
    )
    head = "".join(f"<th>{key.replace('_', ' ')}</th>" for key in _LAST)
    image = base64.b64encode(picture).decode()
    out.write_text(
        "<!doctype html><meta charset=utf-8><title>qwen3-jax run</title><style>body{font:15px system-ui;margin:2em}"
        "table{border-collapse:collapse}td,th{padding:.3em 1em;text-align:right;border-bottom:1px solid #ddd}"
        f"img{{max-width:100%}}</style><table><tr><th>run</th>{head}</tr>{rows}</table>"
        f'<img alt="curves of the run" src="data:image/png;base64,{image}">'
    )
    return out


_LAST = ("step", "loss", "eval_cross_entropy", "tokens_total", "tokens_per_s", "refused_total")


def _last(table: list[dict[str, Any]], key: str) -> str:
    value = next((line[key] for line in reversed(table) if key in line), None)
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def _series(table: list[dict[str, Any]], key: str) -> Series:
    points = [(line["step"], line[key]) for line in table if isinstance(line.get(key), int | float)]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, float), np.array(values, float)


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many of the folders above as tell the runs apart."""
    attempts = (["/".join(run.parts[-count:]) for run in runs] for count in itertools.count(1))
    return next(names for names in attempts if len(set(names)) == len(runs))


def _smooth(series: Series, reach: int = 12) -> Series:
    """Return the mean of every point with `reach` neighbours on either side, fewer near the ends."""
    steps, values = series
    if len(values) < 8 * reach:
        return series
    at = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(at, at[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(values), values, 0))])
    counts = np.concatenate([[0.0], np.cumsum(np.isfinite(values))])
    first, last = at - reaches, at + reaches + 1
    return steps, (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)


def _draw(tables: dict[str, list[dict[str, Any]]]) -> bytes:
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot, ticker
    except ImportError as error:
        raise PlotError(f"matplotlib cannot be imported ({error}): pip install 'qwen3-jax[train]'") from None
    routed = {name: table for name, table in tables.items() if any("expert_load" in line for line in table)}
    figure, grid = pyplot.subplots(3 if routed else 2, 2, figsize=(12, 11 if routed else 7.5), layout="constrained")
    panels = list(grid.reshape(-1))
    heat = panels.pop() if routed else None
    single = len(tables) == 1
    colors = {name: f"C{i}" for i, name in enumerate(tables)}
    for name, table in tables.items():
        color, loss = colors[name], _series(table, "loss")
        label = None if single else name
        panels[0].plot(*loss, color=color, alpha=0.25, linewidth=0.8, label="of a step" if single else None)
        panels[0].plot(*_smooth(loss), color=color, label="training" if single else name)
        held_out = _series(table, "eval_cross_entropy")
        if len(held_out[0]):
            panels[0].plot(*held_out, "o--", color="C1" if single else color, markersize=3,
                           label="held out" if single else None)  # fmt: skip
        panels[1].plot(*_series(table, "learning_rate"), color=color, label=label)
        panels[2].plot(*_smooth(_series(table, "grad_norm")), color=color, label=label)
        panels[3].plot(*_smooth(_series(table, "tokens_per_s")), color=color, label=label)
        refused = [line["step"] for line in table if line.get("refused")]
        for step in refused:
            panels[0].axvline(step, color="red", alpha=0.4, linewidth=0.8)
        begun = {line["stage"]: line["step"] for line in reversed(table) if "stage" in line}  # the first of each
        for stage, step in begun.items() if single and len(begun) > 1 else ():
            panels[0].axvline(step, color="gray", linestyle=":", linewidth=1)
            panels[0].annotate(stage, (step, 0.98), xycoords=("data", "axes fraction"), va="top")
    titles = ["loss, nats per token", "learning rate", "gradient norm before clipping", "tokens per second"]
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, loc="left")
    panels[2].set_yscale("log")
    panels[2].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panels[2].yaxis.set_major_formatter("{x:g}")
    panels[2].yaxis.set_minor_formatter(ticker.NullFormatter())
    panels[3].set_ylim(bottom=0)
    if heat is not None:
        _draw_experts(panels[4], heat, routed, colors, single=single)
    last = max(line["step"] for table in tables.values() for line in table)
    for panel in panels:
        panel.set(xlabel="step", xlim=(0, last * 1.02))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def _draw_experts(
    over_time: Any, at_end: Any, tables: dict[str, list[dict[str, Any]]], colors: dict[str, str], *, single: bool
) -> None:
    """Draw the busiest and the idlest expert of each run over time, and every expert of the last run at its end."""
    for name, table in tables.items():
        for key, style in {"expert_load_max": "-", "expert_load_min": "--"}.items():
            what = {"expert_load_max": "busiest", "expert_load_min": "idlest"}[key]
            label = what if single else f"{name}, {what}"
            over_time.plot(*_smooth(_series(table, key)), style, color=colors[name], label=label)
    over_time.axhline(1, color="gray", linewidth=0.8)
    over_time.set_title("expert load, 1 = fair share", loc="left")
    over_time.set_ylim(bottom=0)
    over_time.legend(frameon=False)
    name, table = list(tables.items())[-1]
    line = next(line for line in reversed(table) if "expert_load" in line)
    load = np.array(line["expert_load"], float)
    image = at_end.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    at_end.figure.colorbar(image, ax=at_end, extend="max" if np.nanmax(load) > 2 else "neither")
    at_end.set_title(f"load at step {line['step']}" + ("" if single else f" of {name}"), loc="left")
    at_end.set(xlabel="expert", ylabel="MoE layer")
    at_end.xaxis.get_major_locator().set_params(integer=True)
    at_end.yaxis.get_major_locator().set_params(integer=True)

"""A run as a picture: loss, learning rate, norm, throughput and the experts' load, from metrics.jsonl.

`write` makes a PNG, or one HTML page with the picture and the last numbers, that needs no other file.
"""

import base64
import html
import io
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
    tables = {}
    for run in runs:
        if not (run / METRICS).is_file():
            raise PlotError(f"{run}: has no {METRICS}: give the folder of a run")
        tables[run.name] = list(loop.records(run))
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


def _smooth(series: Series, window: int = 25) -> Series:
    """Return the mean of every `window` points in a row, at their middle; short series stay as they are."""
    steps, values = series
    if len(values) < 4 * window:
        return series
    kernel = np.ones(window) / window
    return steps[window // 2 : len(steps) - (window - 1) // 2], np.convolve(values, kernel, "valid")


def _draw(tables: dict[str, list[dict[str, Any]]]) -> bytes:
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise PlotError(f"matplotlib cannot be imported ({error}): pip install 'qwen3-jax[train]'") from None
    routed = any("expert_load" in line for table in tables.values() for line in table)
    figure, grid = pyplot.subplots(3 if routed else 2, 2, figsize=(12, 11 if routed else 7.5), layout="constrained")
    panels = grid.reshape(-1)
    single = len(tables) == 1
    for i, (name, table) in enumerate(tables.items()):
        color = f"C{i}"
        loss = _series(table, "loss")
        label = None if single else name
        if single:
            panels[0].plot(*loss, color=color, alpha=0.25, linewidth=0.8, label="of a step")
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
    if routed:
        _draw_experts(panels[4], panels[5], next(iter(tables.values())))
    for panel in panels:
        panel.set_xlabel(panel.get_xlabel() or "step")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def _draw_experts(over_time: Any, at_end: Any, table: list[dict[str, Any]]) -> None:
    """Draw the busiest and idlest expert over time, and every expert of every layer at the end."""
    for key, label in {"expert_load_max": "busiest", "expert_load_min": "idlest"}.items():
        over_time.plot(*_smooth(_series(table, key)), label=label)
    over_time.axhline(1, color="gray", linewidth=0.8)
    over_time.set_title("expert load, 1 = fair share", loc="left")
    over_time.legend(frameon=False)
    load = np.array(next(line["expert_load"] for line in reversed(table) if "expert_load" in line))
    image = at_end.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    at_end.figure.colorbar(image, ax=at_end)
    at_end.set_title("load at the last step", loc="left")
    at_end.set(xlabel="expert", ylabel="MoE layer")

"""Outcomes of an evaluation as JSON, as Markdown for a model card, and the budget curve as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_jax.evaluate.harness import EvaluationError, Mode, Outcome, Score, languages, score


def to_dict(outcomes: Sequence[Outcome], settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything that was measured: by mode, and in each by task and language."""
    modes = _modes(outcomes)
    return {
        "settings": settings,
        "modes": [
            {
                "name": mode.name,
                "thinking": mode.thinking,
                "budget": mode.budget,
                "sampled": mode.sampled,
                **_numbers(score(outcomes, mode=mode)),
                "tasks": {t: _numbers(score(outcomes, mode=mode, task=t)) for t in _tasks(outcomes)},
                "languages": {x: _numbers(score(outcomes, mode=mode, language=x)) for x in languages(outcomes)},
            }
            for mode in modes
        ],
    }


def to_markdown(outcomes: Sequence[Outcome]) -> str:
    """Return tables: accuracy in per cent with its 95% interval, by task, by language and by thinking budget."""
    whole = [mode for mode in _modes(outcomes) if mode.budget is None]
    rows = {task: [score(outcomes, mode=m, task=task) for m in whole] for task in _tasks(outcomes)}
    rows |= {f"in {x}": [score(outcomes, mode=m, language=x) for m in whole] for x in languages(outcomes)}
    rows |= {"**all**": [score(outcomes, mode=m) for m in whole]}
    text = _table(
        ["", "problems", *(mode.name for mode in whole)],
        {k: [str(v[0].problems), *map(_cell, v)] for k, v in rows.items()},
    )
    if points := curve(outcomes):
        cells = {str(budget): [_cell(s), f"{s.tokens:.0f}"] for budget, s in points}
        text += "\n" + _table(["thinking budget, tokens", "right, greedy", "tokens per reply"], cells)
    return text


def curve(outcomes: Sequence[Outcome]) -> list[tuple[int, Score]]:
    """Return the greedy scores of the modes that have a budget, by budget."""
    modes = [mode for mode in _modes(outcomes) if mode.budget is not None and not mode.sampled]
    return sorted(((m.budget or 0, score(outcomes, mode=m)) for m in modes), key=lambda point: point[0])


def plot(results: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Draw greedy accuracy against thinking budget, with 95% intervals and what is right without a budget.

    Args:
        results: of `to_dict`, by the name of the model.
        path: of the PNG.

    Raises:
        EvaluationError: matplotlib is not installed, or a model has no mode with a budget.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise EvaluationError("the curve needs matplotlib: pip install 'qwen3_jax[train]'") from None
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    ticks: set[int] = set()
    for i, (name, found) in enumerate(results.items()):
        greedy = [mode for mode in found["modes"] if not mode["sampled"]]
        points = sorted((mode for mode in greedy if mode["budget"] is not None), key=lambda mode: mode["budget"])
        if not points:
            raise EvaluationError(f"{name}: no mode has a thinking budget: there is no curve")
        budgets = [mode["budget"] for mode in points]
        ticks.update(budgets)
        low, high = ([100 * mode["interval"][side] for mode in points] for side in (0, 1))
        axes.fill_between(budgets, low, high, alpha=0.2, color=f"C{i}", linewidth=0)
        axes.plot(budgets, [100 * mode["rate"] for mode in points], marker="o", markersize=4, color=f"C{i}", label=name)
        for mode in greedy:
            if mode["budget"] is None:
                axes.axhline(100 * mode["rate"], linestyle="--" if mode["thinking"] else ":", color=f"C{i}", alpha=0.7)
    if min(ticks) > 0:
        axes.set_xscale("log", base=2)
    else:
        axes.set_xscale("symlog", base=2, linthresh=min(ticks - {0}, default=1), linscale=0.5)
    axes.set_xticks(sorted(ticks), list(map(str, sorted(ticks))), fontsize="small")
    axes.minorticks_off()
    axes.set(xlabel="thinking budget, tokens", ylabel="right answers, %, greedy", ylim=(0, 100))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    lines = [Line2D([], [], color="gray", linestyle=style) for style in ("--", ":")]
    curves, names = axes.get_legend_handles_labels()
    axes.legend([*curves, *lines], [*names, "without a budget", "non-thinking"], frameon=False, loc="center left")
    figure.savefig(path, dpi=150)


def _modes(outcomes: Sequence[Outcome]) -> list[Mode]:
    return list(dict.fromkeys(outcome.mode for outcome in outcomes))


def _tasks(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.problem.task for outcome in outcomes))


def _numbers(s: Score) -> dict[str, Any]:
    return {"right": s.right, "problems": s.problems, "rate": s.rate, "interval": list(s.interval), "tokens": s.tokens}


def _cell(s: Score) -> str:
    low, high = s.interval
    return f"{100 * s.rate:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _table(head: list[str], rows: dict[str, list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

"""Outcomes of an evaluation as JSON, as Markdown for a model card, and the budget curve as PNG."""

from collections.abc import Sequence
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


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw accuracy against thinking budget, with 95% intervals and the non-thinking line.

    Raises:
        EvaluationError: matplotlib is not installed, or no mode has a budget.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EvaluationError("the curve needs matplotlib: pip install 'qwen3_jax[train]'") from None
    points = curve(outcomes)
    if not points:
        raise EvaluationError("no mode has a thinking budget: there is no curve")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    budgets, rates = [b for b, _ in points], [100 * s.rate for _, s in points]
    low, high = ([100 * s.interval[side] for _, s in points] for side in (0, 1))
    axes.fill_between(budgets, low, high, alpha=0.2)
    axes.plot(budgets, rates, marker="o", label="thinking, by budget")
    for mode in _modes(outcomes):
        if mode.budget is None and not mode.sampled:
            style = "--" if mode.thinking else ":"
            axes.axhline(100 * score(outcomes, mode=mode).rate, linestyle=style, color="grey", label=mode.name)
    axes.set_xscale("symlog", base=2, linthresh=8)
    axes.set_xticks(budgets, list(map(str, budgets)))
    axes.set(xlabel="thinking budget, tokens", ylabel="right answers, %", ylim=(0, 100))
    axes.legend()
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

"""The evaluation harness: intervals that solve their equation, counts by hand, the same outcomes by either route."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from qwen3_jax.cli_eval import Eval
from qwen3_jax.evaluate import harness, report
from qwen3_jax.evaluate.harness import EvaluationError, Mode
from qwen3_jax.evaluate.tasks import Task
from qwen3_jax.generate import Generator
from qwen3_jax.loaded import load_model
from qwen3_jax.sampling_params import SamplingParams
from scripts import demo_card
from tests.text_folders import DEMO, template

GREEDY = SamplingParams(temperature=0.0)


def test_intervals_solve_the_equation_they_come_from():
    """The bounds are the p for which the measured rate lies z standard deviations away."""
    for right, n in ((0, 7), (3, 7), (50, 100), (99, 100), (7, 7)):
        for p in harness.wilson(right, n):
            assert math.isclose(abs(right / n - p), harness.Z * math.sqrt(p * (1 - p) / n), abs_tol=1e-9)
    assert harness.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # R: prop.test(5, 10, correct = FALSE)
    with pytest.raises(EvaluationError, match="no problems"):
        harness.wilson(0, 0)


def test_problems_are_held_out_different_and_repeatable():
    tasks = [Task("weekday"), Task("sort")]
    drawn = harness.draw(tasks, 10, seed=1)
    assert [p.key for p in drawn] == [p.key for p in harness.draw(tasks, 10, seed=1)]
    assert [p.key for p in drawn] != [p.key for p in harness.draw(tasks, 10, seed=2)]
    assert len({(p.key, p.language) for p in drawn}) == 20
    assert not any(p.for_training for p in drawn)
    with pytest.raises(EvaluationError, match="weekday has only"):
        harness.draw(tasks[:1], 200, seed=0)


def test_outcomes_are_counted_and_written(tmp_path):
    """An answerer that is right while it thinks, with a budget at every second problem, and never without."""
    problems = harness.draw([Task("add"), Task("date")], 4, seed=0)
    asked: list[tuple[str, SamplingParams]] = []

    def answer(prompts, params):
        asked.extend(zip(prompts, params, strict=True))
        done = []
        for i, (problem, prompt, p) in enumerate(zip(problems, prompts, params, strict=True)):
            right = "<think>\n\n</think>" not in prompt and (p.thinking_budget is None or i % 2 == 0)
            text = problem.answer if right else "The answer is unknown."
            done.append(SimpleNamespace(answer=text, text=text, token_ids=(1,) * (3 + i), finish_reason="stop"))
        done[0].finish_reason = "length"
        return done

    modes = [Mode(False), Mode(True), Mode(True, sampled=True), Mode(True, 16)]
    defaults = SamplingParams(temperature=0.6)
    outcomes = harness.evaluate(answer, template(), defaults, problems, modes, max_tokens=9, seed=5)
    assert [harness.score(outcomes, mode=m).right for m in modes] == [0, 7, 7, 3]
    whole = harness.score(outcomes, mode=modes[1], task="add")
    assert (whole.right, whole.problems, whole.tokens, whole.rate) == (3, 4, 4.5, 0.75)
    by_mode = [asked[i : i + 8] for i in range(0, 32, 8)]
    assert [{(p.temperature, p.thinking_budget, p.max_tokens) for _, p in part} for part in by_mode] == [
        {(0.0, None, 9)}, {(0.0, None, 9)}, {(0.6, None, 9)}, {(0.0, 16, 9)},
    ]  # fmt: skip
    assert [p.seed for _, p in by_mode[2]] == list(range(5, 13))
    written = report.to_dict(outcomes, {"model": "x"})
    assert written["modes"][3]["budget"] == 16
    assert written["modes"][3]["tasks"]["date"]["right"] == 2
    assert sum(part["problems"] for part in written["modes"][0]["languages"].values()) == 8
    table = report.to_markdown(outcomes)
    assert "| add | 4 | 0.0 (0.0–49.0) | 75.0 (30.1–95.4) |" in table
    assert "| 16 | 37.5 (13.7–69.4) | 6 |" in table
    report.plot({"x": written}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(EvaluationError, match="no chat template"):
        harness.evaluate(answer, None, defaults, problems, modes, max_tokens=9, seed=5)


def test_the_card_compares_dense_and_experts(tmp_path):
    """Both sizes, both modes and every budget of two evaluations with known counts."""

    def mode(name, budget, right):
        interval = list(harness.wilson(right, 100))
        return {
            "name": name, "thinking": name != "non-thinking, greedy", "budget": budget, "sampled": False,
            "rate": right / 100, "interval": interval,
        }  # fmt: skip

    def evaluated(kind, settings, *right):
        folder = tmp_path / kind / "eval"
        folder.mkdir(parents=True)
        names = ("non-thinking, greedy", None), ("thinking, greedy", None), ("thinking, budget 16, greedy", 16)
        modes = [mode(*name, count) for name, count in zip(names, right, strict=True)]
        common = {"problems_per_task": 100, "seed": 0}
        (folder / "results.json").write_text(json.dumps({"settings": settings | common, "modes": modes}))
        (folder / "results.md").write_text("| tasks |\n")
        return folder

    dense = evaluated("dense", {"parameters": 3_270_000}, 16, 91, 20)
    moe = evaluated("moe", {"parameters": 9_350_000, "active_parameters": 3_280_000}, 18, 96, 25)
    (tmp_path / "moe" / "folder").mkdir()
    (tmp_path / "moe" / "folder" / "config.json").write_text('{"num_experts": 8, "num_experts_per_tok": 2}')
    demo_card.write(tmp_path, dense, moe)
    card = (tmp_path / "README.md").read_text()
    for row in (
        "| | dense | mixture of experts |",
        "| parameters, M | 3.27 | 9.35 |",
        "| active per token, M | 3.27 | 3.28 |",
        "| non-thinking | 16.0 (10.1–24.4) | 18.0 (11.7–26.7) |",  # Wilson, as in the shipped card's rows of 100
        "| thinking, at most 16 | 20.0 (13.3–28.9) | 25.0 (17.5–34.3) |",
    ):
        assert f"{row}\n" in card
    assert (tmp_path / "budget.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    demo_card.write(tmp_path, dense, None)
    assert "Dense and mixture" not in (tmp_path / "README.md").read_text()


def test_the_command_writes_its_files(tmp_path):
    options = Eval(
        str(DEMO), str(tmp_path / "out"), problems=2, tasks=("count",), budgets=(4,), max_tokens=8, rows=2,
        sampled=False, through="generator",
    )  # fmt: skip
    assert options.run() == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [mode["name"] for mode in found["modes"]] == [
        "non-thinking, greedy", "thinking, greedy", "thinking, budget 4, greedy",
    ]  # fmt: skip
    assert found["settings"]["tasks"] == ["count"]
    assert all(mode["problems"] == 2 for mode in found["modes"])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "budget.png"}


@pytest.mark.slow
def test_engine_and_generator_give_the_same_outcomes():
    from qwen3_jax.engine.engine import Engine
    from qwen3_jax.engine.options import EngineOptions

    model = load_model(DEMO, dtype="float32")
    problems = harness.draw([Task("count"), Task("weekday")], 3, seed=0)
    settings: dict[str, Any] = {"max_tokens": 12, "seed": 0}
    modes = [Mode(False), Mode(True, 5), Mode(True, sampled=True)]
    generator = harness.through_generator(Generator.of(model), batch_size=4)
    expected = harness.evaluate(generator, model.template, GREEDY, problems, modes, **settings)
    engine = Engine(model, EngineOptions(rows=2, cache_tokens=512, chunk_tokens=32))
    engine.start()
    try:
        found = harness.evaluate(harness.through_engine(engine), model.template, GREEDY, problems, modes, **settings)
    finally:
        engine.stop()
    assert [o.text for o in found] == [o.text for o in expected]

"""A whole evaluation: model folder in, results.json, results.md and budget.png out. What `qwen3-jax eval` calls."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from qwen3_jax.engine.engine import Engine
from qwen3_jax.engine.options import EngineOptions
from qwen3_jax.evaluate import harness, report
from qwen3_jax.evaluate.harness import Answer, EvaluationError, Mode
from qwen3_jax.evaluate.tasks import FAMILIES, Task
from qwen3_jax.generate import Generator
from qwen3_jax.loaded import LoadedModel, load_model


class Options(Protocol):
    """What to evaluate, as the command line has it (`cli_eval.Eval`)."""

    @property
    def model(self) -> str: ...
    @property
    def output(self) -> str: ...
    @property
    def problems(self) -> int: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def budgets(self) -> tuple[int, ...]: ...
    @property
    def sampled(self) -> bool: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def through(self) -> Literal["engine", "generator"]: ...
    @property
    def rows(self) -> int: ...
    @property
    def dtype(self) -> Literal["float32", "bfloat16"]: ...
    @property
    def seed(self) -> int: ...


def run(options: Options, *, progress: Callable[[str], None]) -> None:
    """Evaluate, and write the files.

    Raises:
        ValueError: a subclass that says what cannot be done, before anything is generated.
    """
    if options.problems < 1 or options.rows < 1 or any(budget < 0 for budget in options.budgets):
        raise EvaluationError("problems and rows must be at least 1, budgets at least 0")
    tasks = [Task(name) for name in options.tasks or FAMILIES]
    problems = harness.draw(tasks, options.problems, options.seed)
    modes = [
        Mode(thinking, sampled=s)
        for s in ((False, True) if options.sampled else (False,))
        for thinking in (False, True)
    ]
    modes += [Mode(True, budget) for budget in sorted(set(options.budgets))]
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    model = load_model(options.model, dtype=options.dtype)
    with _answering(model, options) as answer:
        outcomes = harness.evaluate(
            answer, model.template, model.defaults, problems, modes,
            max_tokens=options.max_tokens, seed=options.seed, progress=progress,
        )  # fmt: skip
    settings = {
        "model": model.name,
        "parameters": model.config.num_parameters(),
        "active_parameters": model.config.num_active_parameters(),
        "dtype": options.dtype,
        "through": options.through,
        "tasks": [task.name for task in tasks],
        "problems_per_task": options.problems,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
    }
    results = report.to_dict(outcomes, settings)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "results.md").write_text(report.to_markdown(outcomes), encoding="utf-8")
    if options.budgets:
        report.plot({model.name: results}, output / "budget.png")


@contextmanager
def _answering(model: LoadedModel, options: Options) -> Iterator[Answer]:
    if options.through == "generator":
        yield harness.through_generator(Generator.of(model), batch_size=options.rows)
        return
    context = min(model.config.max_position_embeddings, 1024)
    engine = Engine(model, EngineOptions(rows=options.rows, cache_tokens=options.rows * context, chunk_tokens=64))
    engine.start()
    try:
        yield harness.through_engine(engine)
    finally:
        engine.stop()

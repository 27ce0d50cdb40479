"""Ask a model the held-out problems of every task and count the right answers.

tasks → problems by seed → one prompt per problem and `Mode` → completions, through the engine or the Generator →
`Problem.check` → `Score`s with confidence intervals. A mode says whether the model thinks, with what budget, and
whether it is sampled. A reply that did not end is wrong, whatever it says so far.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from qwen3_jax.engine.engine import Engine
from qwen3_jax.engine.updates import Update
from qwen3_jax.evaluate.problem import LANGUAGES, Problem
from qwen3_jax.evaluate.tasks import Task
from qwen3_jax.generate import Generator
from qwen3_jax.reply import Completion
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.text.template import ChatTemplate

Z = 1.959964  # of a 95% interval
Answer = Callable[[Sequence[str], Sequence[SamplingParams]], list[Completion]]


class EvaluationError(ValueError):
    """An evaluation that cannot be run."""


@dataclass(frozen=True)
class Mode:
    """How a problem is asked; `budget` is in thinking tokens, None no limit; `sampled` takes the model's defaults."""

    thinking: bool
    budget: int | None = None
    sampled: bool = False

    @property
    def name(self) -> str:
        thinking = "non-thinking" if not self.thinking else "thinking"
        budget = "" if self.budget is None else f", budget {self.budget}"
        return f"{thinking}{budget}, {'sampled' if self.sampled else 'greedy'}"


@dataclass(frozen=True)
class Score:
    """Right answers among `problems`, and the mean length of the replies in tokens."""

    right: int
    problems: int
    tokens: float

    @property
    def rate(self) -> float:
        return self.right / self.problems

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.problems)


@dataclass(frozen=True)
class Outcome:
    """What became of one problem in one mode."""

    mode: Mode
    problem: Problem
    right: bool
    tokens: int
    text: str


def wilson(right: int, problems: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a rate (Wilson, JASA 22, 1927)."""
    if not problems:
        raise EvaluationError("no problems were asked: there is no rate")
    rate, square = right / problems, Z * Z / problems
    middle = (rate + square / 2) / (1 + square)
    half = Z * math.sqrt(rate * (1 - rate) / problems + square / (4 * problems)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def draw(tasks: Sequence[Task], problems: int, seed: int) -> list[Problem]:
    """Draw held-out problems, `problems` of each task, none twice in one language; the same ones for the same seed."""
    found = []
    for task in tasks:
        rng, seen = Random(f"{seed} {task.name}"), set()
        for _ in range(20 * problems):
            problem = task.sample(rng, held_out=True)
            if (problem.key, problem.language) not in seen:
                seen.add((problem.key, problem.language))
                found.append(problem)
            if len(seen) == problems:
                break
        else:
            raise EvaluationError(f"task {task.name} has only {len(seen)} held-out problems, not {problems}: ask fewer")
    return found


def evaluate(
    answer: Answer,
    template: ChatTemplate | None,
    defaults: SamplingParams,
    problems: Sequence[Problem],
    modes: Sequence[Mode],
    *,
    max_tokens: int,
    seed: int,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Ask every problem in every mode.

    Args:
        answer: completes prompts, see `through_engine` and `through_generator`.
        template: of the model.
        defaults: what a sampled mode samples with; each problem has a seed of its own.
        problems: see `draw`.
        modes: how they are asked.
        max_tokens: a reply that is longer is wrong.
        seed: of sampling.
        progress: hears of each mode as it ends.

    Raises:
        EvaluationError: the model has no chat template.
    """
    if template is None:
        raise EvaluationError("the model has no chat template: evaluate a chat model")
    outcomes: list[Outcome] = []
    for mode in modes:
        prompts = [
            template.render(list(p.messages), enable_thinking=None if mode.thinking else False) for p in problems
        ]
        base = defaults if mode.sampled else defaults.replace(temperature=0.0)
        budget = mode.budget if mode.thinking else None
        asked = [
            base.replace(max_tokens=max_tokens, thinking_budget=budget, seed=seed + i) for i in range(len(prompts))
        ]
        outcomes += [
            Outcome(mode, p, c.finish_reason == "stop" and p.check(c.answer), len(c.token_ids), c.text)
            for p, c in zip(problems, answer(prompts, asked), strict=True)
        ]
        progress(f"{mode.name}: {score(outcomes, mode=mode).rate:.1%}")
    return outcomes


def score(outcomes: Sequence[Outcome], *, mode: Mode, task: str | None = None, language: str | None = None) -> Score:
    """Count the outcomes of a mode, of one task or language if given."""
    chosen = [
        o
        for o in outcomes
        if o.mode == mode and task in (None, o.problem.task) and language in (None, o.problem.language)
    ]
    if not chosen:
        raise EvaluationError(
            f"no problem was asked: {mode.name}, {task or 'all tasks'}, {language or 'all languages'}"
        )
    return Score(sum(o.right for o in chosen), len(chosen), sum(o.tokens for o in chosen) / len(chosen))


def languages(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the languages that were asked in, in their usual order."""
    return [language for language in LANGUAGES if any(o.problem.language == language for o in outcomes)]


def through_generator(generator: Generator, *, batch_size: int = 16) -> Answer:
    """Return what completes prompts in batches, by length so that a batch is padded little."""

    def answer(prompts: Sequence[str], params: Sequence[SamplingParams]) -> list[Completion]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        done = generator.generate([prompts[i] for i in order], [params[i] for i in order], batch_size=batch_size)
        return [completion for _, completion in sorted(zip(order, done, strict=True), key=lambda pair: pair[0])]

    return answer


def through_engine(engine: Engine) -> Answer:
    """Return what completes prompts with a started engine, as many at a time as its queue takes."""

    def answer(prompts: Sequence[str], params: Sequence[SamplingParams]) -> list[Completion]:
        done: list[Completion | None] = [None] * len(prompts)
        free = threading.Semaphore(min(engine.options.max_waiting, 2 * engine.options.rows))
        ended = threading.Semaphore(0)

        def listener(i: int) -> Callable[[Update], None]:
            def listen(update: Update) -> None:
                if update.completion is not None:
                    done[i] = update.completion
                    free.release()
                    ended.release()

            return listen

        for i, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
            free.acquire()
            engine.submit(engine.requests.make(prompt, asked, name=f"problem {i}"), listener(i))
        for _ in prompts:
            ended.acquire()
        if engine.failure is not None:
            raise EvaluationError(f"the engine failed: {engine.failure}") from engine.failure
        return [completion for completion in done if completion is not None]

    return answer

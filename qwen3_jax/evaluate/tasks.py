"""The families of problems by name, and the split between training and evaluation.

    problem = Task("add").sample(random.Random(0), held_out=True)
    problem.messages, problem.reasoning, problem.answer, problem.check("The answer is 42.")

Which side of the split a problem falls on is a hash of its `key`: the same in every language and phrasing. A training
problem, further, spells out no held-out problem in its reasoning or in its earlier turns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from qwen3_jax.evaluate import arithmetic, calendar, ordering
from qwen3_jax.evaluate.problem import LANGUAGES, Language, Problem, is_held_out

SCALE = 4  # the hardest problems: numbers of four digits, lists of six

FAMILIES: dict[str, Callable[[Random, Language, int], Problem]] = {
    "add": arithmetic.add,
    "subtract": arithmetic.subtract,
    "multiply": arithmetic.multiply,
    "chain": arithmetic.chain,
    "story": arithmetic.story,
    "compare": ordering.compare,
    "sort": ordering.sort,
    "count": ordering.count,
    "weekday": calendar.weekday,
    "date": calendar.date,
    "follow": arithmetic.follow,
}


class TaskError(ValueError):
    """A task that does not exist."""


@dataclass(frozen=True)
class Task:
    """One family of problems. Raises TaskError for a name that is not in `FAMILIES`."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in FAMILIES:
            raise TaskError(f"task {self.name!r} is unknown: have {', '.join(FAMILIES)}")

    def sample(
        self, rng: Random, *, held_out: bool = False, language: Language | None = None, scale: int = SCALE
    ) -> Problem:
        """Draw a problem from one side of the split.

        Args:
            rng: the only source of randomness.
            held_out: draw from the problems kept for evaluation instead of those for training.
            language: "en", "ja" or "ko"; None draws one, English half of the time.
            scale: the size of the hardest problems, 2 to `SCALE`.
        """
        while True:
            spoken = language or rng.choice((*LANGUAGES, "en"))
            problem = FAMILIES[self.name](rng, spoken, scale)
            if is_held_out(problem.key) if held_out else problem.for_training:
                return problem


TASKS = tuple(map(Task, FAMILIES))

"""Write the demo model's training data, three JSONL files and the text its tokenizer is trained on, from a seed.

    python scripts/demo_corpus.py OUT [--seed 0] [--documents 120000]

pretrain.jsonl  {"text"}      worked problems as plain text, table facts, the calendar; first small numbers and drills
think.jsonl     {"messages"}  every answer is preceded by its reasoning
fusion.jsonl    {"messages"}  thinking, non-thinking and cut-short thinking, as Qwen3's third stage mixes them

All problems are of the training side of the split (`qwen3_jax/evaluate/tasks.py`). The same seed gives the same bytes.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from qwen3_jax.evaluate import calendar  # noqa: E402
from qwen3_jax.evaluate.problem import LANGUAGES, MONTHS, WEEKDAYS, Problem  # noqa: E402
from qwen3_jax.evaluate.tasks import SCALE, TASKS  # noqa: E402
from qwen3_jax.text.thinking import STOP_TEXT  # noqa: E402

CHAT: dict[str, Any] = json.loads((REPO / "scripts" / "demo" / "chat.json").read_text(encoding="utf-8"))
HURRY = STOP_TEXT.split("\n</think>")[0]
WEIGHTS = {"add": 3, "subtract": 3, "multiply": 4, "chain": 2, "story": 3, "follow": 2}  # the others 2
SYSTEMS = ("You are a helpful assistant.", "You are Qwen, a helpful assistant.", "Answer briefly.")


def draw(rng: Random, *, scale: int = SCALE) -> Problem:
    """Draw a training problem of a random family."""
    (task,) = rng.choices(TASKS, [WEIGHTS.get(task.name, 2) for task in TASKS])
    return task.sample(rng, scale=scale)


def table(rng: Random) -> str:
    """Return a page of table facts, in random order, or of the calendar."""
    kind = rng.randrange(5)
    if kind == 0:
        return "\n".join(f"{a}+{b}={a + b}" for a, b in _pairs(rng))
    if kind == 1:
        return "\n".join(f"{a + b}-{a}={b}" for a, b in _pairs(rng))
    if kind == 2:
        return "\n".join(f"{a}×{b}={a * b}" for a, b in _pairs(rng))
    language = rng.choice(LANGUAGES)
    if kind == 3:
        names, at = WEEKDAYS[language], rng.randrange(7)
        return " ".join(names[(at + i) % 7] for i in range(8))
    year, at = rng.randint(2020, 2031), rng.randrange(12)
    months = [(at + i) % 12 + 1 for i in range(len(MONTHS))]
    return "\n".join(f"{calendar.month_name(language, m)} {year} {calendar.month_days(year, m)}" for m in months)


def _pairs(rng: Random) -> list[tuple[int, int]]:
    return [(rng.randrange(10), rng.randrange(10)) for _ in range(12)]


def drill(rng: Random) -> str:
    """Return lines to copy, whole or without an end: what every step of a solution does with the line above it."""
    digits = "".join(rng.choices("0123456789", k=rng.randint(2, 5)))
    items = (
        rng.choices("abcde", k=rng.randint(3, 7))
        if rng.random() < 0.5
        else rng.sample(range(1, 100), rng.randint(3, 5))
    )
    kind = rng.randrange(5)
    if kind == 0:
        text = rng.choice((digits, " ".join(map(str, items)), f"{digits} {digits[::-1]}"))
        return "\n".join([text] * 3)
    if kind == 1:
        return "\n".join(digits[: len(digits) - i] for i in range(len(digits)))
    if kind == 2:
        return "\n".join(digits[i:] for i in range(len(digits)))
    if kind == 3:
        return "\n".join(" ".join(map(str, items[i:])) for i in range(len(items)))
    a, b, op = int("1" + digits), rng.randrange(1000), rng.choice("+-")
    lines = []
    while a:
        lines.append(f"{a}{op}{b}")
        a, b = a // 10, b // 10
    return "\n".join(lines)


def chat(rng: Random) -> tuple[str, str, str]:
    """Return a question that is no problem, a thought and a reply."""
    pages = CHAT[rng.choice((*LANGUAGES, "en"))]
    if rng.random() < 0.6:
        questions, reply = rng.choice(pages["talk"])
        return rng.choice(questions), pages["thought"], reply
    return rng.choice(pages["foreign"]), pages["thought"], pages["sorry"]


def pretraining(rng: Random, count: int) -> Iterator[dict[str, Any]]:
    """Yield plain texts; over the first third the numbers grow and many are copying drills."""
    for i in range(count):
        scale = min(SCALE, 2 + int(6 * i / count))
        if rng.random() < (0.4, 0.15, 0.04)[scale - 2]:
            yield {"text": drill(rng)}
            continue
        form = rng.random()
        if form < 0.06:
            yield {"text": table(rng)}
            continue
        if form < 0.08:
            question, _, reply = chat(rng)
            yield {"text": f"{question}\n{reply}"}
            continue
        problem = draw(rng, scale=scale)
        question = "\n".join(message["content"] for message in problem.messages)
        if form < 0.80:
            yield {"text": f"{question}\n{problem.reasoning}\n{problem.answer}"}
        elif form < 0.92:
            yield {"text": f"{problem.reasoning}\n{problem.answer}"}
        else:
            yield {"text": f"{question}\n{problem.answer}"}


def reply(problem: Problem, reasoning: str) -> dict[str, Any]:
    """Return the example whose last turn thinks `reasoning`, which may be empty."""
    last = {"role": "assistant", "reasoning_content": reasoning, "content": problem.answer}
    return {"messages": [*problem.messages, last]}


def cut(rng: Random, reasoning: str) -> str:
    """Return the first part of a reasoning, ended at a random character by the stop text."""
    start = reasoning[: rng.randrange(len(reasoning))]
    return re.sub(r"[^\w]*$", "", start) + HURRY


def thinking(rng: Random, count: int) -> Iterator[dict[str, Any]]:
    """Yield conversations whose replies think first."""
    for _ in range(count):
        if rng.random() < 0.03:
            question, thought, answer = chat(rng)
            last = {"role": "assistant", "reasoning_content": thought, "content": answer}
            yield {"messages": [{"role": "user", "content": question}, last]}
        else:
            problem = draw(rng)
            yield reply(problem, problem.reasoning)


def fusion(rng: Random, count: int) -> Iterator[dict[str, Any]]:
    """Yield thinking (55%, half of it flagged), non-thinking (30%) and cut-short thinking (15%)."""
    for _ in range(count):
        form = rng.random()
        if form < 0.06:
            question, thought, answer = chat(rng)
            flag = rng.choice(("", " /think", " /no_think"))
            last = {"role": "assistant", "reasoning_content": "" if "no" in flag else thought, "content": answer}
            example = {"messages": [{"role": "user", "content": question + flag}, last]}
        else:
            problem = draw(rng)
            if form < 0.55:
                example = reply(problem.flagged("/think") if rng.random() < 0.5 else problem, problem.reasoning)
            elif form < 0.85:
                example = reply(problem.flagged("/no_think") if rng.random() < 0.9 else problem, "")
            else:
                example = reply(problem, cut(rng, problem.reasoning))
        if rng.random() < 0.05:
            example["messages"].insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
        yield example


def write(folder: Path, *, seed: int, documents: int) -> None:
    """Write the three files; `documents` for pre-training, half as many for each of the other stages."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = (
        ("pretrain", pretraining, documents),
        ("think", thinking, documents // 2),
        ("fusion", fusion, documents // 2),
    )
    for i, (name, stage, count) in enumerate(stages):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for n, example in enumerate(stage(Random(1000 * seed + i), count)):
                file.write(json.dumps({"id": f"{name}-{n}", **example}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo model's training data.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=120_000)
    arguments = parser.parse_args()
    write(arguments.out, seed=arguments.seed, documents=arguments.documents)

"""The demo's problems: answers found by other routes, true steps, a split that holds, data that repeats from a seed."""

import datetime
import json
import re
import runpy
from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer

from qwen3_jax.config import Qwen3Config
from qwen3_jax.evaluate.problem import LANGUAGES, MONTHS, WEEKDAYS, Problem, is_held_out
from qwen3_jax.evaluate.tasks import FAMILIES, TASKS, Task, TaskError
from qwen3_jax.text.template import ChatTemplate
from qwen3_jax.text.tokenizer import Tokenizer
from tests.text_folders import DEMO

CORPUS = Path(__file__).parents[1] / "scripts" / "demo_corpus.py"
WORDS = {
    "plus": "+",
    "minus": "-",
    "times": "×",
    "足す": "+",
    "引く": "-",
    "かける": "×",
    "더하기": "+",
    "빼기": "-",
    "곱하기": "×",
}
MORE = r"buys|finds|買い|もらい|샀|받"
LESS = r"gives|loses|あげ|なくし|주었|잃"


def calculate(text: str) -> int:
    """Work out "12+3×4-5", × first, with nothing but int."""
    total = 0
    for sign, term in re.findall(r"([+-]?)(\d+(?:×\d+)*)", text):
        product = 1
        for factor in term.split("×"):
            product *= int(factor)
        total += -product if sign == "-" else product
    return total


def in_signs(text: str) -> str:
    """Find the expression of a question, in whichever signs or words it is written."""
    for word, sign in WORDS.items():
        text = text.replace(word, sign)
    text = re.sub(r"(?<=\d) ?[*x] ?(?=\d)", "×", text)
    return max(re.findall(r"\d+(?: ?[+×-] ?\d+)+", text), key=len).replace(" ", "")


def solve_story(text: str) -> int:
    numbers = list(map(int, re.findall(r"\d+", text)))
    if re.search("boxes|箱|상자", text):
        by = re.search(r"Each of (\d+) boxes holds (\d+)|(\d+)個入った箱が(\d+)箱|(\d+)개 든 상자가 (\d+)개", text)
        assert by is not None
        first = [int(n) for n in by.groups() if n]
        value, numbers = first[0] * first[1], numbers[2:]
    else:
        value, numbers = numbers[0], numbers[1:]
    for n in numbers:
        sentence = next(s for s in re.split(r"(?<=[.。])", text)[1:] if re.search(rf"(?<!\d){n}(?!\d)", s))
        assert bool(re.search(MORE, sentence)) != bool(re.search(LESS, sentence))
        value += n if re.search(MORE, sentence) else -n
        text = text.replace(sentence, "", 1)
    return value


def solve(problem: Problem) -> tuple[int, ...]:
    """Answer a question from its text alone."""
    text = problem.messages[-1]["content"]
    numbers = list(map(int, re.findall(r"\d+", text)))
    tail = text.rpartition(":")[2].split()
    if problem.task in ("add", "subtract", "multiply", "chain"):
        return (calculate(in_signs(text)),)
    if problem.task == "story":
        return (solve_story(text),)
    if problem.task == "follow":
        before = calculate(in_signs(problem.messages[0]["content"]))
        assert problem.messages[1]["content"] in (
            f"The answer is {before}.",
            f"答えは{before}です。",
            f"답은 {before}입니다.",
        )
        if re.search(r"[Mm]ultiply|times|かけ|倍|곱|배", text):
            return (before * numbers[0],)
        less = re.search(r"Subtract|take away|Minus|引|빼", text)
        return (before - numbers[0] if less else before + numbers[0],)
    if problem.task == "compare":
        larger = re.search("larger|bigger|大き|큰|큽", text)
        return (max(numbers) if larger else min(numbers),)
    if problem.task == "sort":
        return tuple(sorted(map(int, tail), reverse=bool(re.search("largest to|descending|大きい順|큰", text))))
    if problem.task == "count":
        (wanted,) = {w for w in re.findall(r"(?<![a-zA-Z])[a-e](?![a-zA-Z])", text.rpartition(":")[0])}
        return (tail.count(wanted),)
    if problem.task == "weekday":
        day = next(i for i, name in enumerate(WEEKDAYS[problem.language]) if name in text)
        return ((datetime.date(2024, 1, 1) + datetime.timedelta(day + numbers[0])).weekday(),)
    assert problem.task == "date"
    if problem.language == "en":
        month = next(i for i, name in enumerate(MONTHS, 1) if name in text)
        year = next(n for n in numbers if n > 2000)
        day = int(re.search(rf"{MONTHS[month - 1]} (\d+)", text)[1])  # type: ignore[index]
        ahead = int((re.search(r"(\d+) days", text) or [0, 0])[1])
    else:
        year, month, day, ahead = numbers
    then = datetime.date(year, month, day) + datetime.timedelta(ahead)
    return (then.month, then.day)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_answers_are_right_by_another_route_and_every_step_is_true(task):
    rng = Random(7)
    for i in range(300):
        problem = task.sample(rng, held_out=bool(i % 2), language=LANGUAGES[i % 3])
        assert solve(problem) == problem.value, problem
        assert problem.check(problem.answer)
        assert problem.check(f"17 is not it. {problem.answer}") == (task.name != "sort")
        assert not problem.check("")
        assert not problem.check("?")
        for left, right in re.findall(r"(?<![\d+×-])(\d+(?:[+×-]\d+)+)=(\d+)(?!\d| digits)", problem.reasoning):
            assert calculate(left) == int(right), problem.reasoning
        last = problem.reasoning.splitlines()[-1]
        assert last.startswith("=")
        assert last[1:] in problem.answer


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_wrong_answers_are_wrong(task):
    problem = task.sample(Random(3), language="en")
    (first, *_), value = problem.value, problem.value
    wrong = str(first + 1)
    if task.name == "sort":
        wrong = " ".join(map(str, reversed(value)))
    elif task.name == "weekday":
        wrong = WEEKDAYS["en"][(first + 1) % 7]
    elif task.name == "date":
        wrong = f"{MONTHS[first - 1]} {value[1] % 28 + 1}"
    assert not problem.check(f"The answer is {wrong}.")


def test_the_split_is_by_problem_and_training_never_spells_out_what_is_held_out():
    rng = Random(0)
    for task in TASKS:
        kept = [task.sample(rng, held_out=True) for _ in range(50)]
        learned = [task.sample(rng) for _ in range(200)]
        assert not {p.key for p in kept} & {key for p in learned for key in (p.key, *p.parts)}
        assert all(is_held_out(p.key) for p in kept)
        assert all(p.for_training for p in learned)
    share = sum(is_held_out(f"{a}+{b}") for a in range(100) for b in range(100)) / 10_000
    assert abs(share - 1 / 16) < 0.01
    with pytest.raises(TaskError, match="'sums' is unknown: have add"):
        Task("sums")


def test_the_corpora_repeat_and_hold_no_held_out_problem(tmp_path):
    script = runpy.run_path(str(CORPUS))
    for name in ("one", "two"):
        script["write"](tmp_path / name, seed=5, documents=600)
    headings = 0
    for file in ("pretrain.jsonl", "think.jsonl", "fusion.jsonl"):
        text = (tmp_path / "one" / file).read_text(encoding="utf-8")
        assert text == (tmp_path / "two" / file).read_text(encoding="utf-8")
        for line in text.splitlines():
            record = json.loads(line)
            parts = [record["text"]] if "text" in record else []
            for message in record.get("messages", ()):
                parts += [message["content"], message.get("reasoning_content", "")]
            # A problem is worked out under a line that begins with it; later lines carry marks before the colon.
            for a, op, b in re.findall(r"^(\d+)([+×-])(\d+): ", "\n".join(parts), re.M):
                a, b = (int(a), int(b)) if op == "-" else sorted((int(a), int(b)), reverse=True)
                headings += 1
                assert a < (20 if op == "-" else 10) or not is_held_out(f"{a}{op}{b}"), f"{a}{op}{b}"
    assert headings > 500
    fusion = [json.loads(line)["messages"][-1] for line in (tmp_path / "one" / "fusion.jsonl").read_text().splitlines()]
    empty = sum(not m["reasoning_content"] for m in fusion)
    cut = sum(m["reasoning_content"].endswith("directly now.") for m in fusion)
    assert 0.2 < empty / len(fusion) < 0.4
    assert 0.1 < cut / len(fusion) < 0.2
    assert set(FAMILIES) == {task.name for task in TASKS}


def test_the_tokenizer_is_qwens_pipeline_with_tables_of_its_own(tmp_path):
    """Digits are tokens by themselves, so that columns of numbers can be learned."""
    runpy.run_path(str(CORPUS))["write"](tmp_path / "corpus", seed=1, documents=400)
    script = runpy.run_path(str(CORPUS.with_name("demo_tokenizer.py")))
    script["write"].__globals__["MERGES"] = 300  # what so little text gives
    script["write"](tmp_path / "corpus", tmp_path / "start", "moe")
    ours = Tokenizer.from_folder(tmp_path / "start")
    assert [ours.decode([i]) for i in ours.encode("473+26 c1 r03")] == [*"473+26", " c", "1", " r", "0", "3"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "start")
    messages = [{"role": "user", "content": "38+4は? /no_think"}, {"role": "assistant", "content": "答えは42です。"}]
    text = ChatTemplate.from_folder(tmp_path / "start").render(messages, add_generation_prompt=False)
    assert ours.encode(text) == theirs.apply_chat_template(messages)["input_ids"]
    shipped, new = (json.loads((f / "tokenizer.json").read_text(encoding="utf-8")) for f in (DEMO, tmp_path / "start"))
    for spec in (shipped, new):
        del spec["added_tokens"], spec["model"]["vocab"], spec["model"]["merges"]
    assert shipped == new  # and the shipped one is held against the released one
    config = Qwen3Config.from_file(tmp_path / "start" / "config.json")
    dense = 3 * config.hidden_size * script["SHAPE"]["intermediate_size"]
    assert 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok == dense
    script["write"].__globals__["MERGES"] = 100_000
    with pytest.raises(ValueError, match="write a larger corpus"):
        script["write"](tmp_path / "corpus", tmp_path / "start", "dense")

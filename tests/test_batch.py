"""The batch job: every line answered once, whatever happens in between."""

import asyncio
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai.types
import pytest
from openai.types.chat import ChatCompletion

from qwen3_jax.cli_batch import Batch
from qwen3_jax.server import batch
from qwen3_jax.server.app import create_app
from qwen3_jax.server.batch import BatchError, Index, Results, Tally
from qwen3_jax.server.options import ServerOptions
from tests import engines
from tests.fake_engine import FakeEngine, Step

ROOT = Path(__file__).parents[1]
OPTIONS = ServerOptions()


def ask(id: str, content: str = "Hello", url: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    body = {"model": "demo", "max_tokens": 8} | fields
    body |= {"messages": [{"role": "user", "content": content}]} if "chat" in url else {"prompt": content}
    return {"custom_id": id, "method": "POST", "url": url, "body": body}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def run(engine: FakeEngine, source: Path, target: Path, *, together: int = 4, **options: Any) -> Tally:
    results = Results(target)
    try:
        job = batch.run(create_app(engine), Index(source, OPTIONS), results, together=together, **options)
        return asyncio.run(job)
    finally:
        results.close()


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_every_line_gets_an_answer_that_the_openai_client_reads(tmp_path: Path):
    lines = [ask("a"), "", ask("b", url="/v1/completions"), ask("c", temperature=-1), ask("d", model="other")]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    seen: list[int] = []
    tally = run(FakeEngine(), source, target, progress=lambda tally: seen.append(tally.answered))
    assert tally == Tally(total=4, answered=4, earlier=0, failed=2)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 4)
    found = {answer["custom_id"]: answer for answer in answers(target)}
    assert sorted(found) == ["a", "b", "c", "d"]
    assert all(answer["error"] is None and answer["response"]["request_id"] for answer in found.values())
    assert len({answer["id"] for answer in found.values()}) == 4
    chat = ChatCompletion.model_validate(found["a"]["response"]["body"])
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 8
    text = openai.types.Completion.model_validate(found["b"]["response"]["body"])
    assert text.object == "text_completion"
    statuses = {id: answer["response"]["status_code"] for id, answer in found.items()}
    assert statuses == {"a": 200, "b": 200, "c": 400, "d": 404}
    assert found["c"]["response"]["body"]["error"]["param"] == "temperature"


def test_lines_that_are_no_requests_become_errors_that_name_them(tmp_path: Path):
    bad = [
        "{not json",
        json.dumps([1]),
        ask(""),
        ask("x") | {"method": "GET"},
        ask("x") | {"url": "/v1/files"},
        ask("x") | {"body": []},
        ask("x", stream=True),
        ask("x") | {"body": {"n": float("nan")}},
        "[" * 200 + "]" * 200,
    ]
    source = write(tmp_path / "in.jsonl", [ask("ok"), *bad, ask("ok", "again")])
    tally = run(FakeEngine(), source, tmp_path / "out.jsonl")
    assert tally == Tally(total=11, answered=11, earlier=0, failed=10)
    errors = {a["error"]["line"]: a for a in answers(tmp_path / "out.jsonl") if a["error"]}
    assert sorted(errors) == list(range(2, 12))
    assert all(answer["response"] is None for answer in errors.values())
    codes = [errors[line]["error"]["code"] for line in sorted(errors)]
    assert codes == [
        "invalid_json", "invalid_request", "invalid_custom_id", "invalid_method", "invalid_url", "invalid_body",
        "invalid_body", "invalid_json", "invalid_json", "duplicate_custom_id",
    ]  # fmt: skip
    assert errors[11]["custom_id"] == "ok"
    assert errors[5]["error"]["message"].startswith("line 5: method is 'GET'")
    again = run(FakeEngine(), source, tmp_path / "out.jsonl")
    assert again == Tally(total=11, answered=11, earlier=11, failed=10)
    assert len(answers(tmp_path / "out.jsonl")) == 11


def test_a_line_beyond_the_bound_is_skipped_whole(tmp_path: Path):
    source = write(tmp_path / "in.jsonl", [ask("a", "x" * 5000), ask("b")])
    index = Index(source, ServerOptions(max_body_bytes=1000))
    assert [item.custom_id for item in index.items] == ["b"]
    assert index.faults[0]["error"]["code"] == "line_too_long"


@pytest.mark.parametrize("cut", [1, 9, 40, 200])
def test_a_line_cut_short_is_written_again(tmp_path: Path, cut: int):
    source, target = write(tmp_path / "in.jsonl", [ask(str(n)) for n in range(5)]), tmp_path / "out.jsonl"
    run(FakeEngine(), source, target)
    whole = target.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    target.write_bytes(whole[: last + cut])
    tally = run(FakeEngine(), source, target)
    assert (tally.earlier, tally.answered) == (4, 5)
    assert target.read_bytes()[:last] == whole[:last]
    assert Counter(a["custom_id"] for a in answers(target)) == Counter(map(str, range(5)))


def test_files_that_do_not_belong_together_are_refused_untouched(tmp_path: Path):
    one, two = write(tmp_path / "one.jsonl", [ask("a")]), write(tmp_path / "two.jsonl", [ask("b")])
    target = tmp_path / "out.jsonl"
    run(FakeEngine(), one, target)
    with pytest.raises(BatchError, match=r"answers 'a', which .*two.jsonl does not ask"):
        run(FakeEngine(), two, target)
    for text in ("not an answer\n", '{"custom_id": "a"}\n', "one line without an end"):
        foreign = tmp_path / "foreign"
        foreign.write_text(text)
        with pytest.raises(BatchError, match="is no answer of a batch"):
            run(FakeEngine(), one, foreign)
        assert foreign.read_text() == text
    held = Results(target)
    try:
        with pytest.raises(BatchError, match="being written by another batch"):
            Results(target)
    finally:
        held.close()


def test_a_full_queue_is_waited_for_and_a_failed_engine_ends_the_batch(tmp_path: Path):
    source, target = write(tmp_path / "in.jsonl", [ask(str(n)) for n in range(9)]), tmp_path / "out.jsonl"
    slow = FakeEngine(lambda request: [Step(wait_s=0.01), "yes"], room=2)
    assert run(slow, source, target, together=4) == Tally(9, 9, 0, 0)

    target.unlink()
    engine = FakeEngine()

    def script(request: Any) -> Any:
        if len(engine.asked) <= 5:
            return "yes"
        engine.failure = RuntimeError("out of memory")
        return Step(error="the engine has failed")

    engine.script = script
    with pytest.raises(BatchError, match=r"the engine failed .*out of memory.*again to go on"):
        run(engine, source, target, together=1, failure=lambda: engine.failure)
    assert len(answers(target)) == 5
    assert run(FakeEngine(), source, target) == Tally(9, 9, 5, 0)
    assert Counter(a["custom_id"] for a in answers(target)) == Counter(map(str, range(9)))


def test_a_disk_without_space_loses_nothing_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, target = write(tmp_path / "in.jsonl", [ask(str(n)) for n in range(12)]), tmp_path / "out.jsonl"
    real = os.fsync
    calls = 0

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(batch, "GROUP_S", 0.0)
    monkeypatch.setattr(batch.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(FakeEngine(lambda request: [Step(wait_s=0.02), "yes"]), source, target, together=1)
    monkeypatch.undo()
    before = answers(target)
    assert 0 < len(before) < 12
    assert run(FakeEngine(), source, target).earlier == len(before)
    assert Counter(a["custom_id"] for a in answers(target)) == Counter(map(str, range(12)))


def test_an_interrupt_keeps_what_is_answered_and_gives_up_the_rest(tmp_path: Path):
    source, target = write(tmp_path / "in.jsonl", [ask(str(n)) for n in range(8)]), tmp_path / "out.jsonl"
    engine = FakeEngine()
    order = itertools.count()
    engine.script = lambda request: "yes" if next(order) < 3 else Step(wait_s=60)

    async def interrupted() -> None:
        results = Results(target)
        task = asyncio.create_task(batch.run(create_app(engine), Index(source, OPTIONS), results, together=2))
        while len(engine.asked) < 5:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        results.close()

    asyncio.run(interrupted())
    assert len(answers(target)) == 3
    assert len(engine.cancelled) >= 2


def test_a_killed_run_goes_on_without_losing_or_repeating_a_line(tmp_path: Path):
    """The real engine on a tiny model, killed without warning while it writes."""
    engines.write(tmp_path / "demo", num_hidden_layers=1)
    lines = [ask(f"request-{n}", f"What is {n} plus {n}?", max_tokens=4 + n % 5, seed=n) for n in range(60)]
    source, target = write(tmp_path / "in.jsonl", [*lines, "not a request"]), tmp_path / "out.jsonl"
    flags: Any = {"model": str(tmp_path / "demo"), "rows": 2, "chunk_tokens": 16, "cache_tokens": 2048}
    program = "from pathlib import Path; from qwen3_jax.cli_batch import Batch; "
    program += f"raise SystemExit(Batch(Path({str(source)!r}), Path({str(target)!r}), **{flags!r}).run())"
    # Answers are written one by one, so that there are many moments to be killed at.
    program = f"from qwen3_jax.server import batch; batch.GROUP_S = 0.0; {program}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", program], stderr=log, cwd=ROOT)
        until = time.monotonic() + 240
        while time.monotonic() < until and process.poll() is None:
            if target.exists() and target.read_bytes().count(b"\n") >= 12:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    before = target.read_bytes()
    before = before[: before.rindex(b"\n") + 1]
    assert 12 <= before.count(b"\n") < 61
    target.write_bytes(before + b'{"id": "batch_req_12')  # as if it had been writing
    assert Batch(source, target, **flags).run() == 1  # there is a line that is no request
    found = answers(target)
    assert target.read_bytes().startswith(before)
    assert Counter(a["custom_id"] for a in found) == Counter([f"request-{n}" for n in range(60)] + [None])
    for answer in found:
        if answer["error"] is None:
            assert answer["response"]["status_code"] == 200
            assert ChatCompletion.model_validate(answer["response"]["body"]).usage is not None
    assert Batch(source, target, **flags).run() == 1
    assert len(answers(target)) == 61

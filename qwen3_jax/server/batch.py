"""A file of requests to a file of answers, through the routes of the server, without a socket.

in.jsonl → `index` (every line checked, none kept) → as many requests at once as the engine has use for, each a call of
the application → out.jsonl, in the order in which they end.

The form is OpenAI's batch format: {custom_id, method, url, body} becomes {id, custom_id, response {status_code,
request_id, body}, error}. A line that is no request becomes an answer with `error` {code, message, line}.

out.jsonl is only ever appended to, in groups that are on the disk before the next is written. A run that finds one goes
on where it ends: a line cut short by a crash is removed, and what is answered is not asked again.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from starlette.types import ASGIApp, Message

from qwen3_jax.server.body import parse
from qwen3_jax.server.errors import ApiError, clip
from qwen3_jax.server.options import ServerOptions

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
BEGINNING = b'{"id": "batch_req_'  # of every line of answers
RETRY_S = 0.2  # until a refused request is sent again
GROUP_S = 0.2  # how long answers gather before they are written


class BatchError(ValueError):
    """A batch that cannot begin or go on: files that do not belong together, or an engine that failed."""


@dataclass(frozen=True)
class Item:
    """A request of the batch: where its line begins, and its number, from 1."""

    custom_id: str
    line: int
    offset: int


@dataclass
class Tally:
    """How far a batch is: requests in all, answered, of those by earlier runs, and of those with an error."""

    total: int = 0
    answered: int = 0
    earlier: int = 0
    failed: int = 0


class Index:
    """The requests of a file, each known by its custom_id, and an answer for every line that is none."""

    def __init__(self, path: Path, options: ServerOptions):
        """Read a file once.

        Raises:
            OSError: it cannot be read.
        """
        self.path, self.options = path, options
        self.items: list[Item] = []
        self.faults: list[dict[str, Any]] = []
        known: set[str] = set()
        with path.open("rb") as file:
            for line, offset, data in _lines(file, options.max_body_bytes):
                try:
                    request = self.check(data, line)
                    if request["custom_id"] in known:
                        raise _Fault("duplicate_custom_id", "an earlier line has this custom_id", request["custom_id"])
                except _Fault as fault:
                    self.faults.append(fault.record(line))
                else:
                    known.add(request["custom_id"])
                    self.items.append(Item(request["custom_id"], line, offset))

    def check(self, data: bytes | None, line: int) -> dict[str, Any]:
        """Return the request on a line, or raise what is wrong with it."""
        if data is None:
            raise _Fault("line_too_long", f"the line is longer than {self.options.max_body_bytes} bytes")
        try:
            request = parse(data, self.options)
        except ApiError as error:
            raise _Fault("invalid_json", str(error).replace("the body", "the line", 1)) from None
        if not isinstance(request, dict):
            raise _Fault("invalid_request", "the line must be a JSON object")
        id = request.get("custom_id")
        if not isinstance(id, str) or not id:
            raise _Fault("invalid_custom_id", "custom_id must be a string that is not empty")
        if request.get("method") != "POST":
            raise _Fault("invalid_method", f"method is {clip(repr(request.get('method')), 40)}: must be 'POST'", id)
        if request.get("url") not in URLS:
            raise _Fault("invalid_url", f"url is {clip(repr(request.get('url')), 80)}: one of {', '.join(URLS)}", id)
        body = request.get("body")
        if not isinstance(body, dict):
            raise _Fault("invalid_body", "body must be a JSON object", id)
        if body.get("stream"):
            raise _Fault("invalid_body", "stream must be false in a batch", id)
        return request

    def read(self, file: IO[bytes], item: Item) -> dict[str, Any]:
        """Read an item's request again.

        Raises:
            BatchError: the file has changed.
        """
        file.seek(item.offset)
        with contextlib.suppress(_Fault):
            request = self.check(next(_lines(file, self.options.max_body_bytes))[2], item.line)
            if request["custom_id"] == item.custom_id:
                return request
        raise BatchError(f"{self.path}: line {item.line} changed while the batch ran: start again")


class Results:
    """The file of answers: locked, repaired, and what it holds already."""

    def __init__(self, path: Path):
        """Open a file, creating it.

        Raises:
            BatchError: another process writes to it, or it holds something else than answers.
            OSError: it cannot be written.
        """
        self.path = path
        self.done: set[str] = set()  # custom_ids answered
        self.lines: set[int] = set()  # numbers of lines answered that are no requests
        self.failed = 0
        self._file = path.open("a+b", buffering=0)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BatchError(f"{path} is being written by another batch: wait for it, or name another") from None
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        whole, rest = 0, b""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    rest = line
                    break
                whole += len(line)
                try:
                    record = json.loads(line)
                    id, error = record["custom_id"], record["error"]
                    if error is None:
                        self.done.add(id)
                    else:
                        self.lines.add(error["line"])
                    self.failed += _failed(record)
                except (ValueError, TypeError, KeyError):
                    raise self._foreign(number) from None
        if rest:  # the end of a run that was killed
            if rest[: len(BEGINNING)] != BEGINNING[: len(rest)]:
                raise self._foreign("at its end")
            self._file.truncate(whole)
            os.fsync(self._file.fileno())

    def _foreign(self, where: int | str) -> BatchError:
        where = f"line {where}" if isinstance(where, int) else where
        return BatchError(f"{self.path} {where} is no answer of a batch: name another file for the answers")

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write answers and wait until they are on the disk; none of them is there if that fails.

        Raises:
            OSError: no space, most likely.
        """
        size = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(b"".join(map(_line, records)))
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(size)
            raise

    def close(self) -> None:
        """Close the file and unlock it."""
        self._file.close()


def missing(index: Index, results: Results) -> tuple[list[dict[str, Any]], list[Item]]:
    """Return what has no answer yet: answers to lines that are no requests, and requests.

    Raises:
        BatchError: the answers are of other requests.
    """
    if strangers := results.done - {item.custom_id for item in index.items}:
        raise BatchError(
            f"{results.path} answers {clip(repr(min(strangers)), 80)}, which {index.path} does not ask: "
            "name another file for the answers"
        )
    faults = [fault for fault in index.faults if fault["error"]["line"] not in results.lines]
    return faults, [item for item in index.items if item.custom_id not in results.done]


async def run(
    app: ASGIApp | None,
    index: Index,
    results: Results,
    *,
    together: int,
    failure: Callable[[], object] = lambda: None,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Answer every request of a file that has no answer yet.

    Args:
        app: of `app.create_app`; None will do if no request is `missing`.
        together: requests at once.
        failure: returns why the engine cannot go on, if it cannot.
        progress: is called with the tally as it changes.

    Raises:
        BatchError: the answers are of other requests, the requests changed, or the engine failed. Answers that came
            before are kept; the next run goes on from there.
    """
    faults, todo = missing(index, results)
    total = len(index.items) + len(index.faults)
    earlier = total - len(faults) - len(todo)
    tally = Tally(total, earlier, earlier, results.failed)
    progress(tally)
    finished: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    for fault in faults:
        finished.put_nowait(fault)
    waiting = iter(todo)
    working = 0

    async def work(file: IO[bytes]) -> None:
        nonlocal working
        assert app is not None
        for item in waiting:
            request = index.read(file, item)
            working += 1
            try:
                while True:
                    status, id, answer = await call(app, request["url"], json.dumps(request["body"]).encode())
                    if status != 503:
                        break
                    if (reason := failure()) is not None:
                        raise BatchError(f"the engine failed ({clip(str(reason), 200)}): run the batch again to go on")
                    if working == 1:
                        break  # it is not others that are in the way
                    await asyncio.sleep(RETRY_S)
            finally:
                working -= 1
            response = {"status_code": status, "request_id": id, "body": answer}
            finished.put_nowait(_record(item.custom_id, response, None))

    def write() -> None:
        if group := [finished.get_nowait() for _ in range(finished.qsize())]:
            results.append(group)
            tally.answered += len(group)
            tally.failed += sum(map(_failed, group))
            progress(tally)

    async def keep() -> None:
        while tally.answered < tally.total:
            finished.put_nowait(await finished.get())
            write()
            if tally.answered < tally.total:
                await asyncio.sleep(GROUP_S)

    with index.path.open("rb") as file:
        tasks = [asyncio.create_task(work(file)) for _ in range(min(together, len(todo)))]
        tasks.append(asyncio.create_task(keep()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            write()
        for end in ends:
            if isinstance(end, Exception):
                raise end
    return tally


async def call(app: ASGIApp, url: str, body: bytes) -> tuple[int, str, Any]:
    """POST JSON to an application, in process; return status, request id and the answer, parsed if it is JSON."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
        "state": {},
    }
    request: Message | None = {"type": "http.request", "body": body, "more_body": False}
    status, headers, parts = 500, {}, []

    async def receive() -> Message:
        nonlocal request
        if request is None:
            await asyncio.Event().wait()  # the client never leaves
        message, request = request, None
        assert message is not None
        return message

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message["headers"])
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    data = b"".join(parts)
    try:
        answer = json.loads(data)
    except ValueError:
        answer = data.decode(errors="replace")
    return status, headers.get(b"x-request-id", b"").decode("latin-1"), answer


class _Fault(Exception):
    """A line that is no request."""

    def __init__(self, code: str, message: str, custom_id: str | None = None):
        super().__init__(message)
        self.code, self.custom_id = code, custom_id

    def record(self, line: int) -> dict[str, Any]:
        error = {"code": self.code, "message": f"line {line}: {self}", "line": line}
        return _record(self.custom_id, None, error)


def _record(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": error}


def _failed(record: dict[str, Any]) -> bool:
    return record["error"] is not None or not 200 <= record["response"]["status_code"] < 300


def _line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(record).encode() + b"\n"


def _lines(file: IO[bytes], most: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (number, offset, line) of the lines that are not blank; None for one longer than `most` bytes."""
    number, offset = 0, file.tell()
    while data := file.readline(most + 1):
        number, begin, offset = number + 1, offset, offset + len(data)
        if len(data) > most and not data.endswith(b"\n"):
            while rest := file.readline(2**20):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield number, begin, None
        elif data.strip():
            yield number, begin, data

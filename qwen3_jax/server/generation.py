"""Requests of the engine as an asynchronous stream of updates.

`Run` submits one or more requests, hands their updates over from the engine's thread to the event loop, and cancels
what has not ended when it is closed, which `watched` and `EventStream` do as soon as the client leaves.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qwen3_jax.engine.updates import Ticket, Update
from qwen3_jax.request import Request
from qwen3_jax.server import errors
from qwen3_jax.server.errors import ApiError
from qwen3_jax.server.limits import ClientGone

Result = TypeVar("Result")
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Ask:
    """One request for the engine and what goes beside it."""

    request: Request
    id: str
    priority: int = 0
    cache_salt: str = ""
    grammar: Any = None
    prompt_logprobs: int | None = None


class Run:
    """Requests under way; iterate for (index, update) until every one has ended.

    Iterating raises an ApiError when one of them fails: 503 for all, when the engine does; 500 for logits that are not
    finite; 400 for an answer that cannot have its form.
    """

    def __init__(self, engine: Any, asks: Iterable[Ask], *, register: set["Run"] | None = None):
        """Submit; if one is refused, none is left behind. Raises as `Engine.submit` does. Needs a running loop."""
        self._engine = engine
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._register = register
        self.tickets: list[Ticket] = []
        self.ended: dict[int, Update] = {}  # the last update of each
        self.generated = 0  # tokens handed over so far
        if register is not None:
            register.add(self)
        try:
            for i, ask in enumerate(asks):
                self.tickets.append(
                    engine.submit(
                        ask.request,
                        self._listener(i),
                        priority=ask.priority,
                        cache_salt=ask.cache_salt,
                        grammar=ask.grammar,
                        prompt_logprobs=ask.prompt_logprobs,
                        request_id=ask.id,
                    )
                )
        except BaseException:
            self.close()
            raise

    def _listener(self, index: int) -> Callable[[Update], None]:
        def listen(update: Update) -> None:  # on the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

        return listen

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        while len(self.ended) < len(self.tickets):
            index, update = await self._updates.get()
            self.generated += len(update.tokens)
            if update.completion is not None or update.error is not None:
                self.ended[index] = update
                self._check(update)
            yield index, update

    def _check(self, update: Update) -> None:
        if update.error is not None:
            if self._engine.failure is not None:
                raise ApiError(503, update.error)
            raise ApiError(400, f"the answer cannot have the form that was asked for: {update.error}")
        if update.completion is not None and update.completion.finish_reason == "error":
            n = len(update.completion.token_ids)
            raise ApiError(500, f"the logits are not finite after {n} generated tokens: this request cannot go on")

    def cancel(self) -> None:
        """Give up what has not ended; the updates still come."""
        for i, ticket in enumerate(self.tickets):
            if i not in self.ended:
                ticket.cancel()

    def close(self) -> None:
        """Give up what has not ended; nobody listens any more."""
        self.cancel()
        if self._register is not None:
            self._register.discard(self)


async def watched(http: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """Do some work for a client, unless it leaves first.

    Raises:
        ClientGone: it left; the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(http.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: Any, name: str | None = None) -> str:
    """Write one server-sent event."""
    data = f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
    return data if name is None else f"event: {name}\n{data}"


class EventStream(StreamingResponse):
    """Server-sent events made of a run's updates; the run is closed when the stream ends or its client leaves.

    An error inside the stream becomes one event, by `failed`; `end` is sent last in every case.
    """

    def __init__(
        self,
        run: Run,
        events: AsyncIterator[str],
        *,
        end: str = DONE,
        failed: Callable[[ApiError], str] = lambda e: event(errors.body(e.status, str(e), e.param)),
    ):
        super().__init__(self._events(events), media_type="text/event-stream")
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._run, self._end, self._failed = run, end, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.close()

    async def _events(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for text in events:
                yield text
        except Exception as error:
            known = errors.from_exception(error)
            if known is None:
                raise
            yield self._failed(known)
        if self._end:
            yield self._end

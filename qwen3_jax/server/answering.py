"""From a request to its answer, as far as chat and text completions share the way.

body → `prepare`, the route's own → requests of the engine → updates → the choices of one answer; or, in a stream,
entries of choices, each in a chunk of its own.
"""

import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from qwen3_jax.engine.updates import PromptLogprobs, Update
from qwen3_jax.reply import Completion
from qwen3_jax.server import shapes
from qwen3_jax.server.body import read
from qwen3_jax.server.generation import Ask, EventStream, Run, event, watched
from qwen3_jax.server.schema import Generating
from qwen3_jax.server.serving import Serving, serving

BodyT = TypeVar("BodyT", bound=Generating)
Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Prepared(Generic[BodyT]):
    """A checked request: what to ask the engine, and how to answer. `asks` has n requests per prompt, in order."""

    OBJECT: ClassVar[str]
    CHUNK: ClassVar[str]

    body: BodyT
    state: Serving
    model: str
    id: str
    prompts: list[list[int]]
    asks: list[Ask]
    created: int = field(default_factory=lambda: int(time.time()))

    def choice(self, i: int, updates: Sequence[Update]) -> Entry:
        """Return a choice, of all its updates."""
        raise NotImplementedError

    def entries(self, run: Run) -> AsyncIterator[Entry]:
        """Yield the choices as they grow, one at a time."""
        raise NotImplementedError

    def more(self, updates: Sequence[Update]) -> Entry:
        """Return what an answer says beside its choices; `updates` are the first choice's."""
        return {}

    def opening(self) -> Entry:
        """Return what the first chunk of a stream says beside its choice."""
        return {}

    @functools.cached_property
    def texts(self) -> shapes.TokenTexts:
        """How token ids are written."""
        return shapes.TokenTexts(self.state.model.tokenizer, as_ids=bool(self.body.return_tokens_as_token_ids))

    def stop_reason(self, done: Completion) -> int | str | None:
        """Return what ended a choice; of the model's end tokens, only one that the request names is worth naming."""
        unnamed = set(self.state.model.tokenizer.stop_ids) - set(self.body.stop_token_ids or ())
        return None if done.stop_reason in unnamed else done.stop_reason

    def said(self, kind: str, choices: list[Entry], usage: Entry | None) -> Entry:
        """Return an answer or a chunk."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return head if usage is None else head | {"usage": usage}

    def usage(self, ended: Mapping[int, Update]) -> Entry:
        """Return the token counts of the answer, from the last update of each request."""
        n = len(self.asks) // len(self.prompts)
        return shapes.usage_of([[ended[i + k] for k in range(n)] for i in range(0, len(self.asks), n)])


async def respond(
    http: Request, kind: type[BodyT], prepare: Callable[[Serving, BodyT], Coroutine[Any, Any, Prepared[BodyT]]]
) -> Response:
    """Answer a request, at once or in a stream."""
    state = serving(http)
    body = await read(http, kind)
    prepared = await watched(http, prepare(state, body))
    http.state.log["id"] = prepared.id
    run = state.run(prepared.asks)
    if body.stream:
        return EventStream(run, _chunks(run, prepared, http.state.log))
    try:
        answer = await watched(http, _answer(run, prepared))
    finally:
        run.close()
    http.state.log.update(answer["usage"] | {"finish_reason": answer["choices"][0]["finish_reason"]})
    return JSONResponse(answer)


async def _answer(run: Run, prepared: Prepared[Any]) -> Entry:
    updates: list[list[Update]] = [[] for _ in run.tickets]
    async for i, update in run:
        updates[i].append(update)
    choices = [prepared.choice(i, mine) for i, mine in enumerate(updates)]
    return prepared.said(prepared.OBJECT, choices, prepared.usage(run.ended)) | prepared.more(updates[0])


async def _chunks(run: Run, prepared: Prepared[Any], log: dict[str, Any]) -> AsyncIterator[str]:
    options = prepared.body.stream_options
    tokens = sum(map(len, prepared.prompts))
    more, reason = prepared.opening(), None
    async for entry in prepared.entries(run):
        running = shapes.usage(tokens, run.generated, 0, 0) if options and options.continuous_usage_stats else None
        yield event(prepared.said(prepared.CHUNK, [entry], running) | more)
        more = {}
        reason = reason or entry["finish_reason"]
    usage = prepared.usage(run.ended)
    log.update(usage | {"finish_reason": reason})
    if options and options.include_usage:
        yield event(prepared.said(prepared.CHUNK, [], usage))


def prompt_logprobs(updates: Sequence[Update]) -> PromptLogprobs:
    """Return the log-probabilities of a choice's prompt, () where none were asked for."""
    return next((u.prompt_logprobs for u in updates if u.prompt_logprobs is not None), ())

"""POST /v1/responses: a chat completion told as output items and events. Nothing is stored.

`responses_input` → `chat.prepare` → deltas → `Output`: reasoning, message and function_call items that open, grow and
close, each step one event. A stream sends the events; a plain answer is the last event's response.
"""

import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from qwen3_jax.server import chat
from qwen3_jax.server.body import read
from qwen3_jax.server.errors import ApiError, clip
from qwen3_jax.server.generation import EventStream, Run, event, watched
from qwen3_jax.server.responses_input import as_chat
from qwen3_jax.server.schema import ResponsesBody
from qwen3_jax.server.serving import serving

router = APIRouter()
Event = dict[str, Any]


@router.post("/v1/responses")
async def create(http: Request) -> Response:
    """Answer an input."""
    state = serving(http)
    body = await read(http, ResponsesBody)
    prepared = await watched(http, chat.prepare(state, as_chat(body)))
    run = state.run(prepared.asks)
    output = Output(body, prepared)
    http.state.log["id"] = output.id
    events = _events(run, output, prepared, http.state.log)
    if body.stream:
        return EventStream(run, _sent(events), end="", failed=output.failed)
    try:
        await watched(http, _drain(events))
    finally:
        run.close()
    return JSONResponse(output.response())


@router.api_route("/v1/responses/{id}", methods=["GET", "DELETE"])
@router.post("/v1/responses/{id}/cancel")
async def stored(id: str) -> Response:
    """Answer that nothing is stored."""
    raise ApiError(404, f"there is no response {clip(id, 80)!r}: this server stores none")


async def _drain(events: AsyncIterator[Event]) -> None:
    async for _ in events:
        pass


async def _sent(events: AsyncIterator[Event]) -> AsyncIterator[str]:
    async for said in events:
        yield event(said, said["type"])


async def _events(run: Run, output: "Output", prepared: chat.Prepared, log: dict[str, Any]) -> AsyncIterator[Event]:
    choice = chat.Choice(prepared)
    yield output.event("response.created", response=output.response())
    yield output.event("response.in_progress", response=output.response())
    async for _, update in run:
        logprobs = prepared.texts.chat(update.logprobs)
        for delta in choice.take(update):
            for said in output.take(delta, logprobs):
                yield said
            logprobs = []
    for said in output.close():
        yield said
    usage = prepared.usage(run.ended)
    log.update(usage | {"finish_reason": choice.finish_reason})
    output.end(choice.finish_reason, usage)
    yield output.event(f"response.{output.status}", response=output.response())


class Output:
    """The items of one response as they grow."""

    def __init__(self, body: ResponsesBody, prepared: chat.Prepared):
        self.status = "in_progress"
        self.items: list[dict[str, Any]] = []
        self._body = body
        self._prepared = prepared
        self.id = prepared.id.replace("chatcmpl-", "resp_", 1)
        self._open: dict[str, Any] | None = None
        self._call = -1  # number of the call that is open
        self._number = -1
        self._reason: str | None = None
        self._usage: dict[str, Any] | None = None

    def event(self, kind: str, **said: Any) -> Event:
        """Return the next event."""
        self._number += 1
        return {"type": kind, "sequence_number": self._number} | said

    def failed(self, error: ApiError) -> str:
        """Return the last event of a stream that cannot go on."""
        said = self.event("error", code=str(error.status), message=clip(str(error), 1000), param=error.param)
        return event(said, "error")

    def take(self, delta: dict[str, Any], logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Add a delta of chat; return the events it makes."""
        if text := delta.get("reasoning"):
            yield from self._grow("reasoning", text, None)
        if text := delta.get("content"):
            yield from self._grow("message", text, logprobs)
        for call in delta.get("tool_calls", ()):
            if call["index"] != self._call:
                yield from self.close()
                self._call = call["index"]
                yield from self._begin(
                    "fc",
                    {"type": "function_call", "call_id": call["id"], "name": call["function"]["name"], "arguments": ""},
                )
            if more := call["function"].get("arguments"):
                yield self._delta("function_call_arguments", more)

    def _grow(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self.close()
            own = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            yield from self._begin("rs" if kind == "reasoning" else "msg", {"type": kind, **own, "content": []})
            yield self._at("response.content_part.added", content_index=0, part=self._part(""))
            assert self._open is not None
            self._open["content"].append(self._part(""))
        yield self._delta("reasoning_text" if kind == "reasoning" else "output_text", text, logprobs)

    def _begin(self, prefix: str, item: dict[str, Any]) -> Iterator[Event]:
        self._open = {"id": f"{prefix}_{secrets.token_hex(16)}", "status": "in_progress"} | item
        self.items.append(self._open)
        yield self._said("response.output_item.added", item=_copy(self._open))

    def _part(self, text: str) -> dict[str, Any]:
        assert self._open is not None
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _delta(self, name: str, text: str, logprobs: list[dict[str, Any]] | None = None) -> Event:
        assert self._open is not None
        if name == "function_call_arguments":
            self._open["arguments"] += text
            return self._at(f"response.{name}.delta", delta=text)
        part = self._open["content"][0]
        part["text"] += text
        if logprobs is None:
            return self._at(f"response.{name}.delta", content_index=0, delta=text)
        part["logprobs"] += logprobs
        return self._at(f"response.{name}.delta", content_index=0, delta=text, logprobs=logprobs)

    def close(self) -> Iterator[Event]:
        """Close the item that is open."""
        if (item := self._open) is None:
            return
        if item["type"] == "function_call":
            yield self._at("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            part = item["content"][0]
            name = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._at(f"response.{name}.done", content_index=0, text=part["text"], **more)
            yield self._at("response.content_part.done", content_index=0, part=dict(part))
        item["status"] = "completed"
        yield self._said("response.output_item.done", item=_copy(item))
        self._open = None

    def _at(self, kind: str, **said: Any) -> Event:
        assert self._open is not None
        return self._said(kind, item_id=self._open["id"], **said)

    def _said(self, kind: str, **said: Any) -> Event:
        return self.event(kind, output_index=len(self.items) - 1, **said)

    def end(self, reason: str | None, usage: dict[str, Any]) -> None:
        """Say how it ended and what it took."""
        self.status = {"length": "incomplete", "abort": "incomplete"}.get(reason or "", "completed")
        self._reason = "max_output_tokens" if reason == "length" else None
        if self.status == "incomplete" and self.items:
            self.items[-1]["status"] = "incomplete"
        self._usage = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }

    def response(self) -> dict[str, Any]:
        """Return the response as it stands."""
        body, prepared = self._body, self._prepared
        params = prepared.asks[0].request.params
        incomplete = {"reason": self._reason} if self.status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": prepared.created,
            "status": self.status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": prepared.model,
            "output": [_copy(item) for item in self.items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._usage,
        }


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """Copy an item, so that it can grow on while its copy is sent."""
    return item | ({"content": [dict(part) for part in item["content"]]} if "content" in item else {})

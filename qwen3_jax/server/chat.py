"""POST /v1/chat/completions.

messages → prompt ids → n requests of the engine → `Choice`: updates → deltas of content, reasoning and tool calls. A
stream sends the deltas; a plain answer is their sum, so that both say the same.
"""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from qwen3_jax.engine.updates import Update
from qwen3_jax.server import asking, shapes, structure, tools
from qwen3_jax.server.body import read
from qwen3_jax.server.conversation import prompt_ids, tool_dicts
from qwen3_jax.server.errors import refuse
from qwen3_jax.server.generation import Ask, EventStream, Run, collect, event, watched
from qwen3_jax.server.schema import ChatBody
from qwen3_jax.server.serving import Serving, serving

router = APIRouter()


@dataclass(frozen=True)
class Prepared:
    """A checked request: what to ask the engine, and how to answer."""

    body: ChatBody
    model: str
    id: str
    asks: list[Ask]
    tools: tools.Calling
    texts: shapes.TokenTexts
    own_stops: frozenset[int]  # end tokens of the model that the request does not name
    created: int = field(default_factory=lambda: int(time.time()))


@router.post("/v1/chat/completions")
async def chat_completions(http: Request) -> Response:
    """Continue a conversation."""
    state = serving(http)
    body = await read(http, ChatBody)
    prepared = await watched(http, prepare(state, body))
    http.state.log["id"] = prepared.id
    run = state.run(prepared.asks)
    if body.stream:
        return EventStream(run, _stream(run, prepared, http.state.log))
    try:
        answer = await watched(http, _answer(run, prepared))
    finally:
        run.close()
    http.state.log.update(answer["usage"] | {"finish_reason": answer["choices"][0]["finish_reason"]})
    return JSONResponse(answer)


async def prepare(state: Serving, body: ChatBody) -> Prepared:
    """Check a request, render and compile what it brings.

    Raises:
        ValueError: of this package; what is wrong with the request.
    """
    model = state.check_model(body.model)
    calling = tools.Calling.of(body)
    form = structure.wanted(body)
    if form is not None and calling.must:
        raise refuse(form.field, f"{form.field} and this tool_choice both say what the answer is: give one of them")
    if body.skip_special_tokens is False:
        raise refuse("skip_special_tokens", "skip_special_tokens must be true here: use /v1/completions")
    asking.refuse_unsupported(body)
    rules = asking.rules(state, body, other=bool(form or calling.form))
    thinking = False if body.reasoning_effort == "none" else body.enable_thinking
    ids = await prompt_ids(
        state,
        body.messages,
        tool_dicts(body.tools),
        enable_thinking=thinking,
        chat_template=body.chat_template,
        variables=body.chat_template_kwargs,
    )
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    ids = asking.truncated(state, body, ids, most)
    wanted = asking.logprobs_wanted(body.logprobs, body.top_logprobs)
    params = asking.sampling(state, body, ids, max_tokens=most, logprobs=wanted)
    id = shapes.new_id("chatcmpl", body.request_id)
    asks = asking.choices(
        state, body, ids, params, id=id, name="the conversation", prompt_logprobs=body.prompt_logprobs,
        grammar=rules or await state.grammar(form or calling.form),
    )  # fmt: skip
    texts = shapes.TokenTexts(state.model.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    own_stops = frozenset(state.model.tokenizer.stop_ids) - set(body.stop_token_ids or ())
    return Prepared(body, model, id, asks, calling, texts, own_stops)


class Choice:
    """One choice as it grows: `take` turns updates into deltas."""

    def __init__(self, prepared: Prepared):
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._prepared = prepared
        self._calls = prepared.tools.parser()

    def take(self, update: Update) -> list[dict[str, Any]]:
        """Return the deltas of an update; the last one sets `finish_reason`."""
        deltas: list[dict[str, Any]] = []
        for label, text in update.pieces:
            if label == "answer":
                deltas += self._calls.feed(text)
            elif self._prepared.body.include_reasoning is not False:
                deltas.append({"reasoning": text, "reasoning_content": text})
        if (done := update.completion) is not None:
            deltas += self._calls.finish()
            self.finish_reason, self.stop_reason = done.finish_reason, done.stop_reason
            if done.stop_reason in self._prepared.own_stops:  # only what the request named is worth naming
                self.stop_reason = None
            if self.finish_reason == "stop" and self._calls.called:
                self.finish_reason = "tool_calls"
        return deltas


def message(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that deltas add up to."""
    parts: dict[str, list[str]] = {"content": [], "reasoning": []}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for name, texts in parts.items():
            texts.append(delta.get(name, ""))
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": "function", "function": {**call["function"]}})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"].get("arguments", "")
    content, reasoning = ("".join(texts) for texts in parts.values())
    said: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    said |= {"refusal": None, "reasoning": reasoning or None, "reasoning_content": reasoning or None}
    return said | {"tool_calls": calls} if calls else said


async def _answer(run: Run, prepared: Prepared) -> dict[str, Any]:
    body = prepared.body
    groups = await collect(run)
    choices = []
    for i, (updates, done) in enumerate(groups):
        choice = Choice(prepared)
        deltas = [delta for update in updates for delta in choice.take(update)]
        said: dict[str, Any] = {
            "index": i,
            "message": message(deltas),
            "logprobs": None if done.logprobs is None else {"content": prepared.texts.chat(done.logprobs)},
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if body.return_token_ids:
            said["token_ids"] = list(done.token_ids)
        choices.append(said)
    answer = {
        "id": prepared.id,
        "object": "chat.completion",
        "created": prepared.created,
        "model": prepared.model,
        "choices": choices,
        "usage": shapes.usage_of([[updates[-1] for updates, _ in groups]]),
        "system_fingerprint": None,
    }
    if body.return_token_ids:
        answer["prompt_token_ids"] = list(prepared.asks[0].request.prompt)
    if body.prompt_logprobs is not None:
        found = next((u.prompt_logprobs for u in groups[0][0] if u.prompt_logprobs is not None), ())
        answer["prompt_logprobs"] = prepared.texts.prompt(found)
    return answer


async def _stream(run: Run, prepared: Prepared, log: dict[str, Any]) -> AsyncIterator[str]:
    body, options = prepared.body, prepared.body.stream_options
    running = bool(options and options.continuous_usage_stats)
    choices = [Choice(prepared) for _ in run.tickets]
    counts = [0] * len(choices)
    prompt = list(prepared.asks[0].request.prompt)

    def chunk(entries: list[dict[str, Any]], usage: dict[str, Any] | None = None, **more: Any) -> str:
        said = {
            "id": prepared.id,
            "object": "chat.completion.chunk",
            "created": prepared.created,
            "model": prepared.model,
            "choices": entries,
        }
        if usage is None and running:
            usage = shapes.usage(len(prompt), sum(counts), 0, 0)
        return event(said | more | ({} if usage is None else {"usage": usage}))

    def entry(i: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} | more

    opening: dict[str, Any] = {"prompt_token_ids": prompt} if body.return_token_ids else {}
    for i in range(len(choices)):
        yield chunk([entry(i, {"role": "assistant", "content": ""})], None, **(opening if i == 0 else {}))
    async for i, update in run:
        choice = choices[i]
        deltas = choice.take(update)
        counts[i] += len(update.tokens)
        extra: dict[str, Any] = {}
        if update.logprobs:
            extra["logprobs"] = {"content": prepared.texts.chat(update.logprobs)}
        if body.return_token_ids and update.tokens:
            extra["token_ids"] = list(update.tokens)
        if extra and not deltas:
            deltas = [{}]
        for k, delta in enumerate(deltas):  # log-probabilities and ids of the update go with its first text
            yield chunk([entry(i, delta, **(extra if k == 0 else {}))])
        if choice.finish_reason is not None:
            yield chunk([entry(i, {}, finish_reason=choice.finish_reason, stop_reason=choice.stop_reason)])
    usage = shapes.usage_of([list(run.ended.values())])
    log.update(usage | {"finish_reason": choices[0].finish_reason})
    if options and options.include_usage:
        yield chunk([], usage)

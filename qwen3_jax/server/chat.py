"""POST /v1/chat/completions.

messages → prompt ids → n requests of the engine → `Choice`: updates → deltas of content, reasoning and tool calls. A
stream sends the deltas; a plain answer is their sum, so that both say the same.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from qwen3_jax.engine.updates import Update
from qwen3_jax.server import answering, asking, shapes, structure, tools
from qwen3_jax.server.answering import Entry, prompt_logprobs, respond
from qwen3_jax.server.conversation import prompt_ids
from qwen3_jax.server.errors import refuse
from qwen3_jax.server.generation import Run
from qwen3_jax.server.schema import ChatBody
from qwen3_jax.server.serving import Serving

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(http: Request) -> Response:
    """Continue a conversation."""
    return await respond(http, ChatBody, prepare)


@dataclass(frozen=True, kw_only=True)
class Prepared(answering.Prepared[ChatBody]):
    """A checked conversation, and the tools that may be called."""

    OBJECT = "chat.completion"
    CHUNK = "chat.completion.chunk"

    tools: tools.Calling

    def choice(self, i: int, updates: Sequence[Update]) -> Entry:
        choice = Choice(self)
        deltas = [delta for update in updates for delta in choice.take(update)]
        logprobs = [entry for update in updates for entry in update.logprobs]
        said: Entry = {
            "index": i,
            "message": message(deltas),
            "logprobs": {"content": self.texts.chat(logprobs)} if self.body.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.body.return_token_ids:
            said["token_ids"] = [token for update in updates for token in update.tokens]
        return said

    def more(self, updates: Sequence[Update]) -> Entry:
        said: Entry = self.opening() | {"system_fingerprint": None}
        if self.body.prompt_logprobs is not None:
            said["prompt_logprobs"] = self.texts.prompt(prompt_logprobs(updates))
        return said

    def opening(self) -> Entry:
        return {"prompt_token_ids": self.prompts[0]} if self.body.return_token_ids else {}

    async def entries(self, run: Run) -> AsyncIterator[Entry]:
        def entry(i: int, delta: dict[str, Any], **more: Any) -> Entry:
            return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} | more

        choices = [Choice(self) for _ in self.asks]
        for i in range(len(choices)):
            yield entry(i, {"role": "assistant", "content": ""})
        async for i, update in run:
            choice = choices[i]
            deltas = choice.take(update)
            extra: Entry = {}
            if update.logprobs:
                extra["logprobs"] = {"content": self.texts.chat(update.logprobs)}
            if self.body.return_token_ids and update.tokens:
                extra["token_ids"] = list(update.tokens)
            if extra and not deltas:
                deltas = [{}]
            for k, delta in enumerate(deltas):  # log-probabilities and ids of the update go with its first text
                yield entry(i, delta, **(extra if k == 0 else {}))
            if choice.finish_reason is not None:
                yield entry(i, {}, finish_reason=choice.finish_reason, stop_reason=choice.stop_reason)


async def prepare(state: Serving, body: ChatBody) -> Prepared:
    """Check a request, render and compile what it brings.

    Raises:
        ValueError: of this package; what is wrong with the request.
    """
    model = asking.begin(state, body)
    calling = tools.Calling.of(body)
    form = structure.wanted(body)
    if form is not None and calling.must:
        raise refuse(form.field, f"{form.field} and this tool_choice both say what the answer is: give one of them")
    rules = asking.rules(state, body, other=bool(form or calling.form))
    thinking = False if body.reasoning_effort == "none" else body.enable_thinking
    ids = await prompt_ids(state, body.messages, body, enable_thinking=thinking)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    ids = asking.truncated(state, body, ids, most)
    wanted = asking.logprobs_wanted(body.logprobs, body.top_logprobs)
    params = asking.sampling(state, body, ids, max_tokens=most, logprobs=wanted)
    id = shapes.new_id("chatcmpl", body.request_id)
    asks = asking.choices(
        state, body, ids, params, id=id, name="the conversation", prompt_logprobs=body.prompt_logprobs,
        grammar=rules or await state.grammar(form or calling.form),
    )  # fmt: skip
    return Prepared(body=body, state=state, model=model, id=id, prompts=[ids], asks=asks, tools=calling)


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
            self.finish_reason, self.stop_reason = done.finish_reason, self._prepared.stop_reason(done)
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

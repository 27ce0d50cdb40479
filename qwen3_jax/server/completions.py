"""POST /v1/completions: raw prompts, as text or token ids, one or many.

The text of a completion is the reading of its tokens, thinking tags and all. With `echo` it begins with the prompt, and
with max_tokens 0 it ends there: nothing is generated, the prompt is only read.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from qwen3_jax.engine.updates import Update
from qwen3_jax.reply import TokenLogprob
from qwen3_jax.server import answering, asking, shapes, structure
from qwen3_jax.server.answering import Entry, prompt_logprobs, respond
from qwen3_jax.server.errors import refuse
from qwen3_jax.server.generation import Ask, Run
from qwen3_jax.server.schema import CompletionBody
from qwen3_jax.server.serving import Serving

router = APIRouter()

DEFAULT_TOKENS = 16  # as in the OpenAI API
PROMPTS_PER_CHOICE = 8  # prompts times n may be this many times the most choices of one prompt


@router.post("/v1/completions")
async def completions(http: Request) -> Response:
    """Continue prompts."""
    return await respond(http, CompletionBody, prepare)


@dataclass(frozen=True, kw_only=True)
class Prepared(answering.Prepared[CompletionBody]):
    """Checked prompts, and as text what the answer repeats of each."""

    OBJECT = CHUNK = "text_completion"

    n: int
    echoes: list[str]  # "" without `echo`

    def choice(self, i: int, updates: Sequence[Update]) -> Entry:
        body, ids, echo = self.body, self.prompts[i // self.n], self.echoes[i // self.n]
        generated = [token for update in updates for token in update.tokens]
        logprobs = [entry for update in updates for entry in update.logprobs]
        of_prompt = prompt_logprobs(updates)
        said: Entry = {"index": i, "text": echo + "".join(map(_text, updates)), "logprobs": None}
        said |= self._reasons(updates[-1])
        if body.logprobs is not None:
            entries: list[TokenLogprob | None] = [*of_prompt, *logprobs] if body.echo else [*logprobs]
            said["logprobs"] = self.texts.completion(entries, [*ids, *generated] if body.echo else generated, 0)
        if body.prompt_logprobs is not None:
            said["prompt_logprobs"] = self.texts.prompt(of_prompt)
        if body.return_token_ids:
            said |= {"token_ids": generated, "prompt_token_ids": ids}
        return said

    async def entries(self, run: Run) -> AsyncIterator[Entry]:
        def entry(i: int, text: str, **more: Any) -> Entry:
            return {"index": i, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None} | more

        body, n = self.body, self.n
        late = bool(body.echo and body.logprobs is not None)  # the echo waits for its log-probabilities
        offsets = [0 if late else len(echo) for echo in self.echoes for _ in range(n)]
        for i in range(len(self.asks)):
            extra: Entry = {"prompt_token_ids": self.prompts[i // n]} if body.return_token_ids else {}
            if extra or (body.echo and not late):
                yield entry(i, "" if late else self.echoes[i // n], **extra)
        async for i, update in run:
            if late and update.prompt_logprobs is not None:
                said = self.texts.completion(update.prompt_logprobs, self.prompts[i // n], 0)
                offsets[i] = sum(map(len, said["tokens"]))
                yield entry(i, self.echoes[i // n], logprobs=said)
            text, extra = _text(update), self._reasons(update)
            if update.logprobs:
                extra["logprobs"] = self.texts.completion(update.logprobs, update.tokens, offsets[i])
                offsets[i] += sum(map(len, extra["logprobs"]["tokens"]))
            if body.return_token_ids:
                extra["token_ids"] = list(update.tokens)
            if text or extra.get("logprobs") or extra.get("token_ids") or update.completion is not None:
                yield entry(i, text, **extra)

    def _reasons(self, update: Update) -> Entry:
        done = update.completion
        if done is None:
            return {"finish_reason": None, "stop_reason": None}
        return {"finish_reason": done.finish_reason, "stop_reason": self.stop_reason(done)}


def _text(update: Update) -> str:
    return "".join(text for _, text in update.pieces)


async def prepare(state: Serving, body: CompletionBody) -> Prepared:
    """Check a request and tokenize what it brings.

    Raises:
        ValueError: of this package; what is wrong with the request.
    """
    model = asking.begin(state, body)
    n = body.n or 1
    given = _prompts(body)
    most = PROMPTS_PER_CHOICE * state.options.max_choices
    if len(given) * n > most:
        raise refuse("prompt", f"prompt has {len(given)} prompts and n is {n}: at most {most} completions together")
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    form = structure.wanted(body)
    grammar = asking.rules(state, body, other=form is not None) or await state.grammar(form)
    id = shapes.new_id("cmpl", body.request_id)
    prompts: list[list[int]] = []
    asks: list[Ask] = []
    for i, prompt in enumerate(given):
        if isinstance(prompt, str):
            ids = await state.encode(prompt, add_special_tokens=bool(body.add_special_tokens))
        else:
            ids = prompt
        ids = asking.truncated(state, body, ids, max_tokens)
        if len(ids) > state.context:
            raise refuse("prompt", f"prompt {i} has {len(ids)} tokens: the context of the model is {state.context}")
        state.check_ids(ids, "prompt")
        params = asking.sampling(state, body, ids, max_tokens=max(1, max_tokens), logprobs=body.logprobs)
        wanted = body.prompt_logprobs
        if wanted is None and body.echo and body.logprobs is not None:
            wanted = body.logprobs
        asks += asking.choices(
            state, body, ids, params, id=f"{id}-{i}", grammar=grammar, name=f"prompt {i}", prompt_logprobs=wanted,
            of_each=True, raw=True,
        )  # fmt: skip
        prompts.append(ids)
    if max_tokens == 0:
        asks = [replace(ask, request=replace(ask.request, limit=0)) for ask in asks]
    decode = state.model.tokenizer.decode
    echoes = [decode(ids) if body.echo else "" for ids in prompts]
    return Prepared(body=body, state=state, model=model, id=id, prompts=prompts, asks=asks, n=n, echoes=echoes)


def _prompts(body: CompletionBody) -> list[str] | list[list[int]]:
    prompt: Any = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise refuse("prompt", "prompt is an empty list: give at least one")
    return [prompt] if isinstance(prompt[0], int) else prompt

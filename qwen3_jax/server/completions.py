"""POST /v1/completions: raw prompts, as text or token ids, one or many.

The text of a completion is the reading of its tokens, thinking tags and all; it is put together here from token ids,
with the stop strings that ended it cut off.
"""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from qwen3_jax.engine.updates import Update
from qwen3_jax.reply import TokenLogprob
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.server import asking, shapes, structure
from qwen3_jax.server.body import read
from qwen3_jax.server.errors import refuse
from qwen3_jax.server.generation import Ask, EventStream, Run, collect, event, watched
from qwen3_jax.server.schema import CompletionBody
from qwen3_jax.server.serving import Serving, serving
from qwen3_jax.text.detokenize import Detokenizer, StopStrings

router = APIRouter()

DEFAULT_TOKENS = 16  # as in the OpenAI API
PROMPTS_PER_CHOICE = 8  # prompts times n may be this many times the most choices of one prompt


@dataclass(frozen=True)
class Prepared:
    """A checked request. `prompts` and their `texts`; `asks` has n requests per prompt, in order."""

    body: CompletionBody
    model: str
    id: str
    n: int
    prompts: list[list[int]]
    echoes: list[str]  # the prompts as text; empty without `echo`
    asks: list[Ask]
    tokens: shapes.TokenTexts
    state: Serving
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def generates(self) -> bool:
        """Whether anything but the prompt is wanted."""
        return self.body.max_tokens != 0


@router.post("/v1/completions")
async def completions(http: Request) -> Response:
    """Continue prompts."""
    state = serving(http)
    body = await read(http, CompletionBody)
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


async def prepare(state: Serving, body: CompletionBody) -> Prepared:
    """Check a request and tokenize what it brings.

    Raises:
        ValueError: of this package; what is wrong with the request.
    """
    model = state.check_model(body.model)
    asking.refuse_unsupported(body)
    n = body.n or 1
    given = _prompts(body)
    most = PROMPTS_PER_CHOICE * state.options.max_choices
    if len(given) * n > most:
        raise refuse("prompt", f"prompt has {len(given)} prompts and n is {n}: at most {most} completions together")
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    form = structure.wanted(body)
    grammar = asking.rules(state, body, other=form is not None) or await state.grammar(form)
    id = shapes.new_id("cmpl", body.request_id)
    prompts, asks = [], []
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
            of_each=True,
        )  # fmt: skip
        prompts.append(ids)
    tokenizer = state.model.tokenizer
    echoes = [tokenizer.decode(ids) for ids in prompts] if body.echo else [""] * len(prompts)
    if max_tokens == 0 and body.logprobs is None and body.prompt_logprobs is None:
        asks = []  # the prompt itself is the answer
    texts = shapes.TokenTexts(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    return Prepared(body, model, id, n, prompts, echoes, asks, texts, state)


def _prompts(body: CompletionBody) -> list[str] | list[list[int]]:
    prompt: Any = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise refuse("prompt", "prompt is an empty list: give at least one")
    return [prompt] if isinstance(prompt[0], int) else prompt


class Text:
    """The text of one completion as its tokens arrive, up to the stop string that ended it."""

    def __init__(self, state: Serving, params: SamplingParams, body: CompletionBody, stop_ids: tuple[int, ...]):
        self._detokenizer = Detokenizer(
            state.model.tokenizer, skip_special_tokens=body.skip_special_tokens is not False
        )
        self._stops = StopStrings(params.stop, include_stop=params.include_stop_str_in_output)
        self._params = params
        self._stop_ids = stop_ids
        self._count = 0

    def take(self, update: Update) -> str:
        """Return the text that an update lets out."""
        out = []
        for token in update.tokens:
            self._count += 1
            if token in self._stop_ids:
                continue  # ends the row and is no text
            text = self._detokenizer.feed([token])
            early = self._count < self._params.min_tokens
            out.append(text if early else self._stops.feed(text))
        if update.completion is not None:
            tail = self._detokenizer.finish()
            out += [self._stops.feed(tail), self._stops.finish()] if tail else [self._stops.finish()]
        return "".join(out)


def _text(prepared: Prepared, i: int) -> Text:
    request = prepared.asks[i].request
    return Text(prepared.state, request.params, prepared.body, request.stop_ids)


def _reasons(prepared: Prepared, update: Update) -> dict[str, Any]:
    done = update.completion
    if done is None:
        return {"finish_reason": None, "stop_reason": None}
    own = set(prepared.state.model.tokenizer.stop_ids) - set(prepared.body.stop_token_ids or ())
    reason = None if done.stop_reason in own else done.stop_reason
    return {"finish_reason": done.finish_reason if prepared.generates else "length", "stop_reason": reason}


def _usage(prepared: Prepared, ended: dict[int, Update]) -> dict[str, Any]:
    if not ended:
        return shapes.usage(sum(map(len, prepared.prompts)), 0, 0, 0)
    n = prepared.n
    return shapes.usage_of([[ended[i + k] for k in range(n)] for i in range(0, len(ended), n)])


async def _answer(run: Run, prepared: Prepared) -> dict[str, Any]:
    groups = await collect(run)
    choices = []
    for i in range(len(prepared.prompts) * prepared.n):
        updates = groups[i][0] if groups else []
        choices.append(_choice(prepared, i, updates))
    return {
        "id": prepared.id,
        "object": "text_completion",
        "created": prepared.created,
        "model": prepared.model,
        "choices": choices,
        "usage": _usage(prepared, run.ended),
    }


def _choice(prepared: Prepared, i: int, updates: list[Update]) -> dict[str, Any]:
    body, ids, echo = prepared.body, prepared.prompts[i // prepared.n], prepared.echoes[i // prepared.n]
    generated = [t for u in updates for t in u.tokens] if prepared.generates else []
    logprobs = [p for u in updates for p in u.logprobs] if prepared.generates else []
    of_prompt = next((u.prompt_logprobs for u in updates if u.prompt_logprobs is not None), None)
    text = "".join(map(_text(prepared, i).take, updates)) if generated else ""
    said: dict[str, Any] = {"index": i, "text": echo + text, "logprobs": None}
    said |= _reasons(prepared, updates[-1]) if updates else {"finish_reason": "length", "stop_reason": None}
    if body.logprobs is not None:
        entries: list[TokenLogprob | None] = [*(of_prompt or ()), *logprobs] if body.echo else [*logprobs]
        all_ids = [*ids, *generated] if body.echo and of_prompt else generated
        said["logprobs"] = prepared.tokens.completion(entries, all_ids, 0)
    if body.prompt_logprobs is not None:
        said["prompt_logprobs"] = prepared.tokens.prompt(of_prompt or ())
    if body.return_token_ids:
        said |= {"token_ids": generated, "prompt_token_ids": ids}
    return said


async def _stream(run: Run, prepared: Prepared, log: dict[str, Any]) -> AsyncIterator[str]:
    body, options, n = prepared.body, prepared.body.stream_options, prepared.n
    running = bool(options and options.continuous_usage_stats)
    count = 0

    def chunk(entries: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        said = {
            "id": prepared.id,
            "object": "text_completion",
            "created": prepared.created,
            "model": prepared.model,
            "choices": entries,
        }
        if usage is None and running:
            usage = shapes.usage(sum(map(len, prepared.prompts)), count, 0, 0)
        return event(said | ({} if usage is None else {"usage": usage}))

    def entry(i: int, text: str, **more: Any) -> dict[str, Any]:
        return {"index": i, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None} | more

    total = len(prepared.prompts) * n
    offsets = [0] * total
    late = bool(body.echo and body.logprobs is not None)  # the echo waits for its log-probabilities
    for i in range(total if body.echo or body.return_token_ids else 0):
        extra = {"prompt_token_ids": prepared.prompts[i // n]} if body.return_token_ids else {}
        if extra or not late:
            yield chunk([entry(i, "" if late else prepared.echoes[i // n], **extra)])
        offsets[i] = 0 if late else len(prepared.echoes[i // n])
    texts = [_text(prepared, i) for i in range(len(prepared.asks))]
    reason = "length"
    if not texts:
        for i in range(total):
            yield chunk([entry(i, "", finish_reason=reason)])
    async for i, update in run:
        if late and update.prompt_logprobs is not None:
            said = prepared.tokens.completion(update.prompt_logprobs, prepared.prompts[i // n], 0)
            offsets[i] = sum(map(len, said["tokens"]))
            yield chunk([entry(i, prepared.echoes[i // n], logprobs=said)])
        extra = {}
        text = texts[i].take(update) if prepared.generates else ""
        if prepared.generates:
            count += len(update.tokens)
            if update.logprobs:
                extra["logprobs"] = prepared.tokens.completion(update.logprobs, update.tokens, offsets[i])
                offsets[i] += sum(map(len, extra["logprobs"]["tokens"]))
            if body.return_token_ids:
                extra["token_ids"] = list(update.tokens)
        extra |= _reasons(prepared, update)
        reason = extra["finish_reason"] or reason
        if text or extra.get("logprobs") or extra.get("token_ids") or update.completion is not None:
            yield chunk([entry(i, text, **extra)])
    usage = _usage(prepared, run.ended)
    log.update(usage | {"finish_reason": reason})
    if options and options.include_usage:
        yield chunk([], usage)

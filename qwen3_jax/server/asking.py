"""From the fields of a request to requests of the engine: sampling, the form of the answer, choices."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qwen3_jax.sampling_params import SamplingError, SamplingParams
from qwen3_jax.server.errors import refuse
from qwen3_jax.server.generation import Ask
from qwen3_jax.server.schema import Generating
from qwen3_jax.server.serving import Serving
from qwen3_jax.server.token_rules import TokenRules

SAME = (  # fields that SamplingParams has under the same name
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "stop", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "ignore_eos",
)  # fmt: skip

STOP = 2048  # characters; a search for one takes about 1 kB for each
BAD_WORD = 256  # characters


def begin(state: Serving, body: Generating) -> str:
    """Return the name to answer with, if the model can do what a request wants of it.

    Raises:
        ApiError: 404, another model is asked for; 400, this one does not generate, or what nothing here can do.
    """
    model = state.check_model(body.model)
    if state.model.backbone:
        raise refuse("model", "model is an embedding model, it has no lm_head to generate with: use /v1/embeddings")
    if body.spaces_between_special_tokens is False:
        raise refuse("spaces_between_special_tokens", "spaces_between_special_tokens is not supported: leave it out")
    return model


def sampling(
    state: Serving, body: Generating, ids: Sequence[int], *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Return the model's defaults with what the request changes.

    Raises:
        ApiError: a value out of range, or a token id that the model does not have.
    """
    changes = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    longest = max(map(len, [body.stop] if isinstance(body.stop, str) else body.stop or ()), default=0)
    if longest > STOP:
        raise refuse("stop", f"stop has a text of {longest} characters: at most {STOP} are allowed")
    state.check_ids(changes.get("stop_token_ids", ()), "stop_token_ids")
    if body.logit_bias is not None:
        changes["logit_bias"] = bias = {_token_id(key): value for key, value in body.logit_bias.items()}
        state.check_ids(list(bias), "logit_bias")
    if max_tokens is None and state.model.defaults.max_tokens is not None:
        max_tokens = min(state.model.defaults.max_tokens, max(1, state.context - len(ids)))
    try:
        return state.model.defaults.replace(
            **changes, max_tokens=max_tokens, logprobs=logprobs, thinking_budget=body.thinking_token_budget
        )
    except SamplingError as error:
        names = {"thinking_budget": "thinking_token_budget"}
        field, _, rest = str(error).partition(" ")
        raise refuse(names.get(field, field), f"{names.get(field, field)} {rest}") from None


def truncated(state: Serving, body: Generating, ids: list[int], max_tokens: int | None) -> list[int]:
    """Keep the end of a prompt, as many tokens as asked for; -1 is what the context has room for."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep == 0:
        raise refuse("truncate_prompt_tokens", "truncate_prompt_tokens is 0: must be at least 1, or -1")
    return ids[-max(1, state.context - (max_tokens or 1) if keep == -1 else keep) :]


def choices(
    state: Serving,
    body: Generating,
    ids: Sequence[int],
    params: SamplingParams,
    *,
    id: str,
    grammar: Any = None,
    name: str,
    prompt_logprobs: int | None = None,
    of_each: bool = False,
    raw: bool = False,
) -> list[Ask]:
    """Return one engine request per choice; with a seed, choice i has seed + i.

    Log-probabilities of the prompt are asked for once, with the first choice, unless `of_each`; `raw` is that of
    `Request`.

    Raises:
        ApiError: more choices than allowed.
        PromptError: the prompt does not fit.
    """
    n = body.n or 1
    if n > state.options.max_choices:
        raise refuse("n", f"n is {n}: must be at most {state.options.max_choices}")
    if prompt_logprobs is not None and not 0 <= prompt_logprobs <= 20:
        raise refuse("prompt_logprobs", f"prompt_logprobs is {prompt_logprobs}: must be from 0 to 20")
    if grammar is not None and params.min_tokens:
        if body.min_tokens:  # where the form lets the text end only, and min_tokens forbids it, nothing is left
            raise refuse("min_tokens", "min_tokens is not supported together with a form of the answer or token rules")
        params = params.replace(min_tokens=0)
    first = state.engine.requests.make(ids, params, name=name)
    first = replace(first, raw=raw, skip_special_tokens=body.skip_special_tokens is not False)
    if isinstance(grammar, TokenRules):
        first = replace(first, thinks=False)  # a grammar holds from the end of the thinking on, these rules from now
    if first.params.min_tokens > first.limit:
        raise refuse("min_tokens", f"min_tokens is {first.params.min_tokens}: the context has room for {first.limit}")
    asks = []
    for i in range(n):
        seed = first.seed if i == 0 else secrets.randbits(63) if params.seed is None else _wrapped(params.seed + i)
        asks.append(
            Ask(
                replace(first, seed=seed, choice=i, choices=n),
                id=f"{id}-{i}",
                priority=body.priority,
                cache_salt=body.cache_salt or "",
                grammar=grammar,
                prompt_logprobs=prompt_logprobs if i == 0 or of_each else None,
            )
        )
    return asks


def _wrapped(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


def _token_id(key: str) -> int:
    if not re.fullmatch(r"\d{1,9}", key):
        raise refuse("logit_bias", f"logit_bias has the key {key[:40]!r}: keys are token ids")
    return int(key)


def logprobs_wanted(flag: bool | None, top: int | None) -> int | None:
    """Return chat's `logprobs` and `top_logprobs` as one number."""
    return (top or 0) if flag else None


def rules(state: Serving, body: Generating, *, other: bool) -> TokenRules | None:
    """Return what allowed_token_ids and bad_words say, None if they say nothing; `other`: a grammar says something too.

    They hold for every token, reasoning included, so that there is no thinking budget beside them.

    Raises:
        ApiError: ids that are none, words that are none, or fields that exclude each other.
    """
    allowed, words = body.allowed_token_ids, body.bad_words or []
    if allowed is None and not words:
        return None
    field = "bad_words" if allowed is None else "allowed_token_ids"
    if other:
        raise refuse(field, f"{field} is not supported together with tools that are forced or a form of the answer")
    if body.thinking_token_budget not in (None, -1):
        raise refuse(field, f"{field} is not supported together with thinking_token_budget")
    last = state.model.tokenizer.vocab_size - 1
    if allowed is not None and (not allowed or not all(0 <= i <= last for i in allowed)):
        raise refuse(field, f"{field} must be a list of token ids from 0 to {last}, not empty")
    if not all(0 < len(word) <= BAD_WORD for word in words):
        raise refuse("bad_words", f"bad_words must be texts of 1 to {BAD_WORD} characters")
    return TokenRules(state.model.tokenizer, state.model.config.vocab_size, allowed=allowed, words=words)

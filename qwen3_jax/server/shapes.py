"""The parts that several answers share: ids, usage, log-probabilities."""

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from qwen3_jax.engine.updates import PromptLogprobs, Update
from qwen3_jax.reply import TokenLogprob
from qwen3_jax.text.tokenizer import Tokenizer


def new_id(kind: str, given: str | None) -> str:
    """Return the id of an answer: the kind, and what the client calls it or something new."""
    return f"{kind}-{given or secrets.token_hex(16)}"


def usage(prompt_tokens: int, completion_tokens: int, reasoning_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Return the token counts of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def usage_of(groups: Sequence[Sequence[Update]]) -> dict[str, Any]:
    """Add up the last updates of an answer's requests, grouped by prompt; a prompt counts once."""
    prompt = completion = reasoning = cached = 0
    for group in groups:
        done = [(u.completion, u.stats) for u in group if u.completion is not None]
        prompt += done[0][0].usage.prompt_tokens if done else 0
        cached += max((stats.cached_tokens for _, stats in done[:1] if stats is not None), default=0)
        completion += sum(c.usage.completion_tokens for c, _ in done)
        reasoning += sum(c.usage.reasoning_tokens for c, _ in done)
    return usage(prompt, completion, reasoning, cached)


class TokenTexts:
    """How token ids are written in answers: as text, or as "token_id:N"."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False):
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        """Return one token, broken characters as U+FFFD."""
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def chat(self, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
        """Return log-probabilities in the form of chat completions."""
        return [
            {**self._entry(t.token_id, t.logprob), "top_logprobs": [self._entry(i, p) for i, p in t.top]}
            for t in logprobs
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": self.text(token_id), "logprob": _finite(logprob), "bytes": list(data)}

    def completion(self, logprobs: Iterable[TokenLogprob | None], ids: Iterable[int], offset: int) -> dict[str, Any]:
        """Return log-probabilities in the form of completions; `offset` is where the text of the first token begins."""
        said: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, entry in zip(ids, logprobs, strict=True):
            text = self.text(token_id)
            said["text_offset"].append(offset)
            said["tokens"].append(text)
            said["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
            said["top_logprobs"].append(None if entry is None else self._top(entry))
            offset += len(text)
        return said

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Map texts to log-probabilities, the token itself among them; of equal texts the best counts."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self.text(token_id), _finite(logprob))
        return top

    def prompt(self, logprobs: PromptLogprobs) -> list[dict[str, Any] | None]:
        """Return log-probabilities of a prompt: {id: {logprob, rank, decoded_token}} per token, none for the first."""
        out: list[dict[str, Any] | None] = []
        for entry in logprobs:
            if entry is None:
                out.append(None)
                continue
            ranked = {i: (p, rank) for rank, (i, p) in enumerate(entry.top, 1)}
            ranked.setdefault(entry.token_id, (entry.logprob, None))  # pyright: ignore[reportArgumentType]
            out.append(
                {
                    str(i): {"logprob": _finite(p), "rank": rank, "decoded_token": self.text(i)}
                    for i, (p, rank) in ranked.items()
                }
            )
        return out


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; the OpenAI API writes this

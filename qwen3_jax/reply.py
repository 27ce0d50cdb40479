"""The text of one row as its tokens arrive: reasoning and answer told apart, cut at stop strings. No JAX import.

token ids → `Reply.take` → pieces of text; the token that ends the row also sets `Reply.completion`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Literal

import numpy as np

from qwen3_jax.request import Request
from qwen3_jax.text.detokenize import StopStrings
from qwen3_jax.text.thinking import Label, ThinkingIds, ThinkingStream
from qwen3_jax.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "error", "abort"]


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, its log-probability under the model, and the best alternatives as (id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs_of(
    emitted: Mapping[str, np.ndarray], row: int, ids: Sequence[int], wanted: int | None, *, at: int = 0
) -> list[TokenLogprob]:
    """Read the log-probabilities of a row's ids out of what a call emitted, its steps from `at` on.

    Args:
        emitted: "logprob" [n, B], "top_ids" and "top_logprobs" [n, B, most].
        wanted: how many alternatives; None reads nothing.
    """
    if wanted is None:
        return []
    steps = slice(at, at + len(ids))
    own = emitted["logprob"][steps, row].tolist()
    if not wanted:
        return [TokenLogprob(*entry) for entry in zip(ids, own, strict=True)]
    best, theirs = (emitted[name][steps, row, :wanted].tolist() for name in ("top_ids", "top_logprobs"))
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(best, theirs, strict=True)]
    return [TokenLogprob(*entry) for entry in zip(ids, own, tops, strict=True)]


@dataclass(frozen=True)
class Usage:
    """Token counts. `reasoning_tokens` are those of the completion up to `</think>`, both tags included."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True)
class Timings:
    """Where the seconds of the batch went, until this row ended.

    `load_s` is the folder's, once per `Generator`; `compile_s` what this batch had to compile; `prefill_s` and
    `decode_s` run the model; `first_token_s` is from the call to the first token, compiling included;
    `tokens_per_s` counts this row's tokens after the first, per second of decode.
    """

    load_s: float
    compile_s: float
    prefill_s: float
    decode_s: float
    first_token_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Completion:
    """What became of one prompt.

    `reasoning` and `answer` are told apart by the token ids of the thinking tags; without them everything is answer.
    `token_ids` are all generated ids, the one that ended the row included. `finish_reason` is "stop" (`stop_reason`
    says which id or string), "length", "error" (logits that are not finite), or "abort" (given up from outside). `seed`
    reproduces the row.
    """

    reasoning: str
    answer: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    seed: int
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def text(self) -> str:
        """Reasoning and answer in the form that the model writes."""
        return f"<think>\n{self.reasoning}\n</think>\n\n{self.answer}" if self.reasoning else self.answer


Piece = tuple[Label, str]


class Reply:
    """The text of one row as it grows; `completion` is set when the row has ended."""

    __slots__ = (
        "_ids", "_label", "_limit", "_logprobs", "_opened", "_stop_ids", "_stops", "_stream", "_tags", "_text",
        "completion", "number", "request",
    )  # fmt: skip

    def __init__(self, tokenizer: Tokenizer, tags: ThinkingIds | None, number: int, request: Request):
        self.number = number
        self.request = request
        self.completion: Completion | None = None
        self._tags = tags
        forced = request.thinks and request.params.thinking_budget == 0  # the first token is the stop text's
        self._opened = tags is not None and (forced or tags.opened_by(request.prompt, tokenizer))
        self._stream = ThinkingStream(
            tokenizer, opened=self._opened, raw=request.raw, skip_special_tokens=request.skip_special_tokens
        )
        params = request.params
        self._limit, self._stop_ids = request.limit, frozenset(request.stop_ids)
        labels: tuple[Label, ...] = ("reasoning", "answer") if params.stop else ()
        self._stops = {
            label: StopStrings(params.stop, include_stop=params.include_stop_str_in_output) for label in labels
        }
        self._label: Label | None = None
        self._text: dict[Label, list[str]] = {"reasoning": [], "answer": []}
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def take(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], clock: Callable[[], Timings]
    ) -> list[Piece]:
        """Take the row's next tokens as far as its end; return the text they let out, joined by label.

        Args:
            tokens: ids; those behind the row's end are left.
            logprobs: one per token, or none.
            clock: asked when the row ends.
        """
        self._logprobs += logprobs
        pieces: list[Piece] = []
        if not self._stops:
            pieces = self._take(tokens, clock)
        else:  # one by one: the one that completes a stop string must be the last
            for token in tokens:
                if self.completion is None:
                    pieces += self._take((token,), clock)
        if len(pieces) < 2:
            return pieces
        return [(label, "".join(text for _, text in same)) for label, same in groupby(pieces, itemgetter(0))]

    def _take(self, tokens: Sequence[int], clock: Callable[[], Timings]) -> list[Piece]:
        room = self._limit - len(self._ids)
        tokens = tokens if len(tokens) < room else tokens[:room]
        stop = None
        if not self._stop_ids.isdisjoint(tokens):
            at, stop = next((i, token) for i, token in enumerate(tokens) if token in self._stop_ids)
            tokens = tokens[: at + 1]
        self._ids += tokens
        pieces = self._cut(self._stream.feed(tokens if stop is None else tokens[:-1]))
        if self._stops and self._matched is not None:
            return pieces + self._end("stop", self._matched, clock)
        if stop is not None:
            return pieces + self._end("stop", stop, clock)
        if len(tokens) == room:
            return pieces + self._end("length", None, clock)
        return pieces

    @property
    def length(self) -> int:
        """Tokens that it has taken."""
        return len(self._ids)

    @property
    def _matched(self) -> str | None:
        return next((stops.matched for stops in self._stops.values() if stops.matched is not None), None)

    def _cut(self, pieces: list[Piece]) -> list[Piece]:
        """Pass text through the stop strings; a thinking tag between two pieces ends what a string can span."""
        if not self._stops:
            for label, text in pieces:
                self._text[label].append(text)
            return pieces
        out: list[Piece] = []
        early = len(self._ids) < self.request.params.min_tokens
        for label, text in pieces:
            if self._matched is not None:
                break
            if label != self._label:
                out += self._release()
                self._label = label
            out += self._let_out(text if early else self._stops[label].feed(text))
        return out

    def _release(self) -> list[Piece]:
        """Let out what could have become a stop string."""
        return [] if self._label is None else self._let_out(self._stops[self._label].finish())

    def _let_out(self, text: str) -> list[Piece]:
        if self._label is None or not text:
            return []
        self._text[self._label].append(text)
        return [(self._label, text)]

    def end(self, reason: Literal["abort", "error", "length"], clock: Callable[[], Timings]) -> list[Piece]:
        """End the row before its next token; return the text that was held back.

        "error" says that the logits of that token were not finite.
        """
        return self._end(reason, None, clock)

    def _end(self, reason: FinishReason, stop: int | str | None, clock: Callable[[], Timings]) -> list[Piece]:
        times = clock()
        pieces = [] if self._matched is not None else [*self._cut(self._stream.finish()), *self._release()]
        n = len(self._ids)
        self.completion = Completion(
            reasoning="".join(self._text["reasoning"]),
            answer="".join(self._text["answer"]),
            token_ids=tuple(self._ids),
            finish_reason=reason,
            stop_reason=stop,
            seed=self.request.seed,
            usage=Usage(len(self.request.prompt), n, self._reasoning_tokens()),
            timings=replace(times, tokens_per_s=(n - 1) / times.decode_s if n > 1 and times.decode_s else 0.0),
            logprobs=None if self.request.params.logprobs is None else tuple(self._logprobs[:n]),
        )
        return pieces

    def _reasoning_tokens(self) -> int:
        if self._tags is None or not (self._opened or self._tags.open_id in self._ids):
            return 0
        closed = self._tags.close_id in self._ids
        return self._ids.index(self._tags.close_id) + 1 if closed else len(self._ids)

"""The text of one row as its tokens arrive: reasoning and answer told apart, cut at stop strings. No JAX import.

token ids → `Reply.take` → pieces of text; the token that ends the row also sets `Reply.completion`.
"""

from dataclasses import dataclass, replace
from typing import Literal

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
        self._stops: dict[Label, StopStrings] = {
            "reasoning": StopStrings(params.stop, include_stop=params.include_stop_str_in_output),
            "answer": StopStrings(params.stop, include_stop=params.include_stop_str_in_output),
        }
        self._label: Label | None = None
        self._text: dict[Label, list[str]] = {"reasoning": [], "answer": []}
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def take(self, token: int | None, logprob: TokenLogprob | None, clock: Timings) -> list[Piece]:
        """Take the row's next token, None where the logits were not finite; return the text it lets out."""
        if token is None:
            return self._end("error", None, clock)
        self._ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if token in self.request.stop_ids:
            return self._end("stop", token, clock)
        pieces = self._cut(self._stream.feed([token]))
        if self._matched is not None:
            return pieces + self._end("stop", self._matched, clock)
        if len(self._ids) >= self.request.limit:
            return pieces + self._end("length", None, clock)
        return pieces

    @property
    def _matched(self) -> str | None:
        return self._stops["reasoning"].matched or self._stops["answer"].matched

    def _cut(self, pieces: list[Piece]) -> list[Piece]:
        """Pass text through the stop strings; a thinking tag between two pieces ends what a string can span."""
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

    def end(self, reason: Literal["abort", "error", "length"], clock: Timings) -> list[Piece]:
        """End the row before its next token; return the text that was held back."""
        return self._end(reason, None, clock)

    def _end(self, reason: FinishReason, stop: int | str | None, clock: Timings) -> list[Piece]:
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
            timings=replace(clock, tokens_per_s=(n - 1) / clock.decode_s if n > 1 and clock.decode_s else 0.0),
            logprobs=None if self.request.params.logprobs is None else tuple(self._logprobs),
        )
        return pieces

    def _reasoning_tokens(self) -> int:
        if self._tags is None or not (self._opened or self._tags.open_id in self._ids):
            return 0
        closed = self._tags.close_id in self._ids
        return self._ids.index(self._tags.close_id) + 1 if closed else len(self._ids)

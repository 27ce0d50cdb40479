"""One request under way: its sequence, its text, its grammar and its times."""

import itertools
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.programs import program_for, stage_after, thinking
from qwen3_jax.engine.sequence import Sequence
from qwen3_jax.engine.updates import Listener, RequestStats, Update
from qwen3_jax.loaded import LoadedModel
from qwen3_jax.reply import Reply, Timings, TokenLogprob
from qwen3_jax.request import Request
from qwen3_jax.steps import BROKEN, Steps
from qwen3_jax.text.thinking import ThinkingIds

log = logging.getLogger("qwen3_jax.engine")


class Matcher(Protocol):
    """A grammar at one point of a text."""

    @property
    def error(self) -> str | None:
        """Why the text cannot go on; `mask` then allows only ids that end it."""
        ...

    def mask(self, out: np.ndarray) -> None:
        """Set the bits of the ids that may follow, in uint32 [ceil(V/32)]."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by one token; says whether it was allowed."""
        ...


class Grammar(Protocol):
    """A compiled grammar, see `text.constraints`."""

    def start(self) -> Matcher:
        """Return a matcher at the beginning of a text."""
        ...


@dataclass(eq=False, slots=True)
class Job:
    """What the engine keeps of a request."""

    request: Request
    sequence: Sequence
    reply: Reply
    listener: Listener
    steps: Steps
    tags: ThinkingIds | None
    load_s: float
    words: int
    program: str  # the cheapest decode program that does what it asks for
    matcher: Matcher | None
    prompt_logprobs: int | None
    answering: bool  # past its thinking, as far as the grammar is concerned
    undecided: bool  # the first token says whether it thinks
    stage: int
    budget: int
    submitted: float
    admitted: float | None = None
    first: float | None = None
    last: float | None = None
    over: bool = False
    scored: dict[int, TokenLogprob] = field(default_factory=dict)  # of the prompt, by position
    grammar_error: str | None = None
    reported: bool = False  # the prompt's log-probabilities are out

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        tags: ThinkingIds | None,
        steps: Steps,
        number: int,
        request: Request,
        listener: Listener,
        *,
        priority: int,
        salt: str,
        grammar: Grammar | None,
        prompt_logprobs: int | None,
    ) -> "Job":
        """Set a request up.

        Raises:
            SamplingError: a logit_bias for an id that the tokenizer does not have.
        """
        stage, budget = thinking(steps, request)
        opened = tags is not None and tags.opened_by(request.prompt, model.tokenizer)
        free = stage == 0 and budget > 0
        sequence = Sequence(
            id=number,
            prompt=list(request.prompt),
            limit=request.limit,
            priority=priority,
            # Every position must be computed to be scored, and nobody else's are like these.
            salt=salt if prompt_logprobs is None else f"\0{number}",
            stepwise=grammar is not None,
        )
        return cls(
            request=request,
            sequence=sequence,
            reply=Reply(model.tokenizer, tags, number, request),
            listener=listener,
            steps=steps,
            tags=tags,
            load_s=model.load_s,
            words=-(-model.config.vocab_size // 32),
            program=program_for(request.params, tokens=model.tokenizer.vocab_size),
            matcher=None if grammar is None else grammar.start(),
            prompt_logprobs=prompt_logprobs,
            answering=stage > len(steps.stop_text),
            undecided=free and not opened,
            stage=stage,
            budget=budget,
            submitted=time.perf_counter(),
        )

    @property
    def bound(self) -> bool:
        """Whether a grammar says what the next token may be."""
        return self.sequence.stepwise and (self.answering or self.undecided)

    def ids(self, start: int, end: int) -> np.ndarray:
        """Return the ids at positions start..end-1 of prompt and output."""
        known = len(self.sequence.prompt)
        if end <= known:
            return np.asarray(self.sequence.prompt[start:end], np.int32)
        return np.asarray([self.sequence.token(p) for p in range(start, end)], np.int32)

    def mask(self) -> np.ndarray | None:
        """Return the bits of the ids that the grammar allows next, None where everything is."""
        if not self.bound:
            return None
        out = np.zeros(self.words, np.uint32)
        if self.matcher is not None:
            try:
                self.matcher.mask(out)
            except Exception as error:
                self._forsake(error)
        if self.matcher is None:  # it failed: end as soon as possible
            out[:] = 0 if self.request.stop_ids else 0xFFFFFFFF
            for token in self.request.stop_ids:
                out[token // 32] |= np.uint32(1 << token % 32)
        elif self.undecided and self.tags is not None:
            out[self.tags.open_id // 32] |= np.uint32(1 << self.tags.open_id % 32)
        return out

    def _forsake(self, error: Exception) -> None:
        """Go on without a grammar that failed: its request ends with an error, nobody else notices."""
        log.exception("the grammar of request %d failed", self.sequence.id)
        self.grammar_error = f"the grammar failed: {type(error).__name__}: {error}"
        self.matcher = None

    def take(
        self, ids: list[int], known: int, values: Mapping[str, np.ndarray], row: int, now: float, observer: Observer
    ) -> tuple[Any, list[int]]:
        """Take the tokens of one dispatch, the first `known` of which are old; returns the update and the new ones."""
        pieces, fresh, logprobs = [], [], []
        for i, token in enumerate(ids):
            if i < known and token != BROKEN:
                continue
            if self.reply.completion is not None:
                break
            index = len(self.sequence.output) + len(fresh)
            logprob = None
            if token != BROKEN:
                logprob = _logprob(values, i, row, self.request.params.logprobs)
                fresh.append(token)
                if logprob is not None:
                    logprobs.append(logprob)
            if self.first is None:
                self.first = now
                observer.first_token(now - self.submitted)
            pieces += self.reply.take(None if token == BROKEN else token, logprob, self._clock(now))
            if token != BROKEN and self.reply.completion is None:
                self._advance(index, token)
        if fresh and self.last is not None:
            observer.inter_token(now - self.last, len(fresh))
        if fresh:
            self.last = now
        if len(pieces) > 1:
            runs = itertools.groupby(pieces, lambda piece: piece[0])
            pieces = [(label, "".join(text for _, text in run)) for label, run in runs]
        prompt = self._report() if fresh else None
        self.over = self.reply.completion is not None
        if not (fresh or self.over):
            return None, fresh
        completion, error, stats = self.reply.completion, None, None
        if completion is not None:
            stats = self._stats(now)
            error = self.grammar_error if self.matcher is None else self.matcher.error
            completion = completion if error is None else replace(completion, finish_reason="error")
        return Update(tuple(pieces), tuple(fresh), tuple(logprobs), prompt, completion, stats, error), fresh

    @property
    def corrupt(self) -> bool:
        """Whether log-probabilities of the prompt are no numbers."""
        return any(math.isnan(entry.logprob) for entry in self.scored.values())

    def conclude(self, now: float) -> Update:
        """End with the prompt, where no token was asked for; returns the only update."""
        if self.corrupt:
            return self.give_up("error", now)
        return replace(self.give_up("length", now), prompt_logprobs=self._report())

    def give_up(self, reason: Literal["abort", "error", "length"], now: float) -> Update:
        """End before the next token; returns the last update."""
        pieces = self.reply.end(reason, self._clock(now)) if self.reply.completion is None else []
        self.over = True
        return Update(pieces=tuple(pieces), completion=self.reply.completion, stats=self._stats(now))

    def take_scores(self, first: int, count: int, values: Mapping[str, np.ndarray]) -> None:
        """Keep the log-probabilities of the prompt's tokens from position `first` on."""
        columns = {name: array[:, None] for name, array in values.items()}
        columns["token"] = np.asarray(self.sequence.prompt[first : first + count], np.int32)[:, None]
        for i in range(count):
            entry = _logprob(columns, i, 0, self.prompt_logprobs)
            if entry is not None:
                self.scored[first + i] = entry

    def _report(self) -> tuple[TokenLogprob | None, ...] | None:
        if self.prompt_logprobs is None or self.reported:
            return None
        self.reported = True
        return (None, *(self.scored[p] for p in range(1, len(self.sequence.prompt))))

    def _advance(self, index: int, token: int) -> None:
        """Follow the thinking, and the grammar after it."""
        if self.matcher is None:
            return
        before, self.stage = self.stage, stage_after(self.steps, self.request, self.stage, self.budget, index, token)
        if self.undecided:
            self.undecided = False
            if before == 0 and self.tags is not None and token != self.tags.open_id:
                self.answering = True  # it does not think, and its budget is nobody's business
        if self.answering:
            try:
                self.matcher.accept(token)
            except Exception as error:
                self._forsake(error)
        elif self.stage > len(self.steps.stop_text):
            self.answering = True  # from the next token on

    def _clock(self, now: float) -> Timings:
        first = now if self.first is None else self.first
        return Timings(
            load_s=self.load_s,
            compile_s=0.0,
            prefill_s=first - (self.submitted if self.admitted is None else self.admitted),
            decode_s=now - first,
            first_token_s=first - self.submitted,
            tokens_per_s=0.0,
        )

    def _stats(self, now: float) -> RequestStats:
        completion = self.reply.completion
        assert completion is not None
        admitted = now if self.admitted is None else self.admitted
        first = now if self.first is None else self.first
        return RequestStats(
            prompt_tokens=completion.usage.prompt_tokens,
            generated_tokens=completion.usage.completion_tokens,
            reasoning_tokens=completion.usage.reasoning_tokens,
            cached_tokens=self.sequence.cached,
            queue_s=admitted - self.submitted,
            prefill_s=first - admitted,
            decode_s=(first if self.last is None else self.last) - first,
            first_token_s=None if self.first is None else self.first - self.submitted,
            e2e_s=now - self.submitted,
            preemptions=self.sequence.preemptions,
            limit=self.request.limit,
            choice=self.request.choice,
            choices=self.request.choices,
        )


def _logprob(values: Mapping[str, np.ndarray], i: int, row: int, wanted: int | None) -> TokenLogprob | None:
    if wanted is None:
        return None
    top: tuple[tuple[int, float], ...] = ()
    if wanted:
        ids, numbers = (values[name][i, row, :wanted].tolist() for name in ("top_ids", "top_logprobs"))
        top = tuple(zip(ids, numbers, strict=True))
    return TokenLogprob(int(values["token"][i, row]), float(values["logprob"][i, row]), top)

"""One request under way: its sequence, its text, its grammar and its times."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.programs import program_for, stage_after, thinking
from qwen3_jax.engine.sequence import Sequence
from qwen3_jax.engine.updates import Listener, RequestStats, Update
from qwen3_jax.loaded import LoadedModel
from qwen3_jax.reply import Reply, Timings, TokenLogprob, logprobs_of
from qwen3_jax.request import Request
from qwen3_jax.steps import Steps
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
        self,
        ids: list[int],
        broken: bool,
        emitted: Mapping[str, np.ndarray],
        row: int,
        now: float,
        observer: Observer,
        *,
        at: int = 0,
    ) -> Update | None:
        """Take what one call emitted for the row; returns the update, whose tokens are those that count, if any do.

        Args:
            ids: the new tokens, `broken` if the logits after them were not finite.
            emitted: for their log-probabilities, from its step `at` on.
        """
        if not (ids or broken):
            return None
        if self.first is None:
            self.first = now
            observer.first_token(now - self.submitted)
        reply, index = self.reply, len(self.sequence.output)
        wanted = self.request.params.logprobs
        logprobs = () if wanted is None else logprobs_of(emitted, row, ids, wanted, at=at)
        pieces = reply.take(ids, logprobs, lambda: self._clock(now))
        if reply.completion is not None:
            ids = ids[: reply.length - index]
        elif broken:
            pieces += reply.end("error", lambda: self._clock(now))
        elif self.matcher is not None:
            for i, token in enumerate(ids):
                self._advance(index + i, token)
        if ids:
            if self.last is not None:
                observer.inter_token(now - self.last, len(ids))
            self.last = now
        completion, error, stats = reply.completion, None, None
        if completion is not None:
            self.over, stats = True, self._stats(now)
            error = self.grammar_error if self.matcher is None else self.matcher.error
            completion = completion if error is None else replace(completion, finish_reason="error")
        prompt = None if self.prompt_logprobs is None or not ids else self._report()
        return Update(tuple(pieces), tuple(ids), tuple(logprobs[: len(ids)]), prompt, completion, stats, error)

    @property
    def corrupt(self) -> bool:
        """Whether log-probabilities of the prompt are no numbers."""
        return any(math.isnan(entry.logprob) for entry in self.scored.values())

    def conclude(self, now: float) -> Update:
        """End with the prompt, where no token was asked for; returns the only update."""
        if self.corrupt:
            return self.give_up("error", now)
        return self.give_up("length", now)._replace(prompt_logprobs=self._report())

    def give_up(self, reason: Literal["abort", "error", "length"], now: float) -> Update:
        """End before the next token; returns the last update."""
        pieces = self.reply.end(reason, lambda: self._clock(now)) if self.reply.completion is None else []
        self.over = True
        return Update(pieces=tuple(pieces), completion=self.reply.completion, stats=self._stats(now))

    def take_scores(self, first: int, count: int, values: Mapping[str, np.ndarray]) -> None:
        """Keep the log-probabilities of the prompt's tokens from position `first` on."""
        columns = {name: array[:, None] for name, array in values.items()}
        entries = logprobs_of(columns, 0, self.sequence.prompt[first : first + count], self.prompt_logprobs)
        self.scored.update(enumerate(entries, first))

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

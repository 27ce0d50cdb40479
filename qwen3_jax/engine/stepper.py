"""What an engine's thread does, turn by turn: plan, dispatch, and hand out what the dispatch before computed.

scheduler.plan → dispatch → the previous dispatch's tokens → `Job.take` → listeners → scheduler.commit. One plan is
under way while the host turns the tokens of the one before into text. Policy is the scheduler's, arithmetic the
device's; here they meet. Everything is called on one thread.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from qwen3_jax import distributed
from qwen3_jax.engine.device import Device
from qwen3_jax.engine.job import Job
from qwen3_jax.engine.layout import Layout
from qwen3_jax.engine.lockstep import Leader
from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.programs import DECODES, seat
from qwen3_jax.engine.scheduler import Scheduler
from qwen3_jax.engine.sequence import Chunk, Decode, Plan
from qwen3_jax.engine.updates import Load, Update
from qwen3_jax.steps import Emitted, emitted_ids

log = logging.getLogger("qwen3_jax.engine")


@dataclass(slots=True)
class Flight:
    """A plan that was dispatched, and what will come of it."""

    plan: Plan
    begun: float  # seconds
    decoded: Emitted = field(default_factory=dict)
    entries: list[tuple[Job, Decode, int]] = field(default_factory=list)  # with the row in `decoded`
    firsts: list[tuple[Job, Chunk, Emitted]] = field(default_factory=list)
    scores: list[tuple[Job, int, int, Emitted]] = field(default_factory=list)  # with the first position, and how many
    prompts: list[Job] = field(default_factory=list)  # that end with their prompt
    stepwise: bool = False  # holds a token without which nothing can be planned


@dataclass(slots=True)
class Turn:
    """What one turn did: its plan, and the tokens it read."""

    plan: Plan
    generated: int = 0


class Stepper:
    """The requests of one engine on their way through scheduler and device.

    Attributes:
        jobs: {sequence id: job} of all requests that have not ended.
    """

    def __init__(self, device: Device | Leader, observer: Observer, give_up: Callable[[int], None]):
        """Start with nothing. `give_up` is told of a request whose listener failed."""
        options = device.options
        self.device = device
        self.observer = observer
        self.scheduler = Scheduler(
            rows=options.rows,
            pages=device.pages,
            page_tokens=options.page_tokens,
            chunk_tokens=options.chunk,
            decode_tokens=options.decode_tokens,
            busy_tokens=options.busy,
            prefix_cache=options.prefix_cache,
            deterministic=options.deterministic,
        )
        self.jobs: dict[int, Job] = {}
        self._give_up = give_up
        self._flights: deque[Flight] = deque()
        self._through: float | None = None  # when the device was through with the last flight, if that is known
        self._layout = Layout(
            rows=options.rows,
            columns=device.columns,
            scratch=device.pages,
            growth=device.growth,
            decode_tokens=options.decode_tokens,
        )

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._flights) or self.scheduler.has_work

    def load(self) -> Load:
        """Return how busy it is."""
        scheduler = self.scheduler
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_tokens=scheduler.waiting_tokens,
            pages_used=scheduler.pages.total - scheduler.pages.available,
            pages_total=scheduler.pages.total,
        )

    def begin(self, job: Job) -> None:
        """Let a request wait for its turn."""
        self.jobs[job.sequence.id] = job
        self.scheduler.add(job.sequence)

    def abort(self, number: int) -> None:
        """Give a request up, if it is still there."""
        job = self.jobs.get(number)
        if job is not None:
            self.scheduler.cancel(number)
            self.finish(job, job.give_up("abort", time.perf_counter()))

    def turn(self) -> Turn:
        """Dispatch the next plan, and hand out what the one before it computed."""
        plan = self.scheduler.plan()
        for _ in plan.preempted:
            self.observer.preempted()
        if plan:
            self._flights.append(self._dispatch(plan))
        turn = Turn(plan)
        # A grammar's next mask needs the last token: nothing can be planned ahead of it.
        ahead = 1 if plan and not self._flights[-1].stepwise else 0
        while len(self._flights) > ahead:
            self._commit(self._flights.popleft(), turn)
        return turn

    def finish(self, job: Job, update: Update) -> None:
        """Hand out a job's last update and forget it."""
        if self.jobs.pop(job.sequence.id, None) is None:
            return
        assert update.stats is not None
        assert update.completion is not None
        self.observer.finished(update.stats, finish_reason=update.completion.finish_reason)
        self._hand(job, update)

    # Dispatch

    def _dispatch(self, plan: Plan) -> Flight:
        now = time.perf_counter()
        flight = Flight(plan, now)
        for sequence in plan.admitted:
            job = self.jobs[sequence.id]
            if job.admitted is None:
                job.admitted = now
                self.observer.prefix(queried=len(sequence.prompt), hits=sequence.cached)
        if plan.decode:
            self._dispatch_decode(flight)
        for chunk in plan.prefill:
            self._dispatch_chunk(chunk, flight)
        return flight

    def _dispatch_chunk(self, chunk: Chunk, flight: Flight) -> None:
        sequence, device = chunk.sequence, self.device
        job, row, prompt = self.jobs[sequence.id], sequence.row, sequence.prompt
        assert row is not None
        table = self._layout.table(sequence.pages)
        device.prefill(table, job.ids(chunk.start, chunk.start + chunk.length), chunk.start)
        if job.prompt_logprobs is not None and chunk.start < len(prompt) - 1:
            targets = np.asarray(prompt[chunk.start + 1 : chunk.start + chunk.length + 1], np.int32)
            flight.scores.append((job, chunk.start + 1, len(targets), device.score(targets)))
        if job.request.limit == 0 and chunk.start + chunk.length == len(prompt):
            flight.prompts.append(job)
        if not chunk.draws:
            return
        allowed = job.mask() if chunk.new else None
        name = "whole" if allowed is None and job.program != "all" else "all"
        known = chunk.known[0] if chunk.known else -1
        taken = seat(
            device.steps, job.request, sequence.output,
            target=chunk.start + chunk.length, index=chunk.first, known=known,
            sampler=device.samplers[name], allowed=allowed, table=table,
        )  # fmt: skip
        self._layout.join(row, sequence.pages)
        flight.firsts.append((job, chunk, device.join(row, taken, name)))
        flight.stepwise |= sequence.stepwise and chunk.new > 0

    def _dispatch_decode(self, flight: Flight) -> None:
        plan, device, layout = flight.plan, self.device, self._layout
        rows: list[int] = []
        names: set[str] = set()
        replays: dict[int, tuple[int, ...]] = {}
        bound: list[tuple[Job, int]] = []
        for entry in plan.decode:
            sequence = entry.sequence
            job, row = self.jobs[sequence.id], sequence.row
            assert row is not None
            layout.grow(row, sequence.pages)
            rows.append(row)
            names.add(job.program)
            if entry.known:
                replays[row] = entry.known
            flight.entries.append((job, entry, row))
            if sequence.stepwise and entry.new:
                flight.stepwise = True
                if job.bound:
                    bound.append((job, row))
        growth, active, known = layout.growth(), layout.active(rows), layout.known(replays)
        if not bound:
            name = max(names, key=DECODES.index)
            flight.decoded = device.decode(growth, active, plan.decode_tokens, known, name)
            return
        device.forward(growth, active)
        allowed = np.full((len(active), -(-device.model.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        answers = np.zeros_like(active)
        for job, row in bound:  # while the device runs the network
            mask = job.mask()
            if mask is not None:
                allowed[row], answers[row] = mask, job.answering
        flight.decoded = device.draw(active, known[0], answers, allowed)

    # Commit

    def _commit(self, flight: Flight, turn: Turn) -> None:
        """Read a flight, hand its tokens out and tell the scheduler: first what was decoded, which is there before the
        chunks are."""
        tokens: dict[int, tuple[int, ...]] = {}
        over: list[tuple[Job, Update]] = []
        failed: list[int] = []

        def take(
            job: Job, entry: Chunk | Decode, column: list[int], values: Mapping[str, np.ndarray], row: int, now: float
        ):
            if job.over:
                return
            ids, broken = emitted_ids(column)
            if broken:
                self._corrupted(job, failed)
            known = len(entry.known)
            update = job.take(ids[known:] if known else ids, broken, values, row, now, self.observer, at=known)
            if update is None:
                return
            tokens[job.sequence.id] = update.tokens
            turn.generated += len(update.tokens)
            if job.over:
                over.append((job, update))
            else:
                self._hand(job, update)

        decoded = distributed.fetch(flight.decoded)
        now = time.perf_counter()
        if flight.entries and self._through is not None:
            self.scheduler.pace((now - max(self._through, flight.begun)) / flight.plan.decode_tokens)
        self._through = None if flight.plan.prefill else now
        if flight.entries:
            columns = decoded["token"][: flight.plan.decode_tokens].T.tolist()
            for job, entry, row in flight.entries:
                take(job, entry, columns[row], decoded, row, now)
        firsts, scores = distributed.fetch(([out for *_, out in flight.firsts], [out for *_, out in flight.scores]))
        now = time.perf_counter()
        for (job, first, count, _), values in zip(flight.scores, scores, strict=True):
            job.take_scores(first, count, values)
        for (job, chunk, _), values in zip(flight.firsts, firsts, strict=True):
            take(job, chunk, values["token"][:, 0].tolist(), values, 0, now)
        ended = [job.sequence.id for job, _ in over]
        for job in flight.prompts:
            if not job.over:
                if job.corrupt:
                    self._corrupted(job, failed)
                over.append((job, job.conclude(now)))
        self.scheduler.commit(flight.plan, tokens, ended, failed)
        for job, update in over:
            self.finish(job, update)

    def _corrupted(self, job: Job, failed: list[int]) -> None:
        """Clean the pages of a sequence whose numbers broke, before the scheduler gives them to somebody else."""
        failed.append(job.sequence.id)
        self.observer.corrupted()
        self.device.scrub(self._layout.table(job.sequence.pages))

    def _hand(self, job: Job, update: Update) -> None:
        try:
            job.listener(update)
        except Exception:
            log.exception("the listener of request %d failed; its request is given up", job.sequence.id)
            self._give_up(job.sequence.id)

"""The engine: requests in from any thread, updates out, and one thread that keeps the device busy in between.

    engine = Engine(load_model(folder), EngineOptions(rows=32)); engine.start()
    ticket = engine.submit(engine.requests.make("The sky is", SamplingParams(max_tokens=16)), print)

submit → inbox → [the engine's thread] scheduler.plan → dispatch → the previous dispatch's tokens → `Reply` → listeners.
The thread dispatches one plan ahead, so that the device computes while the host turns tokens into text. Policy is the
scheduler's, arithmetic the device's; here they meet.
"""

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import numpy as np

from qwen3_jax import distributed
from qwen3_jax.engine.device import Device
from qwen3_jax.engine.job import Grammar, Job
from qwen3_jax.engine.lockstep import Leader
from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.options import EngineOptions
from qwen3_jax.engine.programs import DECODES, STOP_IDS, seat
from qwen3_jax.engine.scheduler import Scheduler
from qwen3_jax.engine.sequence import Chunk, Decode, Plan
from qwen3_jax.engine.updates import EngineError, EngineStopped, Listener, Load, Overloaded, Ticket, TooLarge, Update
from qwen3_jax.loaded import LoadedModel
from qwen3_jax.reply import Completion
from qwen3_jax.request import Prompt, Request, Requests
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.steps import BROKEN, IDLE, Emitted

log = logging.getLogger("qwen3_jax.engine")

T = TypeVar("T")


@dataclass(slots=True)
class _Flight:
    """A plan that was dispatched, and what will come of it."""

    plan: Plan
    entries: list[tuple[Job, Chunk | Decode, int, Emitted]] = field(default_factory=list)  # with the row in `Emitted`
    scores: list[tuple[Job, int, int, Emitted]] = field(default_factory=list)  # with the first position, and how many
    prompts: list[Job] = field(default_factory=list)  # that end with their prompt
    stepwise: bool = False


class Engine:
    """A model that serves many requests at once.

    Attributes:
        model, options: as given.
        requests: makes checked requests.
        failure: what ended the engine's thread, if anything did; every request has had its error by then.
        device: the arrays and programs.
    """

    def __init__(self, model: LoadedModel, options: EngineOptions | None = None, *, observer: Observer | None = None):
        """Allocate the cache; `start` does the rest.

        Raises:
            EngineOptionError: no room for the cache.
        """
        self.model = model
        self.observer = Observer() if observer is None else observer
        self.requests = Requests(model.config, model.tokenizer)
        self.failure: BaseException | None = None
        device = Device(model, EngineOptions() if options is None else options, self.observer)
        self.device = device if jax.process_count() == 1 else Leader(device, self._lost)
        self.options = options = device.options
        self._scheduler = Scheduler(
            rows=options.rows,
            pages=self.device.pages,
            page_tokens=options.page_tokens,
            chunk_tokens=options.chunk,
            decode_tokens=options.decode_tokens,
            prefix_cache=options.prefix_cache,
            deterministic=options.deterministic,
        )
        self._jobs: dict[int, Job] = {}
        self._ids = itertools.count()
        self._flights: deque[_Flight] = deque()
        self._tables = np.full((options.rows, self.device.columns), self.device.pages, np.int32)
        self._filled = [0] * options.rows  # pages of each row that its table names
        self._inbox: deque[Callable[[], None]] = deque()
        self._arriving: dict[int, Job] = {}  # submitted, not yet seen by the thread
        self._calls: set[Future[Any]] = set()
        self._news = threading.Condition()
        self._load = self._measure()
        self._thread: threading.Thread | None = None
        self._stopping = self._draining = False
        self._elsewhere_s = 0.0  # of this turn, spent in calls

    # From any thread

    def start(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile every program, then begin to serve. `progress` is told what is being compiled."""
        self.device.warm_up(progress)
        log.info("compiled %d programs in %.1f s", self.device.compiles, self.device.compile_s)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request,
        listener: Listener,
        *,
        priority: int = 0,
        cache_salt: str = "",
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
        request_id: str = "",
    ) -> Ticket:
        """Ask for a continuation; returns at once.

        Args:
            request: of `requests`.
            listener: hears of its tokens on the engine's thread, and must not block.
            priority: lower runs first.
            cache_salt: prefixes are shared only between requests of the same salt.
            grammar: what the answer must follow, see `text.constraints`; the reasoning before it is free.
            prompt_logprobs: return the prompt's log-probabilities, with this many alternatives, 0 to 20.
            request_id: for logs; a number is taken without it.

        Raises:
            Overloaded: the queue is full.
            EngineStopped: the engine has been stopped, is draining or has failed.
            TooLarge: prompt and max_tokens exceed the whole cache.
            EngineError: more stop ids than a row has room for.
        """
        request = self._fitting(request)
        number = next(self._ids)
        job = Job.of(
            self.model, self.requests.tags, self.device.steps, number, request, listener,
            priority=priority, salt=cache_salt, grammar=grammar, prompt_logprobs=prompt_logprobs,
        )  # fmt: skip
        with self._news:
            if self._stopping or self._draining or self.failure is not None:
                self.observer.rejected("stopped")
                raise EngineStopped(f"the engine {self._why()}: ask another, or later")
            self._make_room(len(request.prompt))
            self._arriving[number] = job
            self._inbox.append(lambda: self._begin(job))
            self._news.notify()
        return Ticket(request_id or str(number), lambda: self._tell(lambda: self._abort(number)))

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function on the engine's thread between two steps; for other work on the device.

        Raises:
            EngineStopped: as for `submit`.
            EngineError: the engine spans several processes.
        """
        if isinstance(self.device, Leader):
            raise EngineError("other work than generation needs a single process: the others do not follow it")
        future: Future[T] = Future()

        def run() -> None:
            began = time.perf_counter()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            self._elsewhere_s += time.perf_counter() - began
            self._calls.discard(future)

        with self._news:
            if self._stopping or self.failure is not None:
                raise EngineStopped(f"the engine {self._why()}: ask another, or later")
            self._calls.add(future)
            self._inbox.append(run)
            self._news.notify()
        return future

    def load(self) -> Load:
        """Return how busy the engine is; cheap."""
        with self._news:
            arriving = sum(len(job.request.prompt) for job in self._arriving.values())
            return replace(
                self._load,
                waiting=self._load.waiting + len(self._arriving),
                waiting_tokens=self._load.waiting_tokens + arriving,
                draining=self._draining,
            )

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait until those under way have ended; says whether they have."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            self._draining = True
            while (self._jobs or self._arriving) and self.failure is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._news.wait(min(left, 0.1))
        return True

    def stop(self) -> None:
        """End what is under way ("abort") and the thread."""
        with self._news:
            self._stopping = True
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join()
        if isinstance(self.device, Leader):
            self.device.close()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, **changes: Any
    ) -> list[Completion]:
        """Continue all prompts and wait; the result is in their order. `params` and `changes` as in `Generator`.

        Raises:
            PromptError, SamplingError: a prompt or a parameter that cannot be run.
            EngineError: see `submit`; a full queue is waited for.
        """
        chosen = self.model.defaults if params is None else params
        each = [chosen] * len(prompts) if isinstance(chosen, SamplingParams) else list(chosen)
        requests = [
            self.requests.make(prompt, p.replace(**changes), name=f"prompt {i}")
            for i, (prompt, p) in enumerate(zip(prompts, each, strict=True))
        ]
        arrived: queue.Queue[tuple[int, Completion]] = queue.Queue()
        done: dict[int, Completion] = {}

        def listener(number: int) -> Listener:
            def hear(update: Update) -> None:
                if update.completion is not None:
                    arrived.put((number, update.completion))

            return hear

        for number, request in enumerate(requests):
            while True:
                try:
                    self.submit(request, listener(number))
                    break
                except Overloaded:
                    i, completion = arrived.get()
                    done[i] = completion
        while len(done) < len(requests):
            i, completion = arrived.get()
            done[i] = completion
        return [done[i] for i in range(len(requests))]

    def _fitting(self, request: Request) -> Request:
        """Hold a request without max_tokens to what the cache can hold; refuse one that asks for more."""
        room = self.device.pages * self.options.page_tokens + 1 - len(request.prompt)
        if request.limit > room:
            if request.params.max_tokens is not None or room < 1:
                raise TooLarge(
                    f"{len(request.prompt)} prompt tokens and up to {request.limit} generated ones, the cache holds "
                    f"{self.device.pages * self.options.page_tokens}: shorten them, or make the cache larger"
                )
            request = replace(request, limit=room)
        if len(request.stop_ids) > STOP_IDS:
            raise EngineError(f"{len(request.stop_ids)} stop token ids: at most {STOP_IDS}")
        return request

    def _make_room(self, tokens: int) -> None:
        """Refuse a request if the queue is full. The caller holds the lock."""
        waiting = self._load.waiting + len(self._arriving)
        if waiting >= self.options.max_waiting:
            self.observer.rejected("queue")
            raise Overloaded(f"{waiting} requests are waiting, at most {self.options.max_waiting}: ask again later")
        if (most := self.options.max_waiting_tokens) is not None:
            ahead = self._load.waiting_tokens + sum(len(job.request.prompt) for job in self._arriving.values())
            if waiting and ahead + tokens > most:
                self.observer.rejected("queue_tokens")
                raise Overloaded(f"{ahead} prompt tokens are waiting, at most {most}: ask again later")

    def _tell(self, message: Callable[[], None]) -> None:
        with self._news:
            self._inbox.append(message)
            self._news.notify()

    def _why(self) -> str:
        return "has failed" if self.failure is not None else "has been stopped" if self._stopping else "is draining"

    # On the engine's thread

    def _run(self) -> None:
        try:
            while True:
                with self._news:
                    while not (self._inbox or self._stopping or self._flights or self._scheduler.has_work):
                        self._news.wait()
                    if self._stopping:
                        break
                self._turn()
            self._end_all("abort", None)
        except BaseException as error:
            if self.failure is not None:
                return  # another process is gone, and everybody has been told
            log.exception("the engine failed")
            self.failure = error
            self._end_all("error", f"the engine failed: {type(error).__name__}: {error}")

    def _turn(self) -> None:
        """Take what came in, dispatch the next plan, and hand out what the one before it computed."""
        began, self._elsewhere_s, waited = time.perf_counter(), 0.0, 0.0
        self._take_in()
        plan = self._scheduler.plan()
        for _ in plan.preempted:
            self.observer.preempted()
        if plan:
            self._flights.append(self._dispatch(plan))
        generated = 0
        # A grammar's next mask needs the last token: nothing can be planned ahead of it.
        ahead = 1 if plan and not self._flights[-1].stepwise else 0
        while len(self._flights) > ahead:
            spent, count = self._commit(self._flights.popleft())
            waited, generated = waited + spent, generated + count
        with self._news:
            self._load = self._measure()
            if self._draining and not self._jobs:
                self._news.notify_all()
        if plan or generated:
            self.observer.step(
                host_s=time.perf_counter() - began - waited - self._elsewhere_s,
                rows=len(plan.decode),
                prompt_tokens=sum(chunk.length for chunk in plan.prefill),
                generated_tokens=generated,
            )

    def _take_in(self) -> None:
        while True:
            with self._news:
                if not self._inbox:
                    return
                message = self._inbox.popleft()
            message()

    def _begin(self, job: Job) -> None:
        with self._news:
            self._arriving.pop(job.sequence.id, None)
        self._jobs[job.sequence.id] = job
        self._scheduler.add(job.sequence)
        with self._news:
            self._load = self._measure()

    def _abort(self, number: int) -> None:
        job = self._jobs.get(number)
        if job is not None:
            self._scheduler.cancel(number)
            self._finish(job, job.give_up("abort", time.perf_counter()))

    def _measure(self) -> Load:
        scheduler = self._scheduler
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_tokens=scheduler.waiting_tokens,
            pages_used=scheduler.pages.total - scheduler.pages.available,
            pages_total=scheduler.pages.total,
        )

    def _dispatch(self, plan: Plan) -> _Flight:
        now = time.perf_counter()
        flight = _Flight(plan)
        for sequence in plan.admitted:
            job = self._jobs[sequence.id]
            if job.admitted is None:
                job.admitted = now
                self.observer.prefix(queried=len(sequence.prompt), hits=sequence.cached)
            assert sequence.row is not None
            self._tables[sequence.row] = self.device.pages
            self._filled[sequence.row] = 0
        if plan.decode:
            self._dispatch_decode(plan, flight)
        for chunk in plan.prefill:
            self._dispatch_chunk(chunk, flight)
        return flight

    def _row(self, entry: Chunk | Decode) -> int:
        """Return the row of an entry, with its table brought up to date."""
        row, pages = entry.sequence.row, entry.sequence.pages
        assert row is not None
        have = self._filled[row]
        if len(pages) > have:
            self._tables[row, have : len(pages)] = pages[have:]
            self._filled[row] = len(pages)
        return row

    def _dispatch_chunk(self, chunk: Chunk, flight: _Flight) -> None:
        job, row, device = self._jobs[chunk.sequence.id], self._row(chunk), self.device
        ids = job.ids(chunk.start, chunk.start + chunk.length)
        device.prefill(self._tables[row].copy(), ids, chunk.start)
        prompt = job.request.prompt
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
            device.steps, job.request, job.sequence.output,
            target=chunk.start + chunk.length, index=chunk.first, known=known,
            sampler=device.samplers[name], allowed=allowed,
        )  # fmt: skip
        out = device.join(row, taken, name)
        flight.entries.append((job, chunk, 0, out))
        flight.stepwise |= job.sequence.stepwise and chunk.new > 0

    def _dispatch_decode(self, plan: Plan, flight: _Flight) -> None:
        options, device = self.options, self.device
        active = np.zeros(options.rows, np.bool_)
        known = np.full((options.decode_tokens, options.rows), -1, np.int32)
        jobs = [self._jobs[entry.sequence.id] for entry in plan.decode]
        rows = [self._row(entry) for entry in plan.decode]
        for entry, row in zip(plan.decode, rows, strict=True):
            active[row] = True
            known[: len(entry.known), row] = entry.known
        name = max((job.program for job in jobs), key=DECODES.index)
        tables = self._tables.copy()
        under_grammar = [(job, row) for job, e, row in zip(jobs, plan.decode, rows, strict=True) if e.new and job.bound]
        if under_grammar:
            device.forward(tables, active)
            allowed = np.full((options.rows, -(-self.model.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
            answers = np.zeros(options.rows, np.bool_)
            for job, row in under_grammar:  # while the device runs the network
                mask = job.mask()
                if mask is not None:
                    allowed[row], answers[row] = mask, job.answering
            out = device.draw(active, known[0], answers, allowed)
        else:
            out = device.decode(tables, active, plan.decode_tokens, known, name)
        for job, entry, row in zip(jobs, plan.decode, rows, strict=True):
            flight.entries.append((job, entry, row, out))
            flight.stepwise |= job.sequence.stepwise and entry.new > 0

    def _commit(self, flight: _Flight) -> tuple[float, int]:
        """Read a flight, hand its tokens out and tell the scheduler; returns the seconds waited, and the tokens."""
        began = time.perf_counter()
        outs = {id(out): out for *_, out in (*flight.entries, *flight.scores)}
        read = {key: distributed.fetch(out) for key, out in outs.items()}
        now = time.perf_counter()
        for job, first, count, out in flight.scores:
            job.take_scores(first, count, read[id(out)])
        tokens: dict[int, list[int]] = {}
        over: list[tuple[Job, Update]] = []
        ended, failed, total = [], [], 0
        for job, entry, row, out in flight.entries:
            if job.over:
                continue
            number, values = job.sequence.id, read[id(out)]
            ids = values["token"][:, row].tolist()
            ids = ids[: ids.index(IDLE)] if IDLE in ids else ids
            if BROKEN in ids:
                failed.append(number)
                self.observer.corrupted()
                self._scrub(job)
            update, new = job.take(ids, len(entry.known), values, row, now, self.observer)
            tokens[number], total = new, total + len(new)
            if job.over:
                over.append((job, update))
                ended.append(number)
            elif update is not None:
                self._hand(job, update)
        for job in flight.prompts:
            if job.over:
                continue
            if job.corrupt:
                failed.append(job.sequence.id)
                self.observer.corrupted()
                self._scrub(job)
            over.append((job, job.conclude(now)))
        self._scheduler.commit(flight.plan, tokens, ended, failed)
        for job, update in over:
            self._finish(job, update)
        return now - began, total

    def _scrub(self, job: Job) -> None:
        """Clean the pages of a sequence that broke, before the scheduler gives them to somebody else."""
        table = np.full(self.device.columns, self.device.pages, np.int32)
        pages = job.sequence.pages
        table[: len(pages)] = pages
        self.device.scrub(table)

    def _finish(self, job: Job, update: Update) -> None:
        """Hand out a job's last update and forget it."""
        if self._jobs.pop(job.sequence.id, None) is None:
            return
        assert update.stats is not None
        assert update.completion is not None
        self.observer.finished(update.stats, finish_reason=update.completion.finish_reason)
        self._hand(job, update)

    def _hand(self, job: Job, update: Update) -> None:
        try:
            job.listener(update)
        except Exception:
            log.exception("the listener of request %d failed; its request is given up", job.sequence.id)
            self._tell(lambda: self._abort(job.sequence.id))

    def _lost(self, reason: str) -> None:
        """Answer everybody when another process is gone, from its watcher's thread: the engine's may wait for ever."""
        if self.failure is None:
            self.failure = distributed.ClusterError(reason)
            self._end_all("error", f"the engine failed: {reason}")

    def _end_all(self, reason: str, error: str | None) -> None:
        """End every request and call; nothing is left without an answer."""
        with self._news:
            self._stopping = True
            calls, self._calls = self._calls, set()
            self._inbox.clear()
            jobs = [*self._jobs.values(), *self._arriving.values()]
            self._jobs, self._arriving = {job.sequence.id: job for job in jobs}, {}
            self._news.notify_all()
        for future in calls:
            if not future.done():
                future.set_exception(EngineStopped(f"the engine {self._why()}"))
        now = time.perf_counter()
        for job in jobs:
            self._finish(job, replace(job.give_up("error" if error else "abort", now), error=error))
        with self._news:
            self._load = replace(self._load, running=0, waiting=0, waiting_tokens=0, pages_used=0)

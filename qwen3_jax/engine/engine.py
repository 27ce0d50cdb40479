"""The engine: requests in from any thread, updates out, and one thread that keeps the device busy in between.

    engine = Engine(load_model(folder), EngineOptions(rows=32)); engine.start()
    ticket = engine.submit(engine.requests.make("The sky is", SamplingParams(max_tokens=16)), print)

submit → inbox → [the engine's thread] `Stepper`: scheduler.plan → dispatch → tokens → `Reply` → listeners. This file is
about the threads: what may be called from where, who waits for whom, and what is left when one fails.
"""

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import jax

from qwen3_jax import distributed
from qwen3_jax.engine.device import Device
from qwen3_jax.engine.job import Grammar, Job
from qwen3_jax.engine.lockstep import Leader
from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.options import EngineOptions
from qwen3_jax.engine.programs import STOP_IDS
from qwen3_jax.engine.stepper import Stepper
from qwen3_jax.engine.updates import EngineError, EngineStopped, Listener, Load, Overloaded, Ticket, TooLarge, Update
from qwen3_jax.loaded import LoadedModel
from qwen3_jax.reply import Completion
from qwen3_jax.request import Prompt, Request, Requests
from qwen3_jax.sampling_params import SamplingParams

log = logging.getLogger("qwen3_jax.engine")

TELLING_S = 1.0  # by then the watcher of the other processes has seen which one is gone, and says it better

T = TypeVar("T")


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
        self._stepper = Stepper(self.device, self.observer, self._abort)
        self._ids = itertools.count()
        self._inbox: deque[Callable[[], None]] = deque()
        self._arriving: dict[int, Job] = {}  # submitted, not yet seen by the thread
        self._calls: set[Future[Any]] = set()
        self._news = threading.Condition()
        self._load = self._stepper.load()
        self._thread: threading.Thread | None = None
        self._stopping = self._draining = False
        self._elsewhere_s = 0.0  # of this turn, spent in calls, on the processor

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
        return Ticket(request_id or str(number), lambda: self._abort(number))

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
            began = time.thread_time()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            self._elsewhere_s += time.thread_time() - began
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
            while (self._stepper.jobs or self._arriving) and self.failure is None:
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

    def _abort(self, number: int) -> None:
        """Let the thread give a request up."""
        with self._news:
            self._inbox.append(lambda: self._stepper.abort(number))
            self._news.notify()

    def _why(self) -> str:
        return "has failed" if self.failure is not None else "has been stopped" if self._stopping else "is draining"

    # On the engine's thread

    def _run(self) -> None:
        try:
            while True:
                with self._news:
                    while not (self._inbox or self._stopping or self._stepper.has_work):
                        self._news.wait()
                    if self._stopping:
                        break
                self._turn()
            self._end_all("abort", None)
        except BaseException as error:
            if isinstance(self.device, Leader):
                time.sleep(TELLING_S)  # a collective breaks at once when a process goes
            if self.failure is not None:
                return  # another process is gone, and everybody has been told
            log.exception("the engine failed")
            self.failure = error
            self._end_all("error", f"the engine failed: {type(error).__name__}: {error}")

    def _turn(self) -> None:
        """Take in what came, and let the stepper take its turn."""
        began, self._elsewhere_s = time.thread_time(), 0.0
        self._take_in()
        turn = self._stepper.turn()
        if turn.plan or turn.generated:
            self.observer.step(
                host_s=time.thread_time() - began - self._elsewhere_s,
                rows=len(turn.plan.decode),
                prompt_tokens=sum(chunk.length for chunk in turn.plan.prefill),
                generated_tokens=turn.generated,
            )
        with self._news:  # who sees the load of after a turn finds the turn observed
            self._load = self._stepper.load()
            if self._draining and not self._stepper.jobs:
                self._news.notify_all()

    def _take_in(self) -> None:
        while True:
            with self._news:
                if not self._inbox:
                    return
                message = self._inbox.popleft()
            message()

    def _begin(self, job: Job) -> None:
        self._stepper.begin(job)
        with self._news:  # counted once at any moment
            self._arriving.pop(job.sequence.id, None)
            self._load = self._stepper.load()

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
            self._stepper.jobs.update(self._arriving)
            self._arriving = {}
            jobs = [*self._stepper.jobs.values()]
            self._news.notify_all()
        for future in calls:
            if not future.done():
                future.set_exception(EngineStopped(f"the engine {self._why()}"))
        now = time.perf_counter()
        for job in jobs:
            self._stepper.finish(job, job.give_up("error" if error else "abort", now)._replace(error=error))
        with self._news:
            self._load = replace(self._load, running=0, waiting=0, waiting_tokens=0, pages_used=0)

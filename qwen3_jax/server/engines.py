"""The engine that serves a loaded model: `Engine`, or for a network without lm_head one that only embeds."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from qwen3_jax.engine.engine import Engine
from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.options import EngineOptions
from qwen3_jax.engine.updates import EngineStopped, Load
from qwen3_jax.loaded import LoadedModel

T = TypeVar("T")


def engine_for(
    model: LoadedModel, options: EngineOptions | None = None, *, observer: Observer | None = None
) -> "Engine | PoolingEngine":
    """Return an engine to `start`; `options` are for one that generates. Raises as `Engine` does."""
    return PoolingEngine(model, observer=observer) if model.backbone else Engine(model, options, observer=observer)


class PoolingEngine:
    """What `Engine` is to a server, without generation: a thread that keeps the calls of the device in order.

    There is no cache, and nothing to compile here: the programs are `pooling.Pooler`'s. Routes that generate
    refuse before they come here, see `asking.begin`.
    """

    failure: BaseException | None = None  # a call that fails is its caller's; the thread goes on

    def __init__(self, model: LoadedModel, *, observer: Observer | None = None):
        """Take a model."""
        self.model = model
        self.observer = Observer() if observer is None else observer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._calls = 0  # that have not ended
        self._lock = threading.Lock()

    def start(self, progress: Callable[[str], None] | None = None) -> None:
        """Begin: at once."""

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function on the engine's thread.

        Raises:
            EngineStopped: the engine has been stopped.
        """
        with self._lock:
            try:
                future = self._thread.submit(function)
            except RuntimeError:
                raise EngineStopped("the engine has been stopped: ask another, or later") from None
            self._calls += 1
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: "Future[Any]") -> None:
        with self._lock:
            self._calls -= 1

    def load(self) -> Load:
        """Return how many calls run and wait."""
        calls = self._calls
        return Load(running=min(calls, 1), waiting=max(0, calls - 1), waiting_tokens=0, pages_used=0, pages_total=0)

    def stop(self) -> None:
        """End the thread; what waits is given up."""
        self._thread.shutdown(cancel_futures=True)

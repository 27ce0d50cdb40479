"""A request to stop, from a signal: the loop asks `stop.requested` between steps, saves, and ends.

SIGTERM (a preempted machine, a scheduler) and SIGINT (Ctrl-C) ask; a second SIGINT interrupts at once. A run that
stopped because it was asked exits with EXIT_STOPPED, so that whoever started it can tell "go on later" from "done".
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

EXIT_STOPPED = 143  # 128 + SIGTERM, what a shell reports of a process that ended by it

log = logging.getLogger(__name__)


class Stop:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.by = ""  # the signal's name

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self, by: str) -> None:
        """Ask, as a signal does."""
        self.by = by
        self._event.set()

    def agreed(self) -> bool:
        """Say whether any process was asked; all call this together, after the same step."""
        if jax.process_count() == 1:
            return self.requested
        return bool(multihost_utils.process_allgather(np.int32(self.requested)).any())


@contextmanager
def watch() -> Iterator[Stop]:
    """Turn SIGTERM and SIGINT into a request while the body runs; off the main thread there is nothing to catch."""
    stop = Stop()

    def heard(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        log.warning("%s: saving and stopping after this step", name)
        stop.request(name)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

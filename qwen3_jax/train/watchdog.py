"""End a process that hangs, and say where: a step that never returns, a loader that never delivers.

`with watchdog("step"):` around what may hang. When a phase takes longer than its timeout, the stacks of all threads are
written and the process exits with EXIT_HUNG; whoever started it starts it again, and it goes on from its checkpoint.
A thread does this; when it cannot run because native code holds the interpreter, a timer inside `faulthandler`, which
needs no interpreter, writes the stacks and ends the process GRACE_S later, with code 1.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

EXIT_HUNG = 124  # as timeout(1) has it
GRACE_S = 5.0
REARM_S = 1.0  # faulthandler's timer is a thread: it is not started anew for every short phase

log = logging.getLogger(__name__)


class Watchdog:
    """Watches one phase at a time, on the thread that trains."""

    def __init__(self, timeout_s: float, *, stacks: Path | None = None, leave: Callable[[int], object] = os._exit):
        """Start to watch; `close` ends it.

        Args:
            timeout_s: the longest that a phase may take; 0 watches nothing.
            stacks: file that the stacks are appended to, besides stderr.
            leave: ends the process.
        """
        self.timeout_s = timeout_s
        self._stacks, self._leave = stacks, leave
        self._phase: tuple[str, float, float] | None = None  # name, when it began, how long it may take
        self._armed_until = 0.0
        self._changed = threading.Condition()
        self._closed = False
        # Kept open: a full table of descriptors must not keep the stacks from being written.
        self._file: IO[str] | None = open(stacks, "a") if stacks else sys.__stderr__  # noqa: SIM115
        if timeout_s:
            threading.Thread(target=self._run, name="qwen3_jax watchdog", daemon=True).start()

    @contextmanager
    def __call__(self, name: str, timeout_s: float | None = None) -> Iterator[None]:
        """Watch the body, named `name`; a timeout of its own is for the first step, which compiles."""
        allowed = self.timeout_s if timeout_s is None else timeout_s
        if not self.timeout_s or not allowed:
            yield
            return
        outer = self._phase
        self._enter((name, time.monotonic(), allowed))
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, phase: tuple[str, float, float] | None) -> None:
        with self._changed:
            self._phase = phase
            self._changed.notify()
        if phase is None:
            if self._armed_until:
                faulthandler.cancel_dump_traceback_later()
                self._armed_until = 0.0
            return
        until = phase[1] + phase[2] + GRACE_S
        if abs(until - self._armed_until) > REARM_S:
            left = max(0.1, until - time.monotonic())
            if self._file is not None:
                faulthandler.dump_traceback_later(left, exit=True, file=self._file)
            self._armed_until = until

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                if self._phase is None:
                    self._changed.wait()
                    continue
                name, began, allowed = self._phase
                left = began + allowed - time.monotonic()
                if left > 0:
                    self._changed.wait(min(left, 1.0))
                    continue
                self._bark(name, allowed)
                return

    def _bark(self, name: str, allowed: float) -> None:
        text = f"{name} has taken more than {allowed:g} s: stacks follow, exit {EXIT_HUNG}\n"
        for file in {self._file, sys.__stderr__}:
            if file is not None:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        self._leave(EXIT_HUNG)

    def close(self) -> None:
        """Watch no longer."""
        self._enter(None)
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._stacks is not None and self._file is not None:
            self._file.close()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

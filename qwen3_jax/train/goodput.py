"""Where the time of a run goes, over all its restarts: goodput is the share that went into steps that count.

`with goodput("step"):` times a category; what is in none is "other", and an inner one is not counted in the outer. Each
process of the run appends lines to one JSONL file:

    {"start": 1712.5, "at": 1720.1, "step": 40, "seconds": {"start": 5.1, "compile": 1.2, "step": 4.0, ...}}

`summary` adds them up. Between the last line of one process and the start of the next is "down"; the step time of one
process that the next had to repeat, because it was not saved, is "repeated". Categories as in ml-goodput-measurement.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CATEGORIES = ("start", "restore", "compile", "data", "step", "evaluate", "save", "other")
PRODUCTIVE = "step"


class Goodput:
    """Times one process of a run, from `began` on."""

    def __init__(self, path: Path | None, *, began: float | None = None, every_s: float = 1.0):
        """Begin.

        Args:
            path: of the JSONL file; None keeps nothing.
            began: seconds since the epoch; what has passed since is "start". None: when the process was started.
            every_s: at least so long between lines, and a thousandth of the time since the start: a day has some
                thousands of them.
        """
        now = time.time()
        self._start = process_start(now) if began is None else began
        self._path, self._every_s = path, every_s
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._seconds["start"] = now - self._start
        self._mark = time.perf_counter()
        self._open: list[str] = ["other"]
        self._written = -every_s
        self._file: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @contextmanager
    def __call__(self, category: str) -> Iterator[None]:
        """Time the body under a category."""
        if category not in CATEGORIES:
            raise ValueError(f"goodput has no category {category!r}: use one of {', '.join(CATEGORIES)}")
        self._turn()
        self._open.append(category)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._mark
        self._mark = now

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each category so far; their sum is the time since the start."""
        self._turn()
        return {category: self._seconds[category] for category in CATEGORIES}

    def record(self, step: int, *, now: bool = False) -> None:
        """Append a line if `every_s` has passed since the last, or `now`.

        Args:
            step: the last step that was made; the first line of a process, with the step it goes on from, says what of
                the one before it is repeated.
            now: at the first line, the last, and each save.
        """
        at, age_s = time.perf_counter(), time.time() - self._start
        if self._file is None or (at - self._written < max(self._every_s, age_s / 1000) and not now):
            return
        self._written = at
        seconds = {category: round(value, 6) for category, value in self.seconds().items()}
        line = {"start": self._start, "at": self._start + sum(seconds.values()), "step": step, "seconds": seconds}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def process_start(now: float) -> float:
    """Return when this process was started, in seconds since the epoch; `now` where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, since boot
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
        return now - (uptime_s - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return now


def summary(path: Path) -> dict[str, Any]:
    """Add up the processes of a run.

    Returns:
        {"wall_s", "seconds": {category: seconds}, "goodput", "processes"}: "seconds" has CATEGORIES, "down" and
        "repeated", and adds up to the wall time.
    """
    processes: dict[float, list[dict[str, Any]]] = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
            processes.setdefault(line["start"], []).append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a process that was killed
    if not processes:
        raise ValueError(f"{path}: no lines")
    runs = [processes[start] for start in sorted(processes)]
    seconds: defaultdict[str, float] = defaultdict(float)
    for lines in runs:
        for category, value in lines[-1]["seconds"].items():
            seconds[category] += value
    for lines, after in itertools.pairwise(runs):
        seconds["down"] += max(0.0, after[0]["start"] - lines[-1]["at"])
        resumed = after[0]["step"]
        kept = max((line["seconds"][PRODUCTIVE] for line in lines if line["step"] <= resumed), default=0.0)
        repeated = lines[-1]["seconds"][PRODUCTIVE] - kept
        seconds["repeated"] += repeated
        seconds[PRODUCTIVE] -= repeated
    wall_s = runs[-1][-1]["at"] - runs[0][0]["start"]
    return {
        "wall_s": wall_s,
        "seconds": dict(seconds),
        "goodput": seconds[PRODUCTIVE] / wall_s if wall_s else 0.0,
        "processes": len(runs),
    }

"""When the instructions of a compiled program run: an in-order walk over priced instructions.

HBM, MXU and ICI are one pipe each. Asynchronous copies and collectives occupy their pipe from -start and are waited for
at -done; within one instruction the pipes overlap.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3_jax.plan.chips import Chip
from qwen3_jax.plan.hlo import Instruction


@dataclass
class Op:
    """A priced instruction: what it puts on each pipe per execution."""

    instruction: Instruction
    hbm_bytes: float = 0.0
    flops: float = 0.0
    compute_s: float = 0.0
    ici_bytes: float = 0.0
    ici_s: float = 0.0
    kind: str | None = None
    forward: bool | None = None
    """Of a permute: which way round it goes; None if both directions are in use."""
    waits_for: str | None = None
    starts_as: str | None = None
    """Set if the pipes work on after the instruction; the name under which it is waited for."""
    loop: tuple[list["Op"], int] | None = None
    branches: list[list["Op"]] | None = None
    unpriced: str | None = None
    """Why its cost is not all here."""


PIPES = ("hbm", "mxu", "ici", "back")


@dataclass
class Clock:
    now: float = 0.0
    hbm: float = 0.0
    mxu: float = 0.0
    ici: float = 0.0
    back: float = 0.0
    """The links of the other direction: a permute uses one direction, all other collectives both."""
    done: dict[str, float] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return max(self.now, self.hbm, self.mxu, self.ici, self.back)


def run(ops: Sequence[Op], clock: Clock, chip: Chip) -> None:
    """Advance the clock over instructions in their order."""
    for op in ops:
        if op.loop is not None:
            body, trips = op.loop
            steady = 0.0
            for _ in range(min(trips, 2)):  # the second round is typical: its prefetches were issued by the first
                before = clock.now
                run(body, clock, chip)
                steady = clock.now - before
            skipped = steady * max(trips - 2, 0)
            clock.now += skipped
            for pipe in PIPES:
                setattr(clock, pipe, getattr(clock, pipe) + skipped)
        elif op.branches is not None:
            outcomes = []
            for branch in op.branches:
                outcome = dataclasses.replace(clock, done=dict(clock.done))
                run(branch, outcome, chip)
                outcomes.append(outcome)
            worst = max(outcomes, key=lambda c: c.now)
            clock.now = worst.now
            for pipe in PIPES:
                setattr(clock, pipe, getattr(worst, pipe))
        else:
            if op.waits_for is not None:
                clock.now = max(clock.now, clock.done.pop(op.waits_for, clock.now))
            ends = [clock.now]
            links = {None: ("ici", "back"), True: ("ici",), False: ("back",)}[op.forward]
            for pipes, seconds in (
                (("hbm",), op.hbm_bytes / chip.hbm_bytes_s),
                (("mxu",), op.compute_s),
                (links, op.ici_s),
            ):
                if seconds:
                    end = max(clock.now, *(getattr(clock, pipe) for pipe in pipes)) + seconds
                    for pipe in pipes:
                        setattr(clock, pipe, end)
                    ends.append(end)
            if op.starts_as is not None:
                clock.done[op.starts_as] = max(ends)
            else:
                clock.now = max(ends)

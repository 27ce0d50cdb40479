"""When the instructions of a compiled program run: an in-order walk over priced instructions.

HBM and MXU are one pipe each, and so is every link, see `wires`. Asynchronous copies and collectives occupy their pipes
from -start and are waited for at -done; within one instruction the pipes overlap.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qwen3_jax.plan.chips import Chip
from qwen3_jax.plan.hlo import Instruction
from qwen3_jax.plan.wires import Wire


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
    wires: frozenset[Wire] = frozenset()
    """Of a collective: which links are in use."""
    waits_for: str | None = None
    starts_as: str | None = None
    """Set if the pipes work on after the instruction; the name under which it is waited for."""
    loop: tuple[list["Op"], int] | None = None
    branches: list[list["Op"]] | None = None
    unpriced: str | None = None
    """Why its cost is not all here."""


@dataclass
class Clock:
    now: float = 0.0
    pipes: dict[str | Wire, float] = field(default_factory=dict)
    """When each pipe that was in use is free: "hbm", "mxu", and the links."""
    done: dict[str, float] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return max(self.now, *self.pipes.values()) if self.pipes else self.now

    def occupy(self, pipes: Iterable[str | Wire], seconds: float) -> float:
        """Occupy some pipes together from when all are free; returns until when."""
        pipes = list(pipes)
        end = max(self.now, *(self.pipes.get(pipe, 0.0) for pipe in pipes)) + seconds
        self.pipes.update(dict.fromkeys(pipes, end))
        return end


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
            clock.pipes = {pipe: end + skipped for pipe, end in clock.pipes.items()}
        elif op.branches is not None:
            outcomes = []
            for branch in op.branches:
                outcome = dataclasses.replace(clock, pipes=dict(clock.pipes), done=dict(clock.done))
                run(branch, outcome, chip)
                outcomes.append(outcome)
            worst = max(outcomes, key=lambda c: c.now)
            clock.now, clock.pipes = worst.now, worst.pipes
        else:
            if op.waits_for is not None:
                clock.now = max(clock.now, clock.done.pop(op.waits_for, clock.now))
            ends = [clock.now]
            for pipes, seconds in (
                (("hbm",), op.hbm_bytes / chip.hbm_bytes_s),
                (("mxu",), op.compute_s),
                (op.wires, op.ici_s),
            ):
                if seconds:
                    ends.append(clock.occupy(pipes, seconds))
            if op.starts_as is not None:
                clock.done[op.starts_as] = max(ends)
            else:
                clock.now = max(ends)

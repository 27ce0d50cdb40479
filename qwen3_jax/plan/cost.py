"""What a compiled program costs: a walk over its scheduled HLO.

`hlo.parse` → `walk(module, chip)` → `Cost`: FLOPs, HBM bytes, ICI bytes by kind of collective, copies of parameters,
and two times: each pipe alone, and an in-order schedule in which they overlap as the compiler arranged.

The rules, each with a test:
    HBM        operands and results in memory space 0 only (VMEM is free), sizes padded to whole tiles. A slice, a
               gather and an update in place cost the slice, inside fusions too. An asynchronous copy costs once,
               and so does what a collective sends and fills, whichever fusions hand it on meanwhile.
    MXU        matrix products and convolutions, 2 FLOPs per multiply-add, counting valid window positions only.
               Elementwise work is free.
    ICI        a ring per group of n chips with both directions in use (two links): all-reduce 2(n-1)/n of the array,
               all-gather, reduce-scatter (n-1)/n; all-to-all travels n/4 hops; a group of two has one link, and so
               has a permute: two permutes in opposite directions run at once. So do collectives along different axes
               of the torus, where the program's devices are known: they use different wires. GPUs send the same bytes
               through a switch, over all their links. No latency, and every ring is closed, though in slices smaller
               than a pod (v5p: than 4x4x4) the ends of an axis are not joined.
    control    loop bodies times their trip count, once if that is known at run time only, never if the program says by
               the loop's name that it is not expected to run (`moe.UNLIKELY`); conditionals at their dearest branch.
    Pallas     kernels cost what their CostEstimate says. Splash attention has none and is counted, see `kernels`; any
               other without one is billed for its operands and results and listed in `unpriced`.
    schedule   instructions run in order. HBM and MXU are one pipe each, and every link is one; asynchronous copies
               and collectives occupy their pipes from -start and are waited for at -done; within a fusion the pipes
               overlap. `ici_s` is that of the busiest link.

This is a static model of one chip of an SPMD program. It knows no latency, no launch overhead, no vector unit, no
partly filled matrix unit: its times are lower bounds for the program at hand.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

from qwen3_jax.ops.moe import UNLIKELY
from qwen3_jax.plan.chips import Chip
from qwen3_jax.plan.counting import trip_count
from qwen3_jax.plan.hlo import Computation, Instruction, Module
from qwen3_jax.plan.moves import Move, Origins, bind, by_array, moves, not_donated, origin
from qwen3_jax.plan.pricing import Prices
from qwen3_jax.plan.schedule import Clock, Op, run
from qwen3_jax.plan.wires import Places, Wire


@dataclass
class Collectives:
    """Collectives of one kind: how many run in a step, and the bytes that each chip sends in them."""

    count: int = 0
    bytes: float = 0.0


@dataclass
class Cost:
    """What one step costs one chip."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    ici_bytes: float = 0.0
    compute_s: float = 0.0
    hbm_s: float = 0.0
    ici_s: float = 0.0
    schedule_s: float = 0.0
    collectives: dict[str, Collectives] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    gathered: list[Move] = field(default_factory=list)
    """Parameters or cache arrays sent whole or in part over the ICI."""
    not_donated: list[Move] = field(default_factory=list)
    """What the step should overwrite and does not."""
    unpriced: list[str] = field(default_factory=list)
    """Kernels without CostEstimate: what the numbers above miss."""
    billed_once: list[str] = field(default_factory=list)
    """Loops whose length is known when they run: of decoding a round is a token; of the experts one is all that a fair
    router needs."""
    not_billed: list[str] = field(default_factory=list)
    """Loops that are not expected to run: rounds of the experts after the first, see `moe.sum_of_rounds`."""
    lines: list["Line"] = field(default_factory=list)

    @property
    def copied_bytes(self) -> int:
        return sum(move.bytes * move.times for move in self.moves)

    def touched(self) -> list[tuple[str, str, int, int]]:
        """Return what happens to weights and cache in the step that need not, see `moves.by_array`."""
        return by_array([*self.moves, *self.gathered, *self.not_donated])

    @property
    def bound(self) -> str:
        """The pipe that needs longest: "compute", "hbm" or "ici"."""
        return max(("compute", "hbm", "ici"), key=lambda pipe: getattr(self, f"{pipe}_s"))

    def dearest(self, count: int = 20) -> list["Line"]:
        """Return the instructions that take longest, those alike added up."""
        groups: dict[tuple[str, str], Line] = {}
        for line in self.lines:
            key = (line.opcode, line.op_name or line.name.split(".")[0])
            if key in groups:
                same = groups[key]
                groups[key] = dataclasses.replace(
                    same,
                    times=same.times + line.times,
                    hbm_s=same.hbm_s + line.hbm_s,
                    compute_s=same.compute_s + line.compute_s,
                    ici_s=same.ici_s + line.ici_s,
                )
            else:
                groups[key] = line
        return sorted(groups.values(), key=lambda g: -max(g.hbm_s, g.compute_s, g.ici_s))[:count]


@dataclass(frozen=True)
class Line:
    """One instruction's share of a step, over all its executions."""

    name: str
    opcode: str
    op_name: str
    times: int
    hbm_s: float
    compute_s: float
    ici_s: float


def walk(module: Module, chip: Chip, *, partitions: int, places: Places = ()) -> Cost:
    """Price one step of a compiled module on one chip of `partitions`; without places all links are of one axis."""
    walker = _Walker(module, chip, partitions, places)
    entry = module.entry
    origins: Origins = {p.name: (number,) for number, p in enumerate(entry.parameters)}
    ops = walker.computation(entry, origins, times=1)
    clock = Clock()
    run(ops, clock, chip)
    cost = walker.cost
    cost.not_donated = not_donated(module)
    cost.ici_s = max(walker.ici_s.values(), default=0.0)
    cost.hbm_s = cost.hbm_bytes / chip.hbm_bytes_s
    cost.schedule_s = clock.end
    return cost


class _Walker:
    def __init__(self, module: Module, chip: Chip, partitions: int, places: Places):
        self.module, self.chip = module, chip
        self.prices = Prices(module, chip, partitions, places)
        self.cost = Cost()
        self.ici_s: Counter[Wire] = Counter()
        """Seconds on each link."""

    def computation(self, computation: Computation, origins: Origins, *, times: int) -> list[Op]:
        """Price the instructions of a computation that runs `times` times in a step, and add them to the cost."""
        ops = []
        for instruction in computation.instructions.values():
            op = self.instruction(computation, instruction, origins, times)
            if instruction.name not in origins:
                origins[instruction.name] = origin(self.module, instruction, origins)
            moved, gathered = moves(self.module, instruction, origins, times)
            self.cost.moves += moved
            self.cost.gathered += gathered
            if op is None:
                continue
            ops.append(op)
            if op.unpriced is not None:
                self.cost.unpriced.append(op.unpriced)
            if op.loop is not None or op.branches is not None:
                continue
            cost, chip = self.cost, self.chip
            cost.flops += op.flops * times
            cost.hbm_bytes += op.hbm_bytes * times
            cost.ici_bytes += op.ici_bytes * times
            cost.compute_s += op.compute_s * times
            self.ici_s.update(dict.fromkeys(op.wires, op.ici_s * times))
            if op.kind is not None:
                entry = cost.collectives.setdefault(op.kind, Collectives())
                entry.count += times
                entry.bytes += op.ici_bytes * times
            if op.hbm_bytes or op.flops or op.ici_s:
                cost.lines.append(
                    Line(
                        instruction.name,
                        instruction.opcode,
                        instruction.op_name,
                        times,
                        op.hbm_bytes * times / chip.hbm_bytes_s,
                        op.compute_s * times,
                        op.ici_s * times,
                    )
                )
        return ops

    def instruction(
        self, computation: Computation, instruction: Instruction, origins: Origins, times: int
    ) -> Op | None:
        opcode = instruction.opcode
        if opcode == "while":
            return self._loop(computation, instruction, origins, times)
        if opcode == "conditional":
            return self._conditional(instruction, origins, times)
        if opcode == "call":
            body = self._called(instruction, "to_apply")
            inner = bind(body, instruction, origins)
            return Op(instruction, loop=(self.computation(body, inner, times=times), 1))
        return self.prices.op(computation, instruction)

    def _called(self, instruction: Instruction, key: str) -> Computation:
        return self.module.computations[instruction.called(key) or ""]

    def _loop(self, computation: Computation, instruction: Instruction, origins: Origins, times: int) -> Op:
        body = self._called(instruction, "body")
        trips = trip_count(self.module, computation, instruction)
        if trips is None:
            trips = 0 if UNLIKELY in instruction.op_name else 1
            unknown = self.cost.billed_once if trips else self.cost.not_billed
            unknown.append(instruction.op_name or instruction.name)
        inner = bind(body, instruction, origins)
        return Op(instruction, loop=(self.computation(body, inner, times=times * trips), trips))

    def _conditional(self, instruction: Instruction, origins: Origins, times: int) -> Op:
        names = instruction.attribute("branch_computations")
        if names is not None:
            branches = [name.strip().removeprefix("%") for name in names.strip("{}").split(",")]
        else:
            branches = [instruction.called(f"{which}_computation") or "" for which in ("true", "false")]
        total, ici_s, priced = self.cost, self.ici_s, []
        for number, name in enumerate(branches):
            self.cost, self.ici_s = Cost(), Counter()
            body = self.module.computations[name]
            operand = instruction.operands[number + 1] if number + 1 < len(instruction.operands) else ""
            inner = {body.parameters[0].name: origins.get(operand, (None,))} if body.parameters else {}
            ops = self.computation(body, inner, times=times)
            clock = Clock()
            run(ops, clock, self.chip)
            priced.append((clock.end, ops, self.cost, self.ici_s))
        _, _, dearest, links = max(priced, key=lambda p: p[0])
        self.cost, self.ici_s = _sum(total, dearest), ici_s + links
        return Op(instruction, branches=[ops for _, ops, _, _ in priced])


def _sum(one: Cost, other: Cost) -> Cost:
    for key in ("flops", "hbm_bytes", "ici_bytes", "compute_s"):
        setattr(one, key, getattr(one, key) + getattr(other, key))
    for kind, counted in other.collectives.items():
        entry = one.collectives.setdefault(kind, Collectives())
        entry.count += counted.count
        entry.bytes += counted.bytes
    for key in ("moves", "gathered", "unpriced", "billed_once", "not_billed", "lines"):
        getattr(one, key).extend(getattr(other, key))
    return one

"""What a compiled program costs: a walk over its scheduled HLO.

`hlo.parse` → `walk(module, chip)` → `Cost`: FLOPs, HBM bytes, ICI bytes by kind of collective, copies of parameters,
and two times: each pipe alone, and an in-order schedule in which they overlap as the compiler arranged.

The rules, each with a test:
    HBM        operands and results in memory space 0 only (VMEM is free), sizes padded to whole tiles. A slice, a
               gather and an update in place cost the slice, inside fusions too. An asynchronous copy costs once.
    MXU        matrix products and convolutions, 2 FLOPs per multiply-add, counting valid window positions only.
               Elementwise work is free.
    ICI        a ring per group of n chips with both directions in use (two links): all-reduce 2(n-1)/n of the array,
               all-gather, reduce-scatter (n-1)/n; all-to-all travels n/4 hops; a group of two has one link, and so
               has a permute: two permutes in opposite directions run at once. GPUs send the same bytes through a
               switch, over all their links. No latency.
    control    loop bodies times their trip count, once if that is known at run time only; conditionals at their dearest
               branch.
    Pallas     kernels cost what their CostEstimate says; one without is billed for its operands and results and
               listed in `unpriced`.
    schedule   instructions run in order. HBM, MXU and ICI are one pipe each; asynchronous copies and collectives
               occupy their pipe from -start and are waited for at -done; within a fusion the pipes overlap.

This is a static model of one chip of an SPMD program. It knows no latency, no launch overhead, no vector unit, no
partly filled matrix unit: its times are lower bounds for the program at hand.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen3_jax.plan.chips import Chip
from qwen3_jax.plan.hlo import HBM, Computation, Instruction, Module, Shape, group_size, leaves

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
    | {"add-dependency", "opt-barrier", "get-dimension-size"}
)
VIEWS = frozenset({"ConcatBitcast", "SliceBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding"})
MOVES = frozenset(["copy", "transpose", "reshape", "bitcast", "convert", "slice", "dynamic-slice"])
THROUGH = frozenset(["copy", "transpose", "reshape", "bitcast", "convert"])
SMALL = 64 << 10
"""Moves of a parameter below this many bytes are not reported: norms, rope tables."""


@dataclass
class Collectives:
    """Collectives of one kind: how many run in a step, and the bytes that each chip sends in them."""

    count: int = 0
    bytes: float = 0.0


@dataclass(frozen=True)
class Move:
    """A copy, relayout or gather of a parameter or of the cache inside the step."""

    instruction: str
    opcode: str
    parameter: int
    bytes: int
    times: int
    op_name: str


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
    unpriced: list[str] = field(default_factory=list)
    """Kernels without CostEstimate: what the numbers above miss."""
    billed_once: list[str] = field(default_factory=list)
    """Loops whose length is known when they run: of decoding a round is a token; of the experts one is all that a fair
    router needs."""
    lines: list["Line"] = field(default_factory=list)

    @property
    def copied_bytes(self) -> int:
        return sum(move.bytes * move.times for move in self.moves)

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


@dataclass
class _Op:
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
    loop: tuple[list["_Op"], int] | None = None
    branches: list[list["_Op"]] | None = None


PIPES = ("hbm", "mxu", "ici", "back")


@dataclass
class _Clock:
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


Origins = dict[str, tuple[int | None, ...]]
"""For each instruction, for each leaf of its result, the entry parameter that it is or was moved from."""


def walk(module: Module, chip: Chip, *, partitions: int) -> Cost:
    """Price one step of a compiled module on one chip of `partitions`."""
    walker = _Walker(module, chip, partitions)
    entry = module.entry
    origins: Origins = {p.name: (number,) for number, p in enumerate(entry.parameters)}
    ops = walker.computation(entry, origins, times=1)
    clock = _Clock()
    _run(ops, clock, chip)
    cost = walker.cost
    cost.ici_s = walker.ici_s[None] + max(walker.ici_s[True], walker.ici_s[False])
    cost.hbm_s = cost.hbm_bytes / chip.hbm_bytes_s
    cost.schedule_s = clock.end
    return cost


def _run(ops: Sequence[_Op], clock: _Clock, chip: Chip) -> None:
    """Advance the clock over instructions in their order."""
    for op in ops:
        if op.loop is not None:
            body, trips = op.loop
            steady = 0.0
            for _ in range(min(trips, 2)):  # the second round is typical: its prefetches were issued by the first
                before = clock.now
                _run(body, clock, chip)
                steady = clock.now - before
            skipped = steady * max(trips - 2, 0)
            clock.now += skipped
            for pipe in PIPES:
                setattr(clock, pipe, getattr(clock, pipe) + skipped)
        elif op.branches is not None:
            outcomes = []
            for branch in op.branches:
                outcome = dataclasses.replace(clock, done=dict(clock.done))
                _run(branch, outcome, chip)
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


class _Walker:
    def __init__(self, module: Module, chip: Chip, partitions: int):
        self.module, self.chip, self.partitions = module, chip, partitions
        self.cost = Cost()
        self.ici_s: dict[bool | None, float] = {None: 0.0, True: 0.0, False: 0.0}
        """Seconds on the links, by direction."""
        self._reads: dict[tuple[str, int], int | None] = {}
        self._open: set[str] = set()
        """Channels of asynchronous collectives that have started and are not waited for yet."""

    def computation(self, computation: Computation, origins: Origins, *, times: int) -> list[_Op]:
        """Price the instructions of a computation that runs `times` times in a step, and add them to the cost."""
        ops = []
        for instruction in computation.instructions.values():
            op = self.instruction(computation, instruction, origins, times)
            if instruction.name not in origins:
                origins[instruction.name] = self._origin(computation, instruction, origins)
            self._record_moves(computation, instruction, origins, times)
            if op is None:
                continue
            ops.append(op)
            if op.loop is not None or op.branches is not None:
                continue
            cost, chip = self.cost, self.chip
            cost.flops += op.flops * times
            cost.hbm_bytes += op.hbm_bytes * times
            cost.ici_bytes += op.ici_bytes * times
            cost.compute_s += op.compute_s * times
            self.ici_s[op.forward] += op.ici_s * times
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
    ) -> _Op | None:
        opcode = instruction.opcode
        if opcode in FREE:
            return None
        if opcode == "while":
            return self._loop(computation, instruction, origins, times)
        if opcode == "conditional":
            return self._conditional(computation, instruction, origins, times)
        if opcode == "call":
            body = self._called(instruction, "to_apply")
            inner = self._bind(body, instruction, origins)
            return _Op(instruction, loop=(self.computation(body, inner, times=times), 1))
        if opcode.endswith("-done"):
            return _Op(instruction, waits_for=instruction.operands[0])
        if opcode.endswith("-update"):
            return None
        starts = opcode.endswith("-start")
        opcode = opcode.removesuffix("-start")
        if (starts and opcode in ("async", "call")) or (starts and instruction.called("calls")):
            body = self._called(instruction, "calls")
            op = self._fused(instruction, body, computation)
        elif opcode in COLLECTIVES:
            op = self._collective(computation, instruction, opcode, starts)
        elif starts:
            op = self._copy_start(computation, instruction, opcode)
        elif opcode == "fusion":
            op = self._fused(instruction, self._called(instruction, "calls"), computation)
        elif opcode == "custom-call":
            op = self._custom_call(computation, instruction)
        else:
            op = _Op(instruction, hbm_bytes=self._plain_bytes(computation, instruction))
            if opcode in ("dot", "convolution"):
                self._add_product(op, computation, instruction)
        if op is not None and starts:
            op.starts_as = instruction.name
        return op

    # Bytes

    def _operands(self, computation: Computation, instruction: Instruction) -> list[Instruction]:
        return [computation.instructions[name] for name in dict.fromkeys(instruction.operands)]

    def _plain_bytes(self, computation: Computation, instruction: Instruction) -> int:
        """Price an instruction that stands alone, not in a fusion."""
        operands = [computation.instructions[name] for name in instruction.operands]
        written = sum(leaf.bytes_in(HBM) for leaf in leaves(instruction.shape))
        opcode = instruction.opcode
        if opcode in ("slice", "dynamic-slice", "gather"):
            source = operands[0].array
            read = _size_like(source, instruction.array) if source.space == HBM else 0
            return written + read + _hbm(operands[1:])
        if opcode == "dynamic-update-slice":
            return _size_like(instruction.array, operands[1].array) * (instruction.array.space == HBM) + _hbm(
                operands[1:2]
            )
        if opcode == "scatter":
            updates = operands[-1]
            return 2 * updates.array.bytes * (instruction.array.space == HBM) + _hbm(operands[1:])
        return written + _hbm(self._operands(computation, instruction))

    def _copy_start(self, computation: Computation, instruction: Instruction, opcode: str) -> _Op:
        source, target = computation.operand(instruction, 0).array, _target(instruction)
        moved = target
        if opcode == "dynamic-update-slice":
            moved = computation.operand(instruction, 1).array
        amount = _size_like(target, moved)
        read = amount if source.space == HBM else 0
        if opcode == "dynamic-update-slice":
            read = moved.bytes_in(HBM)
        return _Op(instruction, hbm_bytes=read + (amount if target.space == HBM else 0))

    def _custom_call(self, computation: Computation, instruction: Instruction) -> _Op | None:
        target = (instruction.attribute("custom_call_target") or "").strip('"')
        if target in VIEWS or target.endswith("Bitcast"):
            return None
        estimate = instruction.backend_config.get("custom_call_config", {}).get("cost_estimate")
        arrays = [i.array for i in self._operands(computation, instruction)] + list(leaves(instruction.shape))
        if target == "tpu_custom_call" and estimate and int(estimate.get("bytes_accessed", 0)):
            in_vmem = sum(a.bytes for a in arrays if a.space == 1)
            flops = float(estimate.get("flops", 0))
            read = max(0, int(estimate["bytes_accessed"]) - in_vmem)
            dtype = arrays[0].dtype if arrays else "bf16"
            dtype = next((a.dtype for a in arrays if a.dtype in ("bf16", "f32", "s8") and len(a.dims) > 1), dtype)
            return _Op(instruction, hbm_bytes=read, flops=flops, compute_s=flops / self.chip.rate(dtype))
        if target == "tpu_custom_call":
            self.cost.unpriced.append(f"{instruction.name}: Pallas kernel without CostEstimate")
        return _Op(instruction, hbm_bytes=sum(a.bytes_in(HBM) for a in arrays))

    def _fused(self, instruction: Instruction, body: Computation, computation: Computation) -> _Op:
        """Price a fusion: parameters as they are read inside, results as they are written inside."""
        op = _Op(instruction)
        for index, name in enumerate(instruction.operands):
            source = computation.instructions[name].shape
            if isinstance(source, Shape) and source.space == HBM:
                read = self._read(body, index)
                op.hbm_bytes += source.bytes if read is None else min(read, source.bytes)
        results = list(leaves(instruction.shape))
        if instruction.opcode.endswith("-start"):
            results = list(leaves(body.root.shape))
        for index, leaf in enumerate(results):
            if leaf.space == HBM:
                op.hbm_bytes += self._written(body, _root_leaf(body, index), leaf)
        self._add_inner(op, body)
        return op

    def _add_inner(self, op: _Op, body: Computation) -> None:
        """Add the products and collectives inside a fusion."""
        for inner in body.instructions.values():
            if inner.opcode in ("dot", "convolution"):
                self._add_product(op, body, inner)
            elif inner.opcode == "fusion":
                self._add_inner(op, self._called(inner, "calls"))
            elif inner.opcode in COLLECTIVES:
                kind = inner.opcode
                if kind == "all-reduce" and "all-reduce-scatter" in body.name:
                    kind = "reduce-scatter"  # the compiler's form of it: an all-reduce of which a slice is kept
                # An asynchronous collective is a chain of fusions that all name it: the first starts it, some carry it
                # along with work of their own, the last waits. It is billed to the first.
                roles = {i.attribute("custom_call_target") for i in body.instructions.values()}
                channel = f"channel {inner.attribute('channel_id')}"
                if '"AsyncCollectiveDone"' in roles:
                    op.waits_for = channel
                    self._open.discard(channel)
                    continue
                if channel in self._open:
                    continue
                if '"AsyncCollectiveStart"' in roles:
                    op.starts_as = channel
                    self._open.add(channel)
                sent = self._collective(body, inner, kind, False)
                op.ici_bytes += sent.ici_bytes
                op.ici_s += sent.ici_s
                op.kind, op.forward = kind, sent.forward

    def _read(self, body: Computation, index: int) -> int | None:
        """Return how many bytes of its parameter a fusion reads, None for all."""
        key = (body.name, index)
        if key not in self._reads:
            self._reads[key] = None
            parameter = body.parameters[index]
            if isinstance(parameter.shape, Shape):
                self._reads[key] = self._read_of(body, parameter, parameter.shape)
        return self._reads[key]

    def _read_of(self, body: Computation, value: Instruction, source: Shape) -> int | None:
        total = 0
        for user, position in body.users[value.name]:
            if user.opcode in ("slice", "dynamic-slice", "gather"):
                total += _size_like(source, user.array) if position == 0 else source.bytes
            elif user.opcode in ("dynamic-update-slice", "scatter") and position == 0:
                pass  # in place: billed where it is written
            elif user.opcode in THROUGH:
                inner = self._read_of(body, user, source)
                if inner is None:
                    return None
                total += inner
            elif user.opcode == "fusion":
                inner = self._read(self._called(user, "calls"), position)
                if inner is None:
                    return None
                total += inner
            else:
                return None
        if value is body.root:
            return None
        return total

    def _written(self, body: Computation, value: Instruction, leaf: Shape) -> int:
        """Return how many bytes of a result in HBM a fusion writes."""
        update = _in_place(self.module, body, value)
        if update is None:
            return leaf.bytes
        kind, shape = update
        return shape.bytes * 2 if kind == "scatter" else _size_like(leaf, shape)

    # FLOPs

    def _add_product(self, op: _Op, computation: Computation, instruction: Instruction) -> None:
        lhs, rhs = (computation.operand(instruction, i).array for i in (0, 1))
        flops = _dot_flops(instruction, lhs) if instruction.opcode == "dot" else _conv_flops(instruction, lhs, rhs)
        precision = instruction.attribute("operand_precision") or ""
        passes = 6 if "highest" in precision else 3 if "high" in precision else 1
        op.flops += flops
        op.compute_s += flops * (passes if lhs.dtype == "f32" else 1) / self.chip.rate(lhs.dtype)

    # ICI

    def _collective(self, computation: Computation, instruction: Instruction, kind: str, starts: bool) -> _Op:
        given = self._operands(computation, instruction)
        if kind == "ragged-all-to-all":  # (rows, the buffer of the result, four arrays of offsets and sizes)
            given = given[:1]
        operands = sum(leaf.bytes for i in given for leaf in leaves(i.shape))
        results = [leaf for leaf in leaves(instruction.shape) if leaf.elements > 1]
        if starts and kind != "all-reduce":  # (operands, results, context)
            results = results[len(instruction.operands) :]
        result = sum(leaf.bytes for leaf in results)
        n = group_size(instruction, self.partitions) if kind != "collective-permute" else 2
        whole = max(operands, result)
        if kind == "all-reduce":
            sent = ring = 2 * (n - 1) / n * whole
        elif kind in ("all-gather", "reduce-scatter"):
            sent = ring = (n - 1) / n * whole
        elif kind in ("all-to-all", "ragged-all-to-all"):
            sent = (n - 1) / n * whole
            ring = max(n / 4 * whole, sent)
        else:
            sent = ring = float(whole)
        if n == 1:
            sent = ring = 0.0
        links = 1 if n == 2 else 2
        if self.chip.kind == "gpu":  # through a switch, over all links at once
            ring, links = sent, self.chip.links
        hbm = sum(leaf.bytes_in(HBM) for i in given for leaf in leaves(i.shape))
        hbm += sum(leaf.bytes_in(HBM) for leaf in results)
        return _Op(
            instruction,
            hbm_bytes=hbm,
            ici_bytes=sent,
            ici_s=ring / (links * self.chip.link_bytes_s) if ring else 0.0,
            kind=kind,
            forward=_forward(instruction, self.partitions) if kind == "collective-permute" else None,
        )

    # Control flow

    def _called(self, instruction: Instruction, key: str) -> Computation:
        return self.module.computations[instruction.called(key) or ""]

    def _bind(self, body: Computation, instruction: Instruction, origins: Origins) -> Origins:
        """Give a called computation's parameters the origins of the operands."""
        return {
            parameter.name: origins.get(operand, (None,))
            for parameter, operand in zip(body.parameters, instruction.operands, strict=False)
        }

    def _loop(self, computation: Computation, instruction: Instruction, origins: Origins, times: int) -> _Op:
        body = self._called(instruction, "body")
        trips = trip_count(self.module, computation, instruction)
        if trips is None:
            self.cost.billed_once.append(instruction.op_name or instruction.name)
            trips = 1
        inner = self._bind(body, instruction, origins)
        return _Op(instruction, loop=(self.computation(body, inner, times=times * trips), trips))

    def _conditional(self, computation: Computation, instruction: Instruction, origins: Origins, times: int) -> _Op:
        names = instruction.attribute("branch_computations")
        if names is not None:
            branches = [name.strip().removeprefix("%") for name in names.strip("{}").split(",")]
        else:
            branches = [instruction.called(f"{which}_computation") or "" for which in ("true", "false")]
        total, ici_s, priced = self.cost, self.ici_s, []
        for number, name in enumerate(branches):
            self.cost, self.ici_s = Cost(), dict.fromkeys(ici_s, 0.0)
            body = self.module.computations[name]
            operand = instruction.operands[number + 1] if number + 1 < len(instruction.operands) else ""
            inner = {body.parameters[0].name: origins.get(operand, (None,))} if body.parameters else {}
            ops = self.computation(body, inner, times=times)
            clock = _Clock()
            _run(ops, clock, self.chip)
            priced.append((clock.end, ops, self.cost, self.ici_s))
        _, _, dearest, links = max(priced, key=lambda p: p[0])
        self.cost, self.ici_s = _sum(total, dearest), {way: ici_s[way] + links[way] for way in ici_s}
        return _Op(instruction, branches=[ops for _, ops, _, _ in priced])

    # Where parameters and the cache go

    def _origin(self, computation: Computation, instruction: Instruction, origins: Origins) -> tuple[int | None, ...]:
        sources = [origins.get(name, (None,)) for name in instruction.operands]
        first = sources[0] if sources else (None,)
        opcode = instruction.opcode
        if opcode == "tuple":
            return tuple(s[0] if len(s) == 1 else None for s in sources)
        if opcode == "get-tuple-element":
            index = int(instruction.attribute("index") or 0)
            return (first[index],) if index < len(first) else (None,)
        if opcode in ("while", "opt-barrier"):
            return first
        if opcode == "fusion":
            body = self._called(instruction, "calls")
            found = []
            for index, _ in enumerate(leaves(instruction.shape)):
                source = _source_parameter(self.module, body, _root_leaf(body, index))
                found.append(sources[source][0] if source is not None and source < len(sources) else None)
            return tuple(found)
        if opcode == "custom-call" and (aliases := instruction.attribute("output_to_operand_aliasing")):
            found: list[int | None] = [None] * max(1, len(list(leaves(instruction.shape))))
            for output, operand in re.findall(r"\{(\d*)\}: \((\d+), ", aliases):
                found[int(output or 0)] = sources[int(operand)][0]
            return tuple(found)
        kept = MOVES | {"dynamic-update-slice", "scatter", "all-gather", "copy-start", "copy-done", "slice-start"}
        kept |= {"slice-done", "all-gather-start", "all-gather-done", "dynamic-slice-start", "dynamic-slice-done"}
        if opcode in kept or (opcode == "custom-call" and "Bitcast" in instruction.attributes):
            return (first[0],)
        return tuple(None for _ in leaves(instruction.shape)) or (None,)

    def _record_moves(self, computation: Computation, instruction: Instruction, origins: Origins, times: int) -> None:
        opcode = instruction.opcode.removesuffix("-start")
        if instruction.opcode.endswith("-done") or not instruction.operands:
            return
        here = origins[instruction.name]
        name = instruction.name
        if opcode in COLLECTIVES:
            origin = origins.get(instruction.operands[0], (None,))[0]
            size = max((leaf.bytes for leaf in leaves(instruction.shape)), default=0)
            if origin is not None and size >= SMALL:
                self.cost.gathered.append(Move(name, opcode, origin, size, times, instruction.op_name))
            return
        if opcode in MOVES - {"bitcast"}:
            results = [(0, _target(instruction))]
        elif opcode == "fusion":
            body = self._called(instruction, "calls")
            results = [
                (index, leaf)
                for index, leaf in enumerate(leaves(instruction.shape))
                if _in_place(self.module, body, _root_leaf(body, index)) is None
            ]
        else:
            return
        for index, leaf in results:
            origin = here[index] if index < len(here) else None
            if origin is not None and leaf.space == HBM and leaf.bytes >= SMALL:
                self.cost.moves.append(Move(name, opcode, origin, leaf.bytes, times, instruction.op_name))


def _target(instruction: Instruction) -> Shape:
    """Return the array that a copy or slice fills, also when it is asynchronous."""
    if isinstance(instruction.shape, Shape):
        return instruction.shape
    # copy-start is (target, source, context); the others are ((sources), target, context)
    return next(leaves(instruction.shape[0 if instruction.opcode == "copy-start" else 1]))


def _hbm(instructions: Sequence[Instruction]) -> int:
    return sum(leaf.bytes_in(HBM) for i in instructions for leaf in leaves(i.shape))


def _size_like(layout: Shape, part: Shape) -> int:
    """Size of a part of an array, in the array's layout if the part still has its rank."""
    if len(layout.dims) == len(part.dims) and layout.dtype == part.dtype:
        return layout.bytes_of(part.dims)
    return part.bytes


def _root_leaf(body: Computation, index: int) -> Instruction:
    root = body.root
    return body.operand(root, index) if root.opcode == "tuple" else root


def _in_place(module: Module, body: Computation, value: Instruction) -> tuple[str, Shape] | None:
    """If a value is a parameter updated in place, return by which opcode and the shape of the update."""
    while value.opcode in ("bitcast", "copy", "convert"):
        if value.opcode == "copy" and value.array.minor_to_major != body.operand(value, 0).array.minor_to_major:
            return None
        value = body.operand(value, 0)
    if value.opcode == "fusion":
        inner = module.computations[value.called("calls") or ""]
        return _in_place(module, inner, inner.root)
    if value.opcode not in ("dynamic-update-slice", "scatter"):
        return None
    target = body.operand(value, 0)
    while target.opcode in ("bitcast", "dynamic-update-slice", "scatter"):
        target = body.operand(target, 0)
    if target.opcode != "parameter":
        return None
    return value.opcode, body.operand(value, 1 if value.opcode == "dynamic-update-slice" else 2).array


def _source_parameter(module: Module, body: Computation, value: Instruction) -> int | None:
    """Return the number of the fusion parameter that a value is, moved or updated in place; None if computed."""
    while True:
        if value.opcode == "parameter":
            return int(value.arguments)
        if value.opcode in MOVES | {"dynamic-update-slice", "scatter"} and value.operands:
            value = body.operand(value, 0)
        elif value.opcode == "fusion":
            inner = module.computations[value.called("calls") or ""]
            source = _source_parameter(module, inner, inner.root)
            if source is None:
                return None
            value = body.operand(value, source)
        else:
            return None


def _dot_flops(instruction: Instruction, lhs: Shape) -> float:
    contracted = (instruction.attribute("lhs_contracting_dims") or "{}").strip("{}")
    return (
        2.0 * instruction.array.elements * np.prod([lhs.dims[int(d)] for d in contracted.split(",") if d], dtype=float)
    )


def _conv_flops(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
    """Count 2 FLOPs for each window position that falls on the input, as XLA does."""
    labels = instruction.attribute("dim_labels") or ""
    left, right, out = labels.replace("->", "_").split("_")
    window = dict(
        part.split("=") for part in (instruction.attribute("window") or "").strip("{}").split() if "=" in part
    )
    axes = sorted(label for label in left if label.isdigit())

    def numbers(key: str, default: int) -> list[int]:
        return [int(v) for v in window[key].split("x")] if key in window else [default] * len(axes)

    pads = [tuple(map(int, pair.split("_"))) for pair in window["pad"].split("x")] if "pad" in window else None
    stride, dilate_lhs, dilate_rhs = numbers("stride", 1), numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)
    valid = 1
    for axis, label in enumerate(axes):
        size = lhs.dims[left.index(label)]
        kernel = np.arange(rhs.dims[right.index(label)], dtype=np.int64)
        output = np.arange(instruction.array.dims[out.index(label)], dtype=np.int64)
        at = output[:, None] * stride[axis] - (pads[axis][0] if pads else 0) + kernel[None] * dilate_rhs[axis]
        fits = (at % dilate_lhs[axis] == 0) & (at >= 0) & (at // dilate_lhs[axis] < size)
        valid *= int(np.count_nonzero(fits))
    features = lhs.dims[left.index("f")] // int(instruction.attribute("feature_group_count") or 1)
    batch = lhs.dims[left.index("b")] // int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * features * batch * rhs.dims[right.index("o")] * valid


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Return how often a loop's body runs, None if its text does not say."""
    known = loop.backend_config.get("known_trip_count", {}).get("n")
    if known is not None:
        return int(known)
    condition = module.computations[loop.called("condition") or ""]
    body = module.computations[loop.called("body") or ""]
    test = condition.root
    inputs = computation.operand(loop, 0)

    def outer(index: int) -> int | None:
        return _constant(module, computation, computation.operand(inputs, index)) if inputs.opcode == "tuple" else None

    def carried(value: Instruction) -> int | None:
        """The index in the loop's tuple of a value of the condition, if it is one."""
        while value.opcode in ("bitcast", "copy", "reshape"):
            value = condition.operand(value, 0)
        if value.opcode == "get-tuple-element" and condition.operand(value, 0).opcode == "parameter":
            return int(value.attribute("index") or 0)
        return None

    operands = [condition.instructions[name] for name in test.operands]
    if test.opcode == "fusion":
        inner = module.computations[test.called("calls") or ""]
        test = inner.root
        sources = [inner.instructions[name] for name in test.operands]
        operands = [operands[int(s.arguments)] if s.opcode == "parameter" else s for s in sources]
    if test.opcode != "compare" or len(operands) != 2:
        return None
    direction = test.attribute("direction") or ""
    index = carried(operands[0])
    limit_index = carried(operands[1])
    limit = outer(limit_index) if limit_index is not None else _constant(module, condition, operands[1])
    if index is None or limit is None or direction not in ("LT", "LE", "GT", "GE", "NE"):
        return None
    start, step = outer(index), _step(body, index)
    if start is None or not step:
        return None
    limit += {"LE": 1, "GE": -1}.get(direction, 0)
    return max(0, -(-(limit - start) // step))


def _step(body: Computation, index: int) -> int | None:
    """Return the constant that a loop adds to an element of its tuple in each round."""
    if body.root.opcode != "tuple":
        return None
    value = body.operand(body.root, index)
    while value.opcode in ("bitcast", "copy"):
        value = body.operand(value, 0)
    if value.opcode not in ("add", "subtract"):
        return None
    for name in value.operands:
        source = body.instructions[name]
        while source.opcode in ("bitcast", "copy"):
            source = body.operand(source, 0)
        if source.opcode == "constant":
            return int(source.arguments) * (1 if value.opcode == "add" else -1)
    return None


def _constant(module: Module, computation: Computation, value: Instruction) -> int | None:
    while value.opcode in ("bitcast", "copy", "reshape", "convert", "copy-done", "copy-start"):
        value = computation.operand(value, 0)
    if value.opcode == "constant" and value.arguments.lstrip("-").isdigit():
        return int(value.arguments)
    return None


def _forward(instruction: Instruction, partitions: int) -> bool:
    """Say whether a permute goes the shorter way round towards higher device numbers."""
    pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs") or "")
    ahead = sum(1 if (int(target) - int(source)) % partitions <= partitions // 2 else -1 for source, target in pairs)
    return ahead >= 0


def _sum(one: Cost, other: Cost) -> Cost:
    for key in ("flops", "hbm_bytes", "ici_bytes", "compute_s"):
        setattr(one, key, getattr(one, key) + getattr(other, key))
    for kind, counted in other.collectives.items():
        entry = one.collectives.setdefault(kind, Collectives())
        entry.count += counted.count
        entry.bytes += counted.bytes
    for key in ("moves", "gathered", "unpriced", "billed_once", "lines"):
        getattr(one, key).extend(getattr(other, key))
    return one

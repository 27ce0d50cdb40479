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
from dataclasses import dataclass, field

from qwen3_jax.plan.chips import Chip
from qwen3_jax.plan.counting import (
    MOVES,
    bytes_in_hbm,
    conv_flops,
    dot_flops,
    filled,
    goes_forward,
    in_place,
    root_leaf,
    size_like,
    source_parameter,
    trip_count,
)
from qwen3_jax.plan.hlo import HBM, Computation, Instruction, Module, Shape, group_size, leaves
from qwen3_jax.plan.schedule import Clock, Op, run

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


Origins = dict[str, tuple[int | None, ...]]
"""For each instruction, for each leaf of its result, the entry parameter that it is or was moved from."""


def walk(module: Module, chip: Chip, *, partitions: int) -> Cost:
    """Price one step of a compiled module on one chip of `partitions`."""
    walker = _Walker(module, chip, partitions)
    entry = module.entry
    origins: Origins = {p.name: (number,) for number, p in enumerate(entry.parameters)}
    ops = walker.computation(entry, origins, times=1)
    clock = Clock()
    run(ops, clock, chip)
    cost = walker.cost
    cost.ici_s = walker.ici_s[None] + max(walker.ici_s[True], walker.ici_s[False])
    cost.hbm_s = cost.hbm_bytes / chip.hbm_bytes_s
    cost.schedule_s = clock.end
    return cost


class _Walker:
    def __init__(self, module: Module, chip: Chip, partitions: int):
        self.module, self.chip, self.partitions = module, chip, partitions
        self.cost = Cost()
        self.ici_s: dict[bool | None, float] = {None: 0.0, True: 0.0, False: 0.0}
        """Seconds on the links, by direction."""
        self._reads: dict[tuple[str, int], int | None] = {}
        self._open: set[str] = set()
        """Channels of asynchronous collectives that have started and are not waited for yet."""

    def computation(self, computation: Computation, origins: Origins, *, times: int) -> list[Op]:
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
    ) -> Op | None:
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
            return Op(instruction, loop=(self.computation(body, inner, times=times), 1))
        if opcode.endswith("-done"):
            return Op(instruction, waits_for=instruction.operands[0])
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
            op = Op(instruction, hbm_bytes=self._plain_bytes(computation, instruction))
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
            read = size_like(source, instruction.array) if source.space == HBM else 0
            return written + read + bytes_in_hbm(operands[1:])
        if opcode == "dynamic-update-slice":
            return size_like(instruction.array, operands[1].array) * (instruction.array.space == HBM) + bytes_in_hbm(
                operands[1:2]
            )
        if opcode == "scatter":
            updates = operands[-1]
            return 2 * updates.array.bytes * (instruction.array.space == HBM) + bytes_in_hbm(operands[1:])
        return written + bytes_in_hbm(self._operands(computation, instruction))

    def _copy_start(self, computation: Computation, instruction: Instruction, opcode: str) -> Op:
        source, target = computation.operand(instruction, 0).array, filled(instruction)
        moved = target
        if opcode == "dynamic-update-slice":
            moved = computation.operand(instruction, 1).array
        amount = size_like(target, moved)
        read = amount if source.space == HBM else 0
        if opcode == "dynamic-update-slice":
            read = moved.bytes_in(HBM)
        return Op(instruction, hbm_bytes=read + (amount if target.space == HBM else 0))

    def _custom_call(self, computation: Computation, instruction: Instruction) -> Op | None:
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
            return Op(instruction, hbm_bytes=read, flops=flops, compute_s=flops / self.chip.rate(dtype))
        if target == "tpu_custom_call":
            self.cost.unpriced.append(f"{instruction.name}: Pallas kernel without CostEstimate")
        return Op(instruction, hbm_bytes=sum(a.bytes_in(HBM) for a in arrays))

    def _fused(self, instruction: Instruction, body: Computation, computation: Computation) -> Op:
        """Price a fusion: parameters as they are read inside, results as they are written inside."""
        op = Op(instruction)
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
                op.hbm_bytes += self._written(body, root_leaf(body, index), leaf)
        self._add_inner(op, body)
        return op

    def _add_inner(self, op: Op, body: Computation) -> None:
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
                total += size_like(source, user.array) if position == 0 else source.bytes
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
        update = in_place(self.module, body, value)
        if update is None:
            return leaf.bytes
        kind, shape = update
        return shape.bytes * 2 if kind == "scatter" else size_like(leaf, shape)

    # FLOPs

    def _add_product(self, op: Op, computation: Computation, instruction: Instruction) -> None:
        lhs, rhs = (computation.operand(instruction, i).array for i in (0, 1))
        flops = dot_flops(instruction, lhs) if instruction.opcode == "dot" else conv_flops(instruction, lhs, rhs)
        precision = instruction.attribute("operand_precision") or ""
        passes = 6 if "highest" in precision else 3 if "high" in precision else 1
        op.flops += flops
        op.compute_s += flops * (passes if lhs.dtype == "f32" else 1) / self.chip.rate(lhs.dtype)

    # ICI

    def _collective(self, computation: Computation, instruction: Instruction, kind: str, starts: bool) -> Op:
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
        return Op(
            instruction,
            hbm_bytes=hbm,
            ici_bytes=sent,
            ici_s=ring / (links * self.chip.link_bytes_s) if ring else 0.0,
            kind=kind,
            forward=goes_forward(instruction, self.partitions) if kind == "collective-permute" else None,
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

    def _loop(self, computation: Computation, instruction: Instruction, origins: Origins, times: int) -> Op:
        body = self._called(instruction, "body")
        trips = trip_count(self.module, computation, instruction)
        if trips is None:
            self.cost.billed_once.append(instruction.op_name or instruction.name)
            trips = 1
        inner = self._bind(body, instruction, origins)
        return Op(instruction, loop=(self.computation(body, inner, times=times * trips), trips))

    def _conditional(self, computation: Computation, instruction: Instruction, origins: Origins, times: int) -> Op:
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
            clock = Clock()
            run(ops, clock, self.chip)
            priced.append((clock.end, ops, self.cost, self.ici_s))
        _, _, dearest, links = max(priced, key=lambda p: p[0])
        self.cost, self.ici_s = _sum(total, dearest), {way: ici_s[way] + links[way] for way in ici_s}
        return Op(instruction, branches=[ops for _, ops, _, _ in priced])

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
                source = source_parameter(self.module, body, root_leaf(body, index))
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
            results = [(0, filled(instruction))]
        elif opcode == "fusion":
            body = self._called(instruction, "calls")
            results = [
                (index, leaf)
                for index, leaf in enumerate(leaves(instruction.shape))
                if in_place(self.module, body, root_leaf(body, index)) is None
            ]
        else:
            return
        for index, leaf in results:
            origin = here[index] if index < len(here) else None
            if origin is not None and leaf.space == HBM and leaf.bytes >= SMALL:
                self.cost.moves.append(Move(name, opcode, origin, leaf.bytes, times, instruction.op_name))


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

"""What a single instruction of a compiled program puts on each pipe: bytes of HBM, FLOPs, bytes on the links.

`Prices.op(computation, instruction)` → `schedule.Op`, by the rules that `cost` states. Control flow is not priced here:
`cost` walks loops and branches and adds up.
"""

from qwen3_jax.plan import kernels
from qwen3_jax.plan.chips import Chip
from qwen3_jax.plan.counting import (
    bytes_in_hbm,
    conv_flops,
    dot_flops,
    filled,
    in_place,
    root_leaf,
    size_like,
)
from qwen3_jax.plan.hlo import HBM, Computation, Instruction, Module, Shape, group, leaves
from qwen3_jax.plan.schedule import Op
from qwen3_jax.plan.wires import Places, wires

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
STARTS, WAITS = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'


def _channel(collective: Instruction) -> str:
    return f"channel {collective.attribute('channel_id')}"


class Prices:
    """The prices of one module's instructions on one chip of `partitions`, asked for in the order in which they run."""

    def __init__(self, module: Module, chip: Chip, partitions: int, places: Places):
        self.module, self.chip, self.partitions, self.places = module, chip, partitions, places
        self._reads: dict[tuple[str, int], int | None] = {}
        self._open: set[str] = set()
        """Channels of asynchronous collectives that have started and are not waited for yet."""

    def op(self, computation: Computation, instruction: Instruction) -> Op | None:
        """Price an instruction that is no control flow; None if it costs nothing."""
        opcode = instruction.opcode
        if opcode in FREE:
            return None
        if opcode.endswith("-done"):
            return Op(instruction, waits_for=instruction.operands[0])
        if opcode.endswith("-update"):
            return None
        starts = opcode.endswith("-start")
        opcode = opcode.removesuffix("-start")
        if (starts and opcode in ("async", "call")) or (starts and instruction.called("calls")):
            # What runs on a sparse core is a "call-start", which names its computation like a call.
            body = self._called(instruction, "calls" if instruction.called("calls") else "to_apply")
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
        op = Op(instruction, hbm_bytes=sum(a.bytes_in(HBM) for a in arrays))
        if target == "tpu_custom_call" and (known := kernels.splash(instruction, arrays)):
            op.hbm_bytes += known.read_again_bytes
            op.flops, op.compute_s = known.flops, known.flops / self.chip.rate("bf16")
        elif target == "tpu_custom_call":
            op.unpriced = f"{instruction.name}: Pallas kernel without CostEstimate"
        return op

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
        # What starts an asynchronous collective hands on what it sends, in front of what it fills.
        handed_on = 0
        if body.root.attribute("custom_call_target") == STARTS:
            handed_on = sum(len(inner.operands) for inner in body.instructions.values() if inner.opcode in COLLECTIVES)
        for index, leaf in enumerate(results):
            if leaf.space == HBM and index >= handed_on:
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
                channel = _channel(inner)
                if WAITS in roles:
                    op.waits_for = channel
                    self._open.discard(channel)
                    continue
                if channel in self._open:
                    continue
                if STARTS in roles:
                    op.starts_as = channel
                    self._open.add(channel)
                sent = self._collective(body, inner, kind, False)
                op.ici_bytes += sent.ici_bytes
                op.ici_s += sent.ici_s
                op.kind, op.wires = kind, sent.wires

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
            elif (user is body.root and user.opcode == "tuple") or self._carried(user):
                pass  # handed on as it came
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
        if value.opcode == "parameter" or self._carried(value):
            return 0
        update = in_place(self.module, body, value)
        if update is None:
            return leaf.bytes
        kind, shape = update
        return shape.bytes * 2 if kind == "scatter" else size_like(leaf, shape)

    def _carried(self, inner: Instruction) -> bool:
        """Say whether an instruction in a fusion stands for an asynchronous collective that was billed at its start."""
        under_way = inner.opcode in COLLECTIVES and _channel(inner) in self._open
        return under_way or inner.attribute("custom_call_target") == WAITS

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
        n = len(group(instruction, self.partitions)) if kind != "collective-permute" else 2
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
            wires=wires(instruction, self.partitions, self.places),
        )

    def _called(self, instruction: Instruction, key: str) -> Computation:
        return self.module.computations[instruction.called(key) or ""]

"""What single instructions of a compiled program do: FLOPs of products, lengths of loops, updates in place, moves.

Pure functions of parsed HLO; `cost` adds them up.
"""

from collections.abc import Sequence

import numpy as np

from qwen3_jax.plan.hlo import HBM, Computation, Instruction, Module, Shape, leaves

MOVES = frozenset(["copy", "transpose", "reshape", "bitcast", "convert", "slice", "dynamic-slice"])


def filled(instruction: Instruction) -> Shape:
    """Return the array that a copy or slice fills, also when it is asynchronous."""
    if isinstance(instruction.shape, Shape):
        return instruction.shape
    # copy-start is (target, source, context); the others are ((sources), target, context)
    return next(leaves(instruction.shape[0 if instruction.opcode == "copy-start" else 1]))


def bytes_in_hbm(instructions: Sequence[Instruction]) -> int:
    return sum(leaf.bytes_in(HBM) for i in instructions for leaf in leaves(i.shape))


def size_like(layout: Shape, part: Shape) -> int:
    """Size of a part of an array, in the array's layout if the part still has its rank."""
    if len(layout.dims) == len(part.dims) and layout.dtype == part.dtype:
        return layout.bytes_of(part.dims)
    return part.bytes


def root_leaf(body: Computation, index: int) -> Instruction:
    root = body.root
    return body.operand(root, index) if root.opcode == "tuple" else root


def in_place(module: Module, body: Computation, value: Instruction) -> tuple[str, Shape] | None:
    """If a value is a parameter updated in place, return by which opcode and the shape of the update."""
    while value.opcode in ("bitcast", "copy", "convert"):
        if value.opcode == "copy" and value.array.minor_to_major != body.operand(value, 0).array.minor_to_major:
            return None
        value = body.operand(value, 0)
    if value.opcode == "fusion":
        inner = module.computations[value.called("calls") or ""]
        return in_place(module, inner, inner.root)
    if value.opcode not in ("dynamic-update-slice", "scatter"):
        return None
    target = body.operand(value, 0)
    while target.opcode in ("bitcast", "dynamic-update-slice", "scatter"):
        target = body.operand(target, 0)
    if target.opcode != "parameter":
        return None
    return value.opcode, body.operand(value, 1 if value.opcode == "dynamic-update-slice" else 2).array


def source_parameter(module: Module, body: Computation, value: Instruction) -> int | None:
    """Return the number of the fusion parameter that a value is, moved or updated in place; None if computed."""
    while True:
        if value.opcode == "parameter":
            return int(value.arguments)
        if value.opcode in MOVES | {"dynamic-update-slice", "scatter"} and value.operands:
            value = body.operand(value, 0)
        elif value.opcode == "fusion":
            inner = module.computations[value.called("calls") or ""]
            source = source_parameter(module, inner, inner.root)
            if source is None:
                return None
            value = body.operand(value, source)
        else:
            return None


def dot_flops(instruction: Instruction, lhs: Shape) -> float:
    contracted = (instruction.attribute("lhs_contracting_dims") or "{}").strip("{}")
    return (
        2.0 * instruction.array.elements * np.prod([lhs.dims[int(d)] for d in contracted.split(",") if d], dtype=float)
    )


def conv_flops(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
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

"""Where a program's arguments go: which instructions copy, relayout, cut or send a parameter or a part of the cache.

Every value is traced back to the entry parameter that it is or was moved from (`origin`); `moves` names what writes
such a value to HBM once more, and what sends it to other chips; `not_donated` names what a step should overwrite and
does not.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qwen3_jax.plan.counting import MOVES, filled, in_place, root_leaf, source_parameter
from qwen3_jax.plan.hlo import HBM, Computation, Instruction, Module, leaves
from qwen3_jax.plan.pricing import COLLECTIVES

SMALL = 64 << 10
"""Moves of a parameter below this many bytes are not reported: norms, rope tables."""
DONATED = ("cache", "state")
"""Arguments, by the name of the program's own, that a step overwrites: the cache, and what training updates."""
NOT_DONATED = "not donated"
Origins = dict[str, tuple[int | None, ...]]
"""For each instruction, for each leaf of its result, the entry parameter that it is or was moved from."""


@dataclass(frozen=True)
class Move:
    """A copy, relayout or gather of a parameter or of the cache inside the step."""

    instruction: str
    opcode: str
    parameter: int
    array: str
    """What the parameter is called: "params.layers.3.self_attn.o_proj", "cache.3.k"."""
    bytes: int
    times: int
    op_name: str


def bind(body: Computation, instruction: Instruction, origins: Origins) -> Origins:
    """Give a called computation's parameters the origins of the operands."""
    return {
        parameter.name: origins.get(operand, (None,))
        for parameter, operand in zip(body.parameters, instruction.operands, strict=False)
    }


def origin(module: Module, instruction: Instruction, origins: Origins) -> tuple[int | None, ...]:
    """Return the entry parameters that an instruction's results are or were moved from."""
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
        body = module.computations[instruction.called("calls") or ""]
        found = []
        for index, _ in enumerate(leaves(instruction.shape)):
            source = source_parameter(module, body, root_leaf(body, index))
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


def moves(module: Module, instruction: Instruction, origins: Origins, times: int) -> tuple[list[Move], list[Move]]:
    """Return what an instruction that runs `times` times writes to HBM of its origins, and what it sends of them."""
    opcode, name = instruction.opcode.removesuffix("-start"), instruction.name
    if instruction.opcode.endswith("-done") or not instruction.operands:
        return [], []
    if opcode in COLLECTIVES:
        source = origins.get(instruction.operands[0], (None,))[0]
        size = max((leaf.bytes for leaf in leaves(instruction.shape)), default=0)
        if source is None or size < SMALL:
            return [], []
        return [], [Move(name, opcode, source, array_name(module, source), size, times, instruction.op_name)]
    if opcode in MOVES - {"bitcast"}:
        results = [(0, filled(instruction))]
    elif opcode == "fusion":
        body = module.computations[instruction.called("calls") or ""]
        results = [
            (index, leaf)
            for index, leaf in enumerate(leaves(instruction.shape))
            if in_place(module, body, root_leaf(body, index)) is None
        ]
    else:
        return [], []
    here = origins[name]
    found = []
    for index, leaf in results:
        source = here[index] if index < len(here) else None
        if source is not None and leaf.space == HBM and leaf.bytes >= SMALL:
            array = array_name(module, source)
            found.append(Move(name, opcode, source, array, leaf.bytes, times, instruction.op_name))
    return found, []


def not_donated(module: Module) -> list[Move]:
    """Return the arguments that a step should overwrite, see `DONATED`, and gives back in memory of their own."""
    found = []
    for number, parameter in enumerate(module.entry.parameters):
        array, size = array_name(module, number), parameter.array.bytes
        if array.split(".")[0] in DONATED and size >= SMALL and number not in module.aliases:
            found.append(Move(parameter.name, NOT_DONATED, number, array, size, 1, parameter.op_name))
    return found


def array_name(module: Module, number: int) -> str:
    """Name an entry parameter by the path in the program's arguments, which the compiler keeps as its op_name."""
    parameter = module.entry.parameters[number]
    return re.sub(r"""\[[\\'"]*([^\]\\'"]*)[\\'"]*\]""", r".\1", parameter.op_name) or parameter.name


def by_array(found: Iterable[Move]) -> list[tuple[str, str, int, int]]:
    """Add moves up by what is done and to which array, those of all layers together.

    Returns:
        (opcode, array with * for the layer, how often per step, bytes per step), largest first.
    """
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for move in found:
        key = (move.opcode, re.sub(r"\.\d+(?=\.)", ".*", move.array))
        count, amount = sums.get(key, (0, 0))
        sums[key] = (count + move.times, amount + move.bytes * move.times)
    return sorted(((*key, *value) for key, value in sums.items()), key=lambda row: -row[3])

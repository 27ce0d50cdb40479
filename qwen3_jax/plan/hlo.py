"""Compiled HLO text as data: computations, instructions, shapes with their layout, tiles and memory space.

`compiled.as_text()` → `parse` → `Module`. The text of a compiled program is scheduled: instructions stand in the order
in which they run. Only what `cost.py` prices is modelled; everything else stays in an instruction's `attributes`.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0} | {
    name: int(re.sub(r"\D", "", name.split("e")[0]))
    for name in (
        *("s2", "s4", "s8", "s16", "s32", "s64", "u2", "u4", "u8", "u16", "u32", "u64", "bf16", "f16", "f32", "f64"),
        *("f4e2m1fn", "f8e3m4", "f8e4m3", "f8e4m3fn", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz"),
        *("f8e8m0fnu", "c64", "c128"),
    )
}
HBM, VMEM = 0, 1


class HloError(ValueError):
    """HLO text that this parser does not understand."""


@dataclass(frozen=True)
class Shape:
    """One array: logical dims, and how they lie in memory."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tiles: tuple[tuple[int, ...], ...]
    space: int
    """0 is HBM, 1 is VMEM; others hold scalars and semaphores."""

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @cached_property
    def bytes(self) -> int:
        """Size in memory, padded to whole tiles."""
        return self.bytes_of(self.dims)

    def bytes_of(self, dims: tuple[int, ...]) -> int:
        """Size of an array of other dims in this layout, padded to whole tiles."""
        physical = [dims[axis] for axis in reversed(self.minor_to_major)] if self.minor_to_major else list(dims)
        if 0 in physical:
            return 0
        for tile in self.tiles:
            physical = [1] * (len(tile) - len(physical)) + physical
            split = len(physical) - len(tile)
            counts = [-(-size // edge) for size, edge in zip(physical[split:], tile, strict=True)]
            physical = physical[:split] + counts + list(tile)
        return -(-math.prod(physical) * ITEM_BITS[self.dtype] // 8)

    def bytes_in(self, space: int) -> int:
        return self.bytes if self.space == space else 0


Type = Shape | tuple["Type", ...]


def leaves(shape: Type) -> Iterator[Shape]:
    """Walk the arrays of a possibly nested tuple."""
    if isinstance(shape, Shape):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


@dataclass(eq=False)
class Instruction:
    """One line of a computation."""

    name: str
    shape: Type
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    """The text between the parentheses: a constant's literal, a parameter's number."""
    attributes: str
    root: bool

    def attribute(self, key: str) -> str | None:
        """Return an attribute's text up to the next top-level comma, None if absent."""
        match = re.search(rf"(?:^|, ){re.escape(key)}=", self.attributes)
        if match is None:
            return None
        start = match.end()
        end = _end_of_value(self.attributes, start)
        return self.attributes[start:end]

    def called(self, key: str) -> str | None:
        """Return the name of the computation that an attribute refers to."""
        value = self.attribute(key)
        return None if value is None else value.strip().removeprefix("%")

    @cached_property
    def backend_config(self) -> dict[str, Any]:
        text = self.attribute("backend_config")
        if text is None or not text.startswith("{"):
            return {}
        try:
            return json.loads(text)
        except ValueError:
            return {}

    @cached_property
    def op_name(self) -> str:
        """The JAX name stack of the operation, "" if the compiler made it up."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def array(self) -> Shape:
        """The first array of the result."""
        return next(leaves(self.shape))


@dataclass(eq=False)
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    entry: bool = False

    @cached_property
    def root(self) -> Instruction:
        last = None
        for last in self.instructions.values():
            if last.root:
                return last
        if last is None:
            raise HloError(f"computation {self.name} is empty")
        return last

    @cached_property
    def parameters(self) -> list[Instruction]:
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.arguments))

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """For each instruction, who reads it and as which operand."""
        table: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for position, operand in enumerate(instruction.operands):
                table[operand].append((instruction, position))
        return table

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.instructions[instruction.operands[index]]


@dataclass(eq=False)
class Module:
    computations: dict[str, Computation]
    aliases: dict[int, int]
    """Entry parameter number → index of the output leaf that reuses its buffer."""

    @cached_property
    def entry(self) -> Computation:
        return next(c for c in self.computations.values() if c.entry)


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_ALIAS = re.compile(r"\{([\d, ]*)\}: \((\d+), \{")


def parse(text: str) -> Module:
    """Parse the text of a compiled, scheduled module.

    Raises:
        HloError: a line has another form; the message holds its beginning.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    header = text[: text.find("\n")]
    if not header.startswith("HloModule"):
        raise HloError(f"expected text starting with HloModule, got {header[:60]!r}")
    for line in _whole_lines(text):
        if line.startswith("  ") and current is not None:
            instruction = _instruction(line)
            current.instructions[instruction.name] = instruction
        elif line.endswith("{") and (match := _HEAD.match(line)):
            current = Computation(match.group(2), entry=match.group(1) is not None)
            computations[current.name] = current
        elif line.startswith("}"):
            current = None
    if not any(c.entry for c in computations.values()):
        raise HloError("no ENTRY computation: expected the text of compiled.as_text()")
    return Module(computations, _aliases(header))


def _whole_lines(text: str) -> Iterator[str]:
    """Yield lines, those joined that a kernel's metadata breaks: from kernel_metadata={ to the brace that closes it."""
    broken = ""
    for line in text.splitlines():
        if broken:
            broken += line.strip()
            if line.startswith("}}"):
                yield broken
                broken = ""
        elif line.endswith("kernel_metadata={"):
            broken = line
        else:
            yield line


def _aliases(header: str) -> dict[int, int]:
    start = header.find("input_output_alias={")
    if start < 0:
        return {}
    start += len("input_output_alias=")
    body = header[start : _end_of_value(header, start)]
    return {int(parameter): int(output.split(",")[0] or 0) for output, parameter in _ALIAS.findall(body)}


def _instruction(line: str) -> Instruction:
    body = line.strip()
    root = body.startswith("ROOT ")
    body = body.removeprefix("ROOT ")
    name, separator, rest = body.partition(" = ")
    if not separator:
        raise HloError(f"not an instruction: {line[:80]!r}")
    end = _matching(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape = parse_type(rest[:end])
    opened = rest.find("(", end)
    opcode = rest[end:opened].strip()
    if opened < 0 or not opcode:
        raise HloError(f"not an instruction: {line[:80]!r}")
    if opcode == "constant":  # a literal may hold anything, also braces and brackets
        closed = rest.find(")", opened) if "(" not in rest[opened + 1 :] else _matching(rest, opened)
    else:
        closed = _matching(rest, opened)
    arguments = rest[opened + 1 : closed]
    operands = () if opcode in ("constant", "parameter") else tuple(_OPERAND.findall(arguments))
    return Instruction(
        name.removeprefix("%"), shape, opcode, operands, arguments, rest[closed + 1 :].lstrip(", "), root
    )


def _matching(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise HloError(f"unbalanced parentheses: {text[start : start + 80]!r}")


_PARENTHESIS = re.compile(r"[()]")
_STRUCTURE = re.compile(r'[(){}\[\],]|"(?:[^"\\]|\\.)*"')


def _end_of_value(text: str, start: int) -> int:
    """Return the index of the comma that ends the value starting at `start`, or the end of the text."""
    depth = 0
    for match in _STRUCTURE.finditer(text, start):
        sign = match.group()
        if sign in "({[":
            depth += 1
        elif sign in ")}]":
            depth -= 1
            if depth < 0:
                return match.start()
        elif sign == "," and depth == 0:
            return match.start()
    return len(text)


@lru_cache(maxsize=65536)
def parse_type(text: str) -> Type:
    """Parse "bf16[8,128]{1,0:T(8,128)(2,1)S(1)}" or a tuple of such."""
    text = text.strip()
    if not text.startswith("("):
        return _array(text)
    parts, depth, start = [], 0, 1
    for match in _STRUCTURE.finditer(text, 1, len(text) - 1):
        sign = match.group()
        depth += (sign in "({[") - (sign in ")}]")
        if sign == "," and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    parts.append(text[start:-1])
    return tuple(parse_type(re.sub(r"/\*.*?\*/", "", part)) for part in parts if part.strip())


def _array(text: str) -> Shape:
    match = _ARRAY.fullmatch(text)
    if match is None or match.group(1) not in ITEM_BITS:
        raise HloError(f"not an array type: {text[:80]!r}")
    dtype, dims, layout = match.groups()
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    order, _, rest = (layout or "").partition(":")
    minor_to_major = tuple(int(axis) for axis in order.split(",") if axis)
    tiled = re.search(r"T((?:\([\d,*]+\))+)", rest)
    tiles = tuple(
        tuple(1 if edge == "*" else int(edge) for edge in tile.split(","))
        for tile in re.findall(r"\(([\d,*]+)\)", tiled.group(1) if tiled else "")
    )
    space = re.search(r"S\((\d+)\)", rest)
    return Shape(dtype, sizes, minor_to_major, tiles, int(space.group(1)) if space else HBM)


def group(instruction: Instruction, partitions: int) -> tuple[int, ...]:
    """Return the devices of a collective's first group; all of its groups are alike."""
    text = instruction.attribute("replica_groups")
    if text is None or text.strip() in ("", "{}"):
        return tuple(range(partitions))
    if text.startswith("mesh["):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", text[: text.find("]")])}
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        chosen = {axis: [0] for axis in sizes}
        # An axis, or a part of one, 'a':(how many parts are outside of it)size.
        for axis, outer, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", text[text.find("]") :]):
            count = int(part or sizes[axis])
            stride = sizes[axis] // (int(outer or 1) * count)
            chosen[axis] = [at + stride * i for at in chosen[axis] for i in range(count)]
        return tuple(devices[np.ix_(*chosen.values())].flatten().tolist())
    if match := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        (groups, size), dims, order = (tuple(int(n) for n in (part or "").split(",") if n) for part in match.groups())
        devices = np.arange(groups * size).reshape(dims)
        return tuple(devices.transpose(order or None).flatten()[:size].tolist())
    if match := re.match(r"\{\{([\d,]*)\}", text):
        return tuple(int(n) for n in match.group(1).split(","))
    raise HloError(f"replica_groups of an unknown form: {text[:80]!r}")

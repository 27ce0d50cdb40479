"""Which links of a slice a collective uses.

The chips of a TPU slice are a torus: each has links along every axis, one each way, and those of different axes are
different wires. A collective uses the links along which its devices differ. A permute goes one way, any other
collective both.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from qwen3_jax.plan.hlo import Instruction, group

Wire = tuple[int, bool]
"""An axis of the torus, and which way along it."""
Places = Sequence[tuple[int, ...]]
"""Where each partition's chip is in the torus; empty where all links are one, as behind a switch."""


def places_of(devices: Iterable[Any]) -> Places:
    """Return where the devices of a mesh are, in its order."""
    places = [tuple(getattr(device, "coords", ())) for device in devices]
    return places if all(places) else ()


def wires(instruction: Instruction, partitions: int, places: Places) -> frozenset[Wire]:
    """Return the links that one chip uses in a collective."""
    pairs = instruction.attribute("source_target_pairs")
    if pairs is None:
        return frozenset(
            (axis, way) for axis in _axes([group(instruction, partitions)], places) for way in (True, False)
        )
    found = [(int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs)]
    # The shorter way round towards higher numbers, or lower ones.
    ahead = sum(1 if (target - source) % partitions <= partitions // 2 else -1 for source, target in found)
    return frozenset((axis, ahead >= 0) for axis in _axes(found, places))


def _axes(groups: Sequence[Sequence[int]], places: Places) -> set[int]:
    """Return the axes along which the members of a group differ; axis 0 if none, as for the cores of one chip."""
    if not places:
        return {0}
    found = set()
    for members in groups:
        along = zip(*(places[member] for member in members), strict=True)
        found |= {axis for axis, values in enumerate(along) if len(set(values)) > 1}
    return found or {0}

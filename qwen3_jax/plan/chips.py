"""The chips that plans are made for, from configs/chips.toml, and slices of TPUs by their topology name.

Peak rates are those of the makers' data sheets; where each number comes from stands beside it in the file.
"""

import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path


class ChipError(ValueError):
    """A chip or a topology that does not exist; one line with those that do."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator as programs see it: for tpu7x that is one of the two devices of a chip."""

    name: str
    kind: str
    """"tpu" or "gpu"."""
    bf16_flops: float
    int8_ops: float
    """0 if the chip has no faster 8-bit matrix unit."""
    hbm_bytes: float
    hbm_bytes_s: float
    link_bytes_s: float
    """One ICI or NVLink link, one direction; 0 without such links."""
    links: int
    source: str
    unverified: str = ""
    """What of the above is not from a data sheet."""
    topologies: tuple[str, ...] = ()
    devices_per_chip: int = 1

    def rate(self, dtype: str) -> float:
        """Return the matrix unit's peak in operations per second for operands of an HLO dtype."""
        if dtype in ("s8", "u8", "s4", "u4") or dtype.startswith("f8"):
            return self.int8_ops or self.bf16_flops
        return self.bf16_flops


def _file() -> Path:
    package = Path(__file__).parents[1]
    for root in (package, package.parent):
        if (root / "configs" / "chips.toml").is_file():
            return root / "configs" / "chips.toml"
    raise ChipError(f"{package}/configs/chips.toml is missing: reinstall qwen3-jax")


@lru_cache
def chips() -> dict[str, Chip]:
    """Read every chip of configs/chips.toml, by name."""
    with _file().open("rb") as file:
        table = tomllib.load(file)
    return {
        name: Chip(name=name, **entry | {"topologies": tuple(entry.get("topologies", ()))})
        for name, entry in table.items()
    }


def chip(name: str) -> Chip:
    """Return a chip by name; raises ChipError."""
    found = {key.lower(): value for key, value in chips().items()}.get(name.lower())
    if found is None:
        raise ChipError(f"chip {name!r} is unknown: have {', '.join(chips())}")
    return found


@dataclass(frozen=True)
class Topology:
    """A slice of TPUs, or GPUs on one NVLink domain: "v5e:4x4", "H100:8"."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        return prod(self.shape) * self.chip.devices_per_chip

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def topology(name: str) -> Topology:
    """Read "v5e:4x4" or "H100:8".

    Raises:
        ChipError: no such chip, or no such slice of it; one line with the valid ones.
    """
    kind, separator, size = name.partition(":")
    if not separator or not re.fullmatch(r"\d+(x\d+){0,2}", size):
        raise ChipError(f"topology {name!r} is not CHIP:SIZE: have {', '.join(topology_names())}")
    try:
        found = chip(kind)
    except ChipError:
        raise ChipError(f"topology {name!r} has an unknown chip: have {', '.join(topology_names())}") from None
    if size not in found.topologies:
        valid = ", ".join(f"{found.name}:{s}" for s in found.topologies)
        raise ChipError(f"topology {name!r} does not exist: {found.name} has {valid}")
    return Topology(found, tuple(int(edge) for edge in size.split("x")))


def topology_names() -> list[str]:
    """List every topology of every chip."""
    return [f"{c.name}:{size}" for c in chips().values() for size in c.topologies]

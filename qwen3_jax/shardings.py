"""The `shardings` command: where every parameter and cache array of a model would lie on a mesh, before there is one.

config + axis sizes → the abstract parameters and cache with their logical axes → RULES → one row per distinct array:
spec and bytes per device; what does not divide; the nearest meshes that would. No device and no weight is touched, so
the mesh may be of any size.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.table import Table as RichTable

from qwen3_jax import cache, model
from qwen3_jax.checkpoint.hf import PARAM_DTYPES, param_dtype_of
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import Ops
from qwen3_jax.ops.plain import XLA
from qwen3_jax.placement import dotted, for_mesh
from qwen3_jax.sharding import AXES, RULES, Rules, ShardingError, check, parse_mesh

LAYER = re.compile(r"^layers\.(\d+)")


class Row(NamedTuple):
    """One array, or the same array of `times` layers."""

    name: str  # "layers.*.self_attn.q_proj"
    kind: str  # "parameter" or "cache"
    times: int
    axes: str  # logical names: "heads head_dim embed"
    shape: tuple[int, ...]  # of one
    spec: tuple[tuple[str, ...], ...]  # mesh axes per axis
    nbytes: int  # of all, over the whole mesh without copies
    bytes_per_device: int  # of all
    problems: tuple[str, ...]  # axes that do not divide


@dataclasses.dataclass(frozen=True)
class Table:
    """What `tabulate` returns; bytes are of `dtype` arrays."""

    mesh: dict[str, int]
    rules: str
    dtype: str
    batch: int
    context: int
    kv_heads: int  # stored, repetitions included
    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    nearest: tuple[dict[str, int], ...]  # meshes that fit; empty if this one does

    def bytes_per_device(self, kind: str) -> int:
        return sum(row.bytes_per_device for row in self.rows if row.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        totals = {kind: self.bytes_per_device(kind) for kind in ("parameter", "cache")}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rows = [row._asdict() for row in self.rows]
        return fields | {"rows": rows, "bytes_per_device": totals | {"total": sum(totals.values())}}


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Return a mesh without devices."""
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def tabulate(
    config: Qwen3Config,
    sizes: Mapping[str, int],
    *,
    rules: str = "serve",
    dtype: str,
    batch: int | None = None,
    context: int,
    ops: Ops = XLA,
    every: bool = False,
) -> Table:
    """Lay out a model's parameters and cache over a mesh.

    Args:
        config: of the model's file.
        sizes: length of every mesh axis.
        rules: a name in `sharding.RULES`.
        dtype: "float32" or "bfloat16", of parameters and cache.
        batch: rows of the cache; None for one per part.
        context: slots of each row.
        ops: whose cache.
        every: a row for each layer, where otherwise equal layers share one.

    Raises:
        ShardingError: no such rules.
        ValueError: the dtype is not supported.
    """
    if rules not in RULES:
        raise ShardingError([f"rules {rules!r} are unknown: use {' or '.join(RULES)}"])
    table, mesh = RULES[rules], abstract_mesh(sizes)
    wanted = param_dtype_of(dtype) or PARAM_DTYPES["bfloat16"]
    ways = math.prod(sizes[axis] for axis in table["batch"])
    batch = ways if batch is None else batch
    problems = check(config, mesh, table)
    laid_out = config if problems else for_mesh(config, mesh, table)
    if batch % ways:
        axes = " × ".join(table["batch"])
        problems.append(f"batch {batch} does not divide over {axes} {ways}: use a multiple of {ways}")

    _, parameters = model.declare(laid_out, dtype=wanted, ops=ops)
    arrays = [
        (path, "parameter", axes, dotted(parameters)[path])
        for path, axes in dotted(model.parameter_axes(laid_out, ops=ops)).items()
    ]
    layers = jax.eval_shape(
        lambda: cache.init(laid_out, batch=batch, capacity=context, dtype=jnp.dtype(wanted), ops=ops)
    )
    arrays += [
        (f"layers.{i}.cache.{name}", "cache", ops.cache_axes[name], leaf)
        for i, layer in enumerate(layers)
        for name, leaf in layer.items()
    ]
    rows = [_row(name, kind, axes, leaf, sizes, table) for name, kind, axes, leaf in arrays]
    return Table(
        mesh=dict(sizes),
        rules=rules,
        dtype=wanted.name,
        batch=batch,
        context=context,
        kv_heads=laid_out.num_key_value_heads,
        rows=tuple(rows if every else _merged(rows)),
        problems=tuple(problems),
        nearest=tuple(nearest_meshes(config, sizes, table)) if problems else (),
    )


def _row(name: str, kind: str, axes: str, leaf: Any, sizes: Mapping[str, int], rules: Rules) -> Row:
    parts = tuple(rules[axis] for axis in axes.split())
    ways = [math.prod(sizes[axis] for axis in part) for part in parts]
    shard = math.prod(-(-size // way) for size, way in zip(leaf.shape, ways, strict=True))
    problems = [
        f"{axis} {size} over {' × '.join(part)} {way}"
        for axis, size, part, way in zip(axes.split(), leaf.shape, parts, ways, strict=True)
        if size % way
    ]
    itemsize = leaf.dtype.itemsize
    nbytes = math.prod(leaf.shape) * itemsize
    return Row(name, kind, 1, axes, tuple(leaf.shape), parts, nbytes, shard * itemsize, tuple(problems))


def _merged(rows: list[Row]) -> list[Row]:
    """Merge the rows that differ in their layer only."""
    merged: dict[Any, Row] = {}
    for row in rows:
        row = row._replace(name=LAYER.sub("layers.*", row.name))
        key = row._replace(nbytes=0, bytes_per_device=0)
        before = merged.get(key)
        merged[key] = (
            row
            if before is None
            else before._replace(
                times=before.times + 1,
                nbytes=before.nbytes + row.nbytes,
                bytes_per_device=before.bytes_per_device + row.bytes_per_device,
            )
        )
    return list(merged.values())


def nearest_meshes(
    config: Qwen3Config, sizes: Mapping[str, int], rules: Rules, *, limit: int = 3
) -> list[dict[str, int]]:
    """Return the meshes of as many devices that the model divides over, nearest first.

    Near is a small change of the axes' lengths, counted in doublings; `fsdp` moves only where the rules split
    parameters by it.
    """
    devices = math.prod(sizes.values())
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    fixed = () if "fsdp" in (*rules["embed"], *rules["expert_mlp"] * bool(config.num_experts)) else ("fsdp",)
    choices = [(sizes[axis],) if axis in fixed else divisors for axis in AXES[:-1]]
    found = []
    for lengths in itertools.product(*choices):
        rest, remainder = divmod(devices, math.prod(lengths))
        if remainder or not rest:
            continue
        mesh: dict[str, int] = dict(zip(AXES, (*lengths, rest), strict=True))
        if not check(config, abstract_mesh(mesh), rules):
            found.append(mesh)
    return sorted(found, key=lambda mesh: (_distance(mesh, sizes), mesh["data"]))[:limit]


def _distance(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    return sum(abs(math.log2(one[axis] / other[axis])) for axis in AXES)


def show_mesh(sizes: Mapping[str, int]) -> str:
    """Write axis sizes as `parse_mesh` reads them, without the axes of length 1."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def config_of(name: Path | str) -> Qwen3Config:
    """Read the config of a folder, or of a released model by its name. Raises ConfigError."""
    return Qwen3Config.from_file(name) if Path(name).exists() else Qwen3Config.from_name(str(name))


def run(
    name: Path | str,
    mesh: str,
    *,
    rules: str = "serve",
    dtype: str = "bfloat16",
    batch: int | None = None,
    context: int = 4096,
    every: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Print the table for a folder or a released name; return 0 if everything divides, else 1.

    Raises:
        ConfigError, ShardingError, ValueError: an argument makes no sense.
    """
    table = tabulate(
        config_of(name), parse_mesh(mesh), rules=rules, dtype=dtype, batch=batch, context=context, every=every
    )
    if as_json:
        print(json.dumps({"model": str(name)} | table.to_dict(), indent=2))
    else:
        render(table, str(name), Console() if console is None else console)
    return 1 if table.problems else 0


def render(table: Table, title: str, console: Console) -> None:
    """Print a table for people."""
    devices = math.prod(table.mesh.values())
    rich = RichTable(title=f"{title} on {show_mesh(table.mesh)} ({devices} devices), {table.rules}, {table.dtype}")
    rich.add_column("array", no_wrap=True)
    rich.add_column("axes")
    rich.add_column("spec")
    rich.add_column("×", justify="right")
    rich.add_column("MiB/device", justify="right", no_wrap=True)
    for kind in ("parameter", "cache"):
        for row in (row for row in table.rows if row.kind == kind):
            style = "bold red" if row.problems else None
            mib = f"{row.bytes_per_device / 2**20:,.2f}"
            axes = " · ".join(f"{axis} {size}" for axis, size in zip(row.axes.split(), row.shape, strict=True))
            rich.add_row(row.name, axes, show_spec(row.spec, table.mesh), str(row.times), mib, style=style)
        total = table.bytes_per_device(kind)
        what = "parameters" if kind == "parameter" else f"cache, batch {table.batch}, context {table.context}"
        rich.add_row(f"all {what}", "", "", "", f"{total / 2**20:,.2f}", style="bold", end_section=True)
    console.print(rich)
    for problem in table.problems:
        console.print(problem, style="red", highlight=False, markup=False)
    if table.nearest:
        console.print("meshes of as many devices that fit: " + "  ".join(map(show_mesh, table.nearest)), markup=False)
    elif table.problems:
        console.print(f"no mesh of {devices} devices fits", markup=False)


def show_spec(parts: tuple[tuple[str, ...], ...], sizes: Mapping[str, int]) -> str:
    """Write a PartitionSpec briefly, without the mesh axes of length 1: "model · - · -"."""
    return " · ".join("+".join(axis for axis in part if sizes[axis] > 1) or "-" for part in parts)

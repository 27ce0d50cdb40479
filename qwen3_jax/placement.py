"""Put a checkpoint onto a mesh: every process reads only what its own devices hold.

config.json and tensor headers → `for_mesh`: does it divide, and how often each key/value head is stored → for each
parameter the slices that this process's devices need, each read once from the files → a global `jax.Array`. Nothing
passes between processes, and no process ever holds a parameter that its devices do not.

A parameter may lie in another order in memory than its shape says (`Ops.weight_order`), which no caller sees: programs
are compiled for the order in which their arguments lie.

Where `model` exceeds the key/value heads, `k_proj` and `v_proj` are stored with each head r times, so that every device
owns whole heads; the network then simply has K·r of them. `without_repeats` undoes it for export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qwen3_jax import model
from qwen3_jax.checkpoint import orbax_folder, orbax_sharded
from qwen3_jax.checkpoint.folder import open_folder
from qwen3_jax.checkpoint.hf import Params, Place, Source, on_default_device, param_dtype_of
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import Ops
from qwen3_jax.sharding import Rules, ShardingError, check, replicas_of_kv_heads, spec

REPEATED = ("k_proj", "v_proj")  # parameters whose leading axis is the key/value heads


def for_mesh(config: Qwen3Config, mesh: Mesh | AbstractMesh, rules: Rules) -> Qwen3Config:
    """Return the config of the network that runs on a mesh: the same, with each key/value head counted r times.

    Raises:
        ShardingError: with everything that the mesh does not divide.
    """
    if problems := check(config, mesh, rules):
        raise ShardingError(problems)
    repeats = replicas_of_kv_heads(config, mesh)
    return dataclasses.replace(config, num_key_value_heads=config.num_key_value_heads * repeats)


def load_sharded(
    folder: Path | str,
    mesh: Mesh,
    rules: Rules,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    ops: Ops,
    backbone: bool = False,
    progress: bool = True,
) -> tuple[Qwen3Config, Params]:
    """Load a model folder onto a mesh: (config for this mesh, parameters as a nested dict of global arrays).

    Every process of the mesh calls this with the same arguments; the folder must be visible to all of them. The host
    holds what its devices need (CPU devices) or a few parameters in passing (others).

    Args:
        folder: Hugging Face's, or an Orbax one, written on whatever mesh by however many processes.
        mesh: of `sharding.make_mesh`.
        rules: a table of `sharding.RULES`.
        dtype: the compute dtype, "float32", "bfloat16", or None for the file's.
        param_dtype: the parameters' dtype: None for `dtype`, "file" to keep each tensor's own.
        ops: the formulation that the network will run with.
        backbone: leave lm_head out, or do without it: embedding models.
        progress: show a bar on the first process's terminal.

    Raises:
        CheckpointError: with every problem of the folder.
        ShardingError: with everything that the mesh does not divide. Both before any parameter is read.
        ValueError: a dtype that is not supported.
    """
    wanted = param_dtype_of(dtype)
    if param_dtype is not None:
        wanted = None if isinstance(param_dtype, str) and param_dtype == "file" else param_dtype_of(param_dtype)
    checkpoint = open_folder(Path(folder), backbone=backbone)
    config = checkpoint.config
    on_mesh = for_mesh(config, mesh, rules)
    place = placer(config, mesh, rules, ops=ops)
    shown = progress and jax.process_index() == 0
    if isinstance(checkpoint, orbax_folder.Checkpoint):
        return on_mesh, orbax_sharded.load(checkpoint, dtype=wanted, place=place, progress=shown)
    return on_mesh, checkpoint.load(dtype=wanted, place=place, progress=shown)


def formats(config: Qwen3Config, mesh: Mesh, rules: Rules, *, ops: Ops) -> dict[str, NamedSharding | Format]:
    """Return where every parameter lies, by its dotted path: its sharding, and its order in memory if ops has one."""
    axes = dotted(model.parameter_axes(config, ops=ops))
    return {
        path: _ordered(NamedSharding(mesh, spec(names, rules)), ops.weight_order.get(names))
        for path, names in axes.items()
    }


def _ordered(sharding: Any, order: tuple[int, ...] | None) -> Any:
    return sharding if order is None else Format(Layout(order), sharding)


def abstract(params: Any, config: Qwen3Config, mesh: Mesh, rules: Rules, *, ops: Ops) -> Any:
    """Describe the parameters that `load_sharded` would return, to compile for: `params` are their shapes."""
    where = formats(config, mesh, rules, ops=ops)

    def describe(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where[dotted_path(path)])

    return jax.tree.map_with_path(describe, params)


def dotted(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Flatten a nested dict to {dotted path: leaf}."""
    return {dotted_path(path): leaf for path, leaf in jax.tree.leaves_with_path(dict(tree))}


def dotted_path(path: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in path)


def local_placer(config: Qwen3Config, *, ops: Ops) -> Place:
    """Return the `place` function that puts whole parameters on the default device, in the order that ops want."""
    if not ops.weight_order:
        return on_default_device
    axes = dotted(model.parameter_axes(config, ops=ops))
    here = jax.device_put(0).sharding

    def place(path: str, source: Source) -> jax.Array:
        order = ops.weight_order.get(axes[path])
        if order is None:
            return on_default_device(path, source)
        return jax.device_put(source[...], _ordered(here, order)).block_until_ready()

    return place


def placer(config: Qwen3Config, mesh: Mesh, rules: Rules, *, ops: Ops) -> Place:
    """Return the `place` function for `checkpoint.load`: a parameter's name and its reader → a global array.

    `config` is the file's, not the mesh's. Each distinct slice is read once, however many devices of this process
    hold it.
    """
    where = formats(config, mesh, rules, ops=ops)
    repeats = replicas_of_kv_heads(config, mesh)

    def place(path: str, source: Source) -> jax.Array:
        if repeats > 1 and path.endswith(REPEATED):
            source = Repeated(source, repeats)
        array = jax.make_array_from_callback(source.shape, where[path], once(source), source.dtype)
        return array.block_until_ready()  # the host's copy of it ends here, before the next one begins

    return place


def once(source: Source) -> Callable[[Any], np.ndarray]:
    """Wrap a reader so that an index that several devices ask for is read once."""
    have: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        key = tuple(i.indices(size)[:2] for i, size in zip(index, source.shape, strict=True))
        if key not in have:
            have[key] = source[index]
        return have[key]

    return read


class Repeated:
    """A source whose leading rows are each given `repeats` times in a row, and each read once."""

    def __init__(self, source: Source, repeats: int):
        self.shape, self.dtype = (source.shape[0] * repeats, *source.shape[1:]), source.dtype
        self._repeats, self._read = repeats, once(source)

    def __getitem__(self, index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(self.shape[0])
        begin, end = first // self._repeats, -(-last // self._repeats)
        rows = self._read((slice(begin, end), *index[1:]))
        if end - begin == 1:
            return np.broadcast_to(rows, (last - first, *rows.shape[1:])) if last - first > 1 else rows
        return rows[np.arange(first, last) // self._repeats - begin]


def without_repeats(params: Params, config: Qwen3Config) -> Params:
    """Undo the repetition of key/value heads: the parameters of `config`, the one of the file, for export.

    Raises:
        ShardingError: the parameters have a number of heads that is no multiple of the config's.
    """
    K = config.num_key_value_heads
    stored = params["layers"][0]["self_attn"]["k_proj"].shape[0]
    if stored % K:
        raise ShardingError(
            [f"num_key_value_heads {K} does not divide the {stored} heads of k_proj: pass the config of the file"]
        )
    repeats = stored // K

    def undo(path: tuple[Any, ...], leaf: Any) -> Any:
        if repeats == 1 or path[-1].key not in REPEATED:
            return leaf
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            # Fewer heads than devices again: every device gets them all.
            everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
            return jax.jit(lambda x: x[::repeats], out_shardings=everywhere)(leaf)
        return leaf[::repeats]

    return jax.tree.map_with_path(undo, params)

"""The checks, on the devices of this process: who is there, are collectives right and how fast, is there the memory."""

import contextlib
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax import shardings
from qwen3_jax.preflight.options import Options
from qwen3_jax.sharding import AXES, make_mesh, parse_mesh

KINDS = ("psum", "all_gather", "psum_scatter", "all_to_all", "ppermute")


def mesh_of(options: Options) -> Mesh:
    """Make the mesh that was asked for. Raises ShardingError."""
    sizes = dict.fromkeys(AXES, 1) | {"model": jax.device_count()} if options.mesh is None else parse_mesh(options.mesh)
    return make_mesh(data=sizes["data"], fsdp=sizes["fsdp"], expert=sizes["expert"], model=sizes["model"])


def devices() -> dict[str, Any]:
    """Return what this process sees of all devices."""
    return {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "platform": jax.default_backend(),
        "local": [str(device) for device in jax.local_devices()],
        "kinds": sorted({device.device_kind for device in jax.devices()}),
        "all": [[device.id, device.process_index] for device in jax.devices()],
    }


def collectives(mesh: Mesh, *, mib: float, rounds: int) -> list[dict[str, Any]]:
    """Run every kind of collective over every mesh axis longer than 1, and over all together; check and time each.

    Every device contributes [n, m] int32 numbers that name it and the place, so that each output has one right value,
    computed here without communication. `seconds` is the mean of `rounds` calls.
    """
    axes: list[tuple[str, ...]] = [(axis,) for axis in AXES if mesh.shape[axis] > 1]
    axes += [AXES] if len(axes) != 1 else []
    return [_collective(mesh, kind, axis, mib, rounds) for axis in axes for kind in KINDS]


def _collective(mesh: Mesh, kind: str, axes: tuple[str, ...], mib: float, rounds: int) -> dict[str, Any]:
    n = math.prod(mesh.shape[axis] for axis in axes)
    width = max(1, int(mib * 2**20 / 4 / n))
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    total = mesh.size

    def contribution(device: int) -> np.ndarray:
        return np.arange(n * width, dtype=np.int32).reshape(n, width) % 64 + 64 * device

    def on_device(x: jax.Array) -> jax.Array:
        x = x[0]
        if kind == "psum":
            return jax.lax.psum(x, axes)[None]
        if kind == "all_gather":
            return jax.lax.all_gather(x, axes)[None]
        if kind == "psum_scatter":
            return jax.lax.psum_scatter(x, axes, tiled=True)[None]
        if kind == "all_to_all":
            return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)[None]
        return jax.lax.ppermute(x, axes, [(i, (i + 1) % n) for i in range(n)])[None]

    step = jax.jit(
        jax.shard_map(
            on_device, mesh=mesh, in_specs=PartitionSpec(AXES), out_specs=PartitionSpec(AXES), check_vma=False
        )
    )
    x = jax.make_array_from_callback(
        (total, n, width),
        sharding,
        lambda index: contribution(int((index or (slice(0),))[0].start or 0))[None],
        jnp.int32,
    )
    out = step(x).block_until_ready()
    wrong = []
    places = np.arange(total).reshape(tuple(mesh.shape.values()))
    order = [AXES.index(axis) for axis in axes]
    for shard in out.addressable_shards:
        me = int(shard.index[0].start or 0)
        where = np.unravel_index(me, places.shape)
        line: Any = tuple(slice(None) if i in order else where[i] for i in range(len(AXES)))
        group: list[int] = places[line].reshape(-1).tolist()  # row-major over the axes, as XLA numbers them
        rank = group.index(me)
        parts = [contribution(member) for member in group]
        expected = {
            "psum": lambda parts=parts: np.sum(parts, axis=0),
            "all_gather": lambda parts=parts: np.stack(parts),
            "psum_scatter": lambda parts=parts, rank=rank: np.sum(parts, axis=0)[rank : rank + 1],
            "all_to_all": lambda parts=parts, rank=rank: np.stack([part[rank] for part in parts]),
            "ppermute": lambda parts=parts, rank=rank: parts[rank - 1],
        }[kind]()
        if not np.array_equal(np.asarray(shard.data)[0], expected):
            wrong.append(str(shard.device))
    begin = time.perf_counter()
    for _ in range(rounds):
        out = step(x)
        out.block_until_ready()
    seconds = (time.perf_counter() - begin) / max(1, rounds)
    return {
        "axes": list(axes) if axes != AXES else ["all"],
        "ways": n,
        "kind": kind,
        "bytes": n * width * 4,
        "seconds": seconds,
        "wrong": wrong,
    }


def memory(options: Options, mesh: Mesh, processes_here: int) -> dict[str, Any]:
    """Return bytes that the model needs per device and what each local device has; None where nobody knows.

    CPU devices share what their host has left, with those of the other processes on it.
    """
    need, problems = None, []
    if options.model is not None:
        config = shardings.config_of(options.model)
        table = shardings.tabulate(
            config,
            {axis: mesh.shape[axis] for axis in AXES},
            rules=options.rules,
            dtype=options.dtype,
            batch=options.batch,
            context=options.context,
        )
        problems = list(table.problems)
        need = table.bytes_per_device("parameter") + table.bytes_per_device("cache")
    have = []
    for device in jax.local_devices():
        if options.memory_gib is not None:
            have.append([str(device), int(options.memory_gib * 2**30)])
        elif device.platform == "cpu":
            share = host_available_bytes() // (jax.local_device_count() * processes_here)
            have.append([str(device), share])
        else:
            statistics = device.memory_stats() or {}
            limit = statistics.get("bytes_limit")
            have.append([str(device), None if limit is None else limit - statistics.get("bytes_in_use", 0)])
    return {"need_bytes_per_device": need, "have": have, "problems": problems}


def host_available_bytes() -> int:
    """Return the memory that programs can still have on this host."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

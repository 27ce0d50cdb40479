"""Small programs whose cost can be counted by hand, compiled for TPU slices that are described and not present.

`compile_all` compiles each `Case` with libtpu; the texts are kept under tests/data/hlo so that the walker is tested
without libtpu, and tests/test_plan_tpu.py checks that the compiler at hand still costs the same. Renew the files with
`python -m tests.tpu_programs`.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

FOLDER = Path(__file__).parent / "data" / "hlo"
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Case:
    """A program, and what it costs by hand per device; None where nothing exact can be said."""

    build: Callable[[Any], tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]]
    flops: int | None
    hbm_bytes: int | None
    ici_bytes: int = 0
    copied_bytes: int = 0
    topology: str = "v5e:2x2"


def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16, at: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=at)


def over(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))


def one(function: Callable[..., Any], *shapes: Any, donate: tuple[int, ...] = ()) -> Any:
    """Build a program that every device runs on whole arrays."""

    def build(mesh: Mesh):
        whole = over(mesh)
        return function, tuple(jax.tree.map(lambda s: array(s.shape, s.dtype, whole), s) for s in shapes), donate

    return build


def matmul(mesh: Mesh):
    return jnp.dot, (array((1024, 2048), at=over(mesh)), array((2048, 4096), at=over(mesh))), ()


def row_parallel(mesh: Mesh):
    """Each device holds a quarter of the contracted axis; the sum over devices is in bfloat16."""

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        out = jnp.dot(x, w, preferred_element_type=jnp.bfloat16)
        return lax.with_sharding_constraint(out, over(mesh))

    return f, (array((1024, 2048), at=over(mesh, None, "x")), array((2048, 4096), at=over(mesh, "x", None))), ()


def gathered(mesh: Mesh):
    return lambda x: lax.with_sharding_constraint(x, over(mesh)), (array((4096, 1024), at=over(mesh, "x")),), ()


def exchanged(mesh: Mesh):
    def f(x: jax.Array) -> jax.Array:
        move = lambda part: lax.all_to_all(part, "x", 1, 0, tiled=True)  # noqa: E731
        return jax.shard_map(move, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec(None, "x"))(x)

    return f, (array((4096, 4096), at=over(mesh, "x")),), ()


def shifted(mesh: Mesh):
    def f(x: jax.Array) -> jax.Array:
        move = lambda part: lax.ppermute(part, "x", [(i, (i + 1) % 4) for i in range(4)])  # noqa: E731
        return jax.shard_map(move, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))(x)

    return f, (array((4096, 4096), at=over(mesh, "x")),), ()


def scan(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply by 64 matrices of 8 MiB each: more than VMEM holds, so they stream."""
    return lax.scan(lambda carry, part: (jnp.tanh(carry @ part), None), x, w)[0]


def append(cache: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Write one row into a large array in place."""
    return lax.dynamic_update_slice(cache, new, (at, jnp.int32(0)))


def attention_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("BKGH,BSKH->BKGS", q, k, preferred_element_type=jnp.float32)


BIG = (262144, 1024)  # 512 MiB of bfloat16: cannot hide in VMEM

CASES: dict[str, Case] = {
    # 1024·2048 + 2048·4096 + 1024·4096 elements of 2 bytes
    "matmul": Case(matmul, 2 * 1024 * 2048 * 4096, 2 * (1024 * 2048 + 2048 * 4096 + 1024 * 4096)),
    # each device: a quarter of the products; a ring all-reduce sends 2·3/4 of the 8 MiB result
    "row_parallel": Case(row_parallel, 2 * 1024 * 512 * 4096, None, ici_bytes=8 * MIB * 2 * 3 // 4),
    "gathered": Case(gathered, 0, None, ici_bytes=8 * MIB * 3 // 4, copied_bytes=8 * MIB),
    "exchanged": Case(exchanged, 0, None, ici_bytes=8 * MIB * 3 // 4),
    "shifted": Case(shifted, 0, None, ici_bytes=8 * MIB),
    # the matrices once each; the carry stays in VMEM
    "scan": Case(
        one(scan, array((256, 2048)), array((64, 2048, 2048))),
        64 * 2 * 256 * 2048 * 2048,
        64 * 8 * MIB + 2 * MIB,
        copied_bytes=1 * MIB,  # of x, which is not donated and becomes the carry
    ),
    # a row of 2 KiB, in and out; the array is 512 MiB
    "append": Case(one(append, array(BIG), array((1, 1024)), array((), jnp.int32), donate=(0,)), 0, None),
    # the same without donation: 512 MiB in and out
    "append_copied": Case(
        one(append, array(BIG), array((1, 1024)), array((), jnp.int32)), 0, 1024 * MIB, copied_bytes=512 * MIB
    ),
    # 128 rows of 2 KiB, read and written
    "lookup": Case(one(lambda table, ids: table[ids], array(BIG), array((128,), jnp.int32)), 0, 2 * 128 * 2 * KIB),
    "scores": Case(
        one(attention_scores, array((32, 2, 4, 128)), array((32, 4096, 2, 128))),
        2 * 32 * 2 * 4 * 4096 * 128,
        2 * 32 * 4096 * 2 * 128 + 4 * 32 * 2 * 4 * 4096 + 2 * 32 * 2 * 4 * 128,
    ),
    "transposed": Case(one(lambda w: w.T.copy(), array((8192, 16384))), 0, None, copied_bytes=256 * MIB),
}


def mesh_for(topology: str) -> Mesh:
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    return Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))


def compile_case(case: Case) -> tuple[str, Any]:
    """Compile one case; returns its text and its memory analysis."""
    mesh = mesh_for(case.topology)
    function, shapes, donate = case.build(mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, donate_argnums=donate).lower(*shapes).compile()
    text = compiled.as_text()
    assert text is not None
    return text, compiled.memory_analysis()


def plain_text(text: str) -> str:
    """Drop what no cost depends on: stack frames, kernel windows, source names."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(("%", "ENTRY")))
    kept = [lines[0], "", *lines[start:]]
    kept = [re.sub(r", metadata=\{[^{}]*\}", "", line) for line in kept]
    return "\n".join(line if "tpu_custom_call" in line else _without_config(line) for line in kept) + "\n"


def _without_config(line: str) -> str:
    start = line.find(", backend_config={")
    return line if start < 0 else line[:start]


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        (FOLDER / f"{name}.txt").write_text(plain_text(compile_case(case)[0]))
        print(name)

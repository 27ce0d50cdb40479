"""The gradient of the experts' kernel on a TPU, over the same tiles of rows, each of which has one expert.

    rows, slope → `_slopes`, a tile at a time: gate, up and hidden again, then the slopes of rows, gate and up
    left, right → `_outer`, three times: for each expert the sum of its tiles' outer products, in float32

XLA differentiates `lax.ragged_dot_general` on a TPU into products of all rows with all experts, and copies the stacks.
JAX's own grouped product for this, megablox's `tgmm`, takes these layouts, but not under strict dtype promotion; it
lets in what pads a group, and states the cost of the whole buffer instead of that of the tiles that hold rows.

A row whose slope is zero throughout is padding, or might as well be: it adds nothing, whatever it holds, NaN included.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.ops.moe_tpu_tiles import add_slice, in_hbm, owners, probable, product, slice_width, widest

SUM_VMEM_BYTES = 24 * 2**20  # of one expert's gradient: the sum, and the result double buffered


class Visits(NamedTuple):
    """In which order `_outer` walks over the tiles: expert after expert, one visit for an expert without tiles."""

    expert: jax.Array
    """Of each visit."""
    tile: jax.Array
    """Of each visit; any where the expert has none."""
    first: jax.Array
    """Of each expert: its first visit."""
    tiles: jax.Array
    """Of each expert."""


def gradients(
    tile: int,
    likely: tuple[float, int],
    interpret: bool,
    rows: jax.Array,
    sizes: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
    slope: jax.Array,
) -> tuple[jax.Array, ...]:
    """Return the slopes of rows, gate_proj, up_proj and down_proj; see `moe_tpu.swiglu`.

    Args:
        tile, likely, interpret, rows, sizes, gate_proj, up_proj, down_proj: as in `moe_tpu.swiglu`.
        slope: [M, D] of the result, zero where a row pads its group.

    Returns:
        [M, D], undefined beyond the last group, and [E, F, D], [E, F, D], [E, D, F] in the stacks' dtypes, zero for an
        expert without rows.
    """
    d_rows, d_gate, d_up, hidden = _slopes(
        tile, likely, interpret, sizes, rows, slope, *in_hbm(interpret, gate_proj, up_proj, down_proj)
    )
    outer = partial(_outer, tile, likely, interpret, _visits(len(rows) // tile, sizes // tile))
    pairs = ((d_gate, rows, gate_proj), (d_up, rows, up_proj), (slope, hidden, down_proj))
    return d_rows, *(outer(left, right, stack.dtype) for left, right, stack in pairs)


def _slopes(
    tile: int, likely: tuple[float, int], interpret: bool, sizes: jax.Array, rows: jax.Array, *arrays: jax.Array
) -> list[jax.Array]:
    """Return the slopes of rows [M, D], gate and up [M, F], and the hidden activations [M, F]."""
    slope, gate_proj, up_proj, down_proj = arrays
    M, D = rows.shape
    F = gate_proj.shape[1]
    width = slice_width(gate_proj)
    ends, owner = owners(tile, M // tile, sizes)
    itemsize = rows.dtype.itemsize
    done, reads = probable(M, tile, likely, whole=width == F)
    weights_bytes = 6 * width * D * gate_proj.dtype.itemsize
    row_bytes = tile * D * (6 * itemsize + 3 * 4) + tile * width * (6 * itemsize + 8 * 4)
    up_spec = pl.BlockSpec((1, width, D), lambda i, f, owner: (owner[i], f, 0))
    down_spec = pl.BlockSpec((1, D, width), lambda i, f, owner: (owner[i], 0, f))
    row_spec = pl.BlockSpec((tile, D), lambda i, f, owner: (i, 0))
    hidden_spec = pl.BlockSpec((tile, width), lambda i, f, owner: (i, f))
    narrow = jax.ShapeDtypeStruct((M, F), rows.dtype)
    return pl.pallas_call(
        partial(_slopes_kernel, F // width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(ends[-1], F // width),
            in_specs=[row_spec, row_spec, up_spec, up_spec, down_spec],
            out_specs=[row_spec, hidden_spec, hidden_spec, hidden_spec],
            scratch_shapes=[pltpu.VMEM((tile, D), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(rows.shape, rows.dtype), narrow, narrow, narrow],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=weights_bytes + row_bytes + 4 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * done * D * F,
            bytes_accessed=3 * done * (D + F) * itemsize + round(3 * reads * D * F) * gate_proj.dtype.itemsize,
            transcendentals=done * F,
        ),
        interpret=interpret,
        name="grouped_swiglu_slopes",
    )(owner, rows, slope, gate_proj, up_proj, down_proj)


def _slopes_kernel(
    slices: int,
    owner: Any,
    rows: Any,
    slope: Any,
    gate_proj: Any,
    up_proj: Any,
    down_proj: Any,
    d_rows: Any,
    d_gate: Any,
    d_up: Any,
    hidden: Any,
    total: Any,
) -> None:
    del owner
    x, d_out = _counted(rows[...], slope[...]), slope[...]
    gate, up = product(x, gate_proj[0], 1, 1), product(x, up_proj[0], 1, 1)
    inner, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    to_gate, to_up = (d.astype(x.dtype) for d in pull(product(d_out, down_proj[0], 1, 0)))
    d_gate[...], d_up[...], hidden[...] = to_gate, to_up, inner.astype(x.dtype)
    part = product(to_gate, gate_proj[0], 1, 0) + product(to_up, up_proj[0], 1, 0)
    add_slice(pl.program_id(1), slices, part, total, d_rows)


def _visits(tiles: int, counts: jax.Array) -> Visits:
    """Order the tiles, `counts` of each expert, for `_outer`."""
    ends = jnp.cumsum(jnp.maximum(counts, 1))
    first = ends - jnp.maximum(counts, 1)
    visit = jnp.arange(tiles + len(counts), dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(visit[:, None] >= ends, axis=1), len(counts) - 1).astype(jnp.int32)
    at = visit - first[expert] + (jnp.cumsum(counts) - counts)[expert]
    return Visits(expert, jnp.clip(at, 0, tiles - 1), first, counts)


def _outer(
    tile: int,
    likely: tuple[float, int],
    interpret: bool,
    visits: Visits,
    left: jax.Array,
    right: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """Sum each expert's outer products: left [M, N], right [M, K] -> [E, N, K], zero for an expert without rows."""
    (M, N), K = left.shape, right.shape[1]
    E = len(visits.tiles)
    width = widest(K, N * (4 + 2 * dtype.itemsize), SUM_VMEM_BYTES)
    itemsize = left.dtype.itemsize
    done, _ = probable(M, tile, likely, whole=True)
    sum_bytes = N * width * (2 * 4 + 2 * dtype.itemsize)
    row_bytes = tile * (N + width) * (2 * itemsize + 2 * 4)
    return pl.pallas_call(
        _outer_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(K // width, visits.first[-1] + jnp.maximum(visits.tiles[-1], 1)),
            in_specs=[
                pl.BlockSpec((tile, N), lambda k, i, expert, tile, first, tiles: (tile[i], 0)),
                pl.BlockSpec((tile, width), lambda k, i, expert, tile, first, tiles: (tile[i], k)),
            ],
            out_specs=pl.BlockSpec((1, N, width), lambda k, i, expert, tile, first, tiles: (expert[i], 0, k)),
            scratch_shapes=[pltpu.VMEM((N, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((E, N, K), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=sum_bytes + row_bytes + 4 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * done * N * K,
            bytes_accessed=done * (N * (K // width) + K) * itemsize + E * N * K * dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_outer_product",
    )(*visits, left, right)


def _outer_kernel(expert: Any, at: Any, first: Any, tiles: Any, left: Any, right: Any, out: Any, total: Any) -> None:
    del at
    mine = expert[pl.program_id(1)]
    n = pl.program_id(1) - first[mine]

    @pl.when(n == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(n < tiles[mine])
    def _() -> None:
        total[...] += product(left[...], _counted(right[...], left[...]), 0, 0)

    @pl.when(n + 1 >= tiles[mine])
    def _() -> None:
        out[0] = total[...].astype(out.dtype)


def _counted(x: jax.Array, slope: jax.Array) -> jax.Array:
    """Return the rows x, zero where the slope is zero throughout."""
    size = jnp.sum(jnp.abs(slope.astype(jnp.float32)), axis=1, keepdims=True)
    return jnp.where(size != 0, x, 0).astype(x.dtype)

"""The experts on a TPU: a Pallas kernel for many rows, plain products for few.

`lax.ragged_dot` on a TPU wants its matrices as [E, in, out] and copies the [E, out, in] stacks of a checkpoint on every
call (seen in the compiled program). The kernel here takes them as they are, reads an expert once for all of its rows
while they fit a tile, keeps the hidden activations on the chip, and skips what no row chose.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.ops.moe import every, grouped, ragged_swiglu, round_up

FEW_ROWS = 128  # the matrix unit takes as long for fewer
WEIGHTS_VMEM_BYTES = 20 * 2**20  # of one expert, double buffered


def moe(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
    *,
    expected: int | None = None,
) -> jax.Array:
    """Run the experts; see `Ops.moe`. Few rows that choose most experts run `every`, others `grouped`."""
    R, C = experts.shape
    E = gate_proj.shape[0]
    routes = R * C if expected is None else expected
    if R <= FEW_ROWS and routes >= 2 * E:
        return every(x, weights, experts, gate_proj, up_proj, down_proj)
    align = min(round_up(R, 16), 128 if routes < 512 * E else 256)
    tiles = -(-routes // align) + E // 2
    kernel = partial(swiglu, align, tiles, False)
    return grouped(x, weights, experts, gate_proj, up_proj, down_proj, expected=expected, swiglu=kernel, align=align)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def swiglu(
    tile: int,
    tiles: int,
    interpret: bool,
    rows: jax.Array,
    sizes: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
) -> jax.Array:
    """Run each group through its expert in one kernel; see `moe.Swiglu`. Groups are whole tiles.

    Args:
        tile: rows per step; M and all sizes are multiples of it.
        tiles: how many are expected to hold rows, for the kernel's cost estimate.
        interpret: run on the CPU, for tests.
    """
    M, D = rows.shape
    E, F, _ = gate_proj.shape
    width = _width(F, 6 * D * gate_proj.dtype.itemsize)
    owner = jnp.sum(jnp.arange(M // tile, dtype=jnp.int32)[:, None] >= jnp.cumsum(sizes) // tile, axis=1)
    steps = jnp.sum(sizes) // tile
    itemsize = rows.dtype.itemsize
    done = min(M // tile, tiles) * tile
    reads = min(E, tiles) if width == F else min(M // tile, tiles)
    weights_bytes, row_bytes = 6 * width * D * gate_proj.dtype.itemsize, tile * D * (4 * itemsize + 2 * 4)
    vmem_bytes = weights_bytes + row_bytes + 4 * tile * width * 4 + 4 * 2**20
    if not interpret:
        # The kernel streams the weights while it multiplies. Fetched whole into VMEM before it starts, they would drive
        # the activations around it out to HBM.
        gate_proj, up_proj, down_proj = (
            pltpu.with_memory_space_constraint(w, pltpu.HBM) for w in (gate_proj, up_proj, down_proj)
        )
    up_spec = pl.BlockSpec((1, width, D), lambda i, f, owner: (owner[i], f, 0))
    row_spec = pl.BlockSpec((tile, D), lambda i, f, owner: (i, 0))
    return pl.pallas_call(
        partial(_kernel, F // width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps, F // width),
            in_specs=[row_spec, up_spec, up_spec, pl.BlockSpec((1, D, width), lambda i, f, owner: (owner[i], 0, f))],
            out_specs=row_spec,
            scratch_shapes=[pltpu.VMEM((tile, D), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * done * D * F,
            bytes_accessed=2 * done * D * itemsize + 3 * reads * D * F * gate_proj.dtype.itemsize,
            transcendentals=done * F,
        ),
        interpret=interpret,
        name="grouped_swiglu",
    )(jnp.minimum(owner, E - 1).astype(jnp.int32), rows, gate_proj, up_proj, down_proj)


def _kernel(
    widths: int, owner: Any, rows: Any, gate_proj: Any, up_proj: Any, down_proj: Any, out: Any, total: Any
) -> None:
    del owner
    f = pl.program_id(1)
    x = rows[...]
    hidden = jax.nn.silu(_times(x, gate_proj[0])) * _times(x, up_proj[0])
    part = _times(hidden.astype(x.dtype), down_proj[0])
    if widths == 1:
        out[...] = part.astype(out.dtype)
        return

    @pl.when(f == 0)
    def _():
        total[...] = part

    @pl.when(f > 0)
    def _():
        total[...] += part

    @pl.when(f == widths - 1)
    def _():
        out[...] = total[...].astype(out.dtype)


def _times(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply [rows, in] by [out, in]."""
    return lax.dot_general(x, w.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _width(F: int, bytes_per_column: int) -> int:
    """Return the widest slice of the expert width, in whole 128 lanes, whose double-buffered weights fit."""
    fits = [w for w in range(128, F + 1, 128) if F % w == 0 and w * bytes_per_column <= WEIGHTS_VMEM_BYTES]
    return max(fits, default=F)


def _forward(tile: int, tiles: int, interpret: bool, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    return swiglu(tile, tiles, interpret, *arrays), arrays


def _backward(tile: int, tiles: int, interpret: bool, saved: Any, slope: jax.Array) -> tuple[Any, ...]:
    rows, sizes, *stacks = saved
    d_rows, *d_stacks = jax.vjp(lambda rows, *stacks: ragged_swiglu(rows, sizes, *stacks), rows, *stacks)[1](slope)
    return d_rows, None, *d_stacks


swiglu.defvjp(_forward, _backward)

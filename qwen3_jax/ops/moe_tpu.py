"""The experts on a TPU: a Pallas kernel for many rows, plain products for few.

`lax.ragged_dot` on a TPU wants its matrices as [E, in, out] and copies the [E, out, in] stacks of a checkpoint on every
call (seen in the compiled program). The kernel here takes them as they are, reads an expert once for all of its rows
while they fit a tile, keeps the hidden activations on the chip, and skips what no row chose. `moe_tpu_grad` has its
gradient.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.ops.moe import Turn, every, grouped, round_up
from qwen3_jax.ops.moe_tpu_grad import gradients
from qwen3_jax.ops.moe_tpu_tiles import (
    add_slice,
    best_height,
    expected_tiles,
    in_hbm,
    owners,
    probable,
    product,
    slice_width,
)

FEW_ROWS = 128  # the matrix unit takes as long for fewer


def moe(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
    *,
    expected: int | None = None,
    turn: Turn | None = None,
) -> jax.Array:
    """Run the experts; see `Ops.moe`. Few rows that choose most experts run `every`, others `grouped`.

    With a turn only its experts run; see `grouped`.
    """
    R, C = experts.shape
    E = gate_proj.shape[0]
    routes = R * C if expected is None else expected
    if turn is None and R <= FEW_ROWS and routes >= 2 * E:
        return every(x, weights, experts, gate_proj, up_proj, down_proj)
    busy = E if turn is None else turn.experts
    mean = routes / busy
    align = min(round_up(R, 16), best_height(mean))
    kernel = partial(_swiglu, align, expected_tiles(mean, align) * busy, busy)
    stacks = gate_proj, up_proj, down_proj
    return grouped(x, weights, experts, *stacks, expected=expected, turn=turn, swiglu=kernel, align=align)


def _swiglu(tile: int, tiles: float, busy: int, *arrays: jax.Array, only: tuple[int, int] | None = None) -> jax.Array:
    """Run the kernel; `tiles` are expected to hold rows of `busy` experts, or that much of each expert in `only`."""
    if only is None:
        return swiglu(tile, (tiles, busy), False, None, *arrays)
    count = only[1] - only[0]
    return swiglu(tile, (tiles * count / busy, count), False, only, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def swiglu(
    tile: int,
    likely: tuple[float, int],
    interpret: bool,
    only: tuple[int, int] | None,
    rows: jax.Array,
    sizes: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
) -> jax.Array:
    """Run each group through its expert in one kernel; see `moe.Swiglu`. Groups are whole tiles.

    Args:
        tile: rows per step; M and all sizes are multiples of it.
        likely: how many tiles and experts are expected to hold rows, for the kernel's cost estimate.
        interpret: run on the CPU, for tests.
        only: begin and end of the experts that run; None runs all.
    """
    M, D = rows.shape
    E, F, _ = gate_proj.shape
    width = slice_width(gate_proj)
    ends, owner = owners(tile, M // tile, sizes)
    begin, end = (0, E) if only is None else only
    skipped = ends[begin - 1] if begin else jnp.int32(0)
    itemsize = rows.dtype.itemsize
    done, reads = probable(M, tile, likely, whole=width == F)
    weights_bytes, row_bytes = 6 * width * D * gate_proj.dtype.itemsize, tile * D * (4 * itemsize + 2 * 4)
    vmem_bytes = weights_bytes + row_bytes + 4 * tile * width * 4 + 4 * 2**20
    up_spec = pl.BlockSpec((1, width, D), lambda i, f, owner, skipped: (owner[skipped[0] + i], f, 0))
    down_spec = pl.BlockSpec((1, D, width), lambda i, f, owner, skipped: (owner[skipped[0] + i], 0, f))
    row_spec = pl.BlockSpec((tile, D), lambda i, f, owner, skipped: (skipped[0] + i, 0))
    return pl.pallas_call(
        partial(_kernel, F // width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(ends[end - 1] - skipped, F // width),
            in_specs=[row_spec, up_spec, up_spec, down_spec],
            out_specs=row_spec,
            scratch_shapes=[pltpu.VMEM((tile, D), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * done * D * F,
            bytes_accessed=2 * done * D * itemsize + round(3 * reads * D * F) * gate_proj.dtype.itemsize,
            transcendentals=done * F,
        ),
        interpret=interpret,
        name="grouped_swiglu",
    )(owner, jnp.atleast_1d(skipped), rows, *in_hbm(interpret, gate_proj, up_proj, down_proj))


def _kernel(
    slices: int, owner: Any, skipped: Any, rows: Any, gate_proj: Any, up_proj: Any, down_proj: Any, out: Any, total: Any
) -> None:
    del owner, skipped
    x = rows[...]
    hidden = jax.nn.silu(product(x, gate_proj[0], 1, 1)) * product(x, up_proj[0], 1, 1)
    add_slice(pl.program_id(1), slices, product(hidden.astype(x.dtype), down_proj[0], 1, 1), total, out)


def _forward(tile: int, likely: Any, interpret: bool, only: Any, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    return swiglu(tile, likely, interpret, only, *arrays), arrays


def _backward(tile: int, likely: Any, interpret: bool, only: Any, saved: Any, slope: jax.Array) -> tuple[Any, ...]:
    assert only is None, "turns have no gradient, see moe.grouped"
    rows, sizes, gate_proj, up_proj, down_proj = saved
    d_rows, *d_stacks = gradients(tile, likely, interpret, rows, sizes, gate_proj, up_proj, down_proj, slope)
    return d_rows, None, *d_stacks


swiglu.defvjp(_forward, _backward)

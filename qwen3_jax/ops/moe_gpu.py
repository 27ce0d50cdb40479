"""The experts on a GPU: a grouped matrix product in Pallas, through Triton, for any NVIDIA GPU from Ampere on.

XLA expands `lax.ragged_dot` on GPUs into a masked product over all experts, a gigabyte of temporaries for a layer. Here
every group is padded to whole tiles of rows, so that a tile has one expert, whose weights it reads as [E, out, in].
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen3_jax.ops.moe import grouped, round_up

COLUMNS = 128  # of a tile of the result
DEPTH = 64  # of one step along the contracted axis


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
    """Run the experts; see `Ops.moe`."""
    R, C = experts.shape
    routes = R * C if expected is None else expected
    tile = min(round_up(R, 16), 64 if routes < 128 * gate_proj.shape[0] else 128)
    tile = 1 << (tile - 1).bit_length()  # Triton's tiles are powers of two
    kernel = partial(swiglu, tile, False)
    return grouped(x, weights, experts, gate_proj, up_proj, down_proj, expected=expected, swiglu=kernel, align=tile)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def swiglu(
    tile: int,
    interpret: bool,
    rows: jax.Array,
    sizes: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
) -> jax.Array:
    """Run each group through its expert, see `moe.Swiglu`; M and all sizes are multiples of the tile."""
    return _forward(tile, interpret, rows, sizes, gate_proj, up_proj, down_proj)[0]


def _forward(
    tile: int,
    interpret: bool,
    rows: jax.Array,
    sizes: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
) -> tuple[jax.Array, Any]:
    multiply = partial(_multiply, tile, interpret, sizes, True)
    gate, up = multiply(rows, gate_proj), multiply(rows, up_proj)
    hidden = jax.nn.silu(gate) * up
    return multiply(hidden, down_proj), (rows, sizes, gate_proj, up_proj, down_proj, gate, up)


def _backward(tile: int, interpret: bool, saved: Any, slope: jax.Array) -> tuple[Any, ...]:
    rows, sizes, gate_proj, up_proj, down_proj, gate, up = saved
    multiply = partial(_multiply, tile, interpret, sizes, False)
    outer = partial(_outer, tile, interpret, sizes)
    hidden, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    d_gate, d_up = pull(multiply(slope, down_proj))
    d_rows = multiply(d_gate, gate_proj) + multiply(d_up, up_proj)
    stacks = ((d_gate, rows, gate_proj), (d_up, rows, up_proj), (slope, hidden, down_proj))
    return d_rows, None, *(outer(out, into).astype(w.dtype) for out, into, w in stacks)


swiglu.defvjp(_forward, _backward)


def _multiply(
    tile: int, interpret: bool, sizes: jax.Array, transposed: bool, rows: jax.Array, stack: jax.Array
) -> jax.Array:
    """Multiply each group of rows [M, K] by its expert's matrix, [N, K] if transposed, else [K, N]."""
    M, K = rows.shape
    E, N = stack.shape[0], stack.shape[1 if transposed else 2]
    columns, depth = _divisor(N, COLUMNS), _divisor(K, DEPTH)
    first = jnp.arange(M // tile, dtype=jnp.int32) * tile
    owner = jnp.sum(first[:, None] >= jnp.cumsum(sizes), axis=1, dtype=jnp.int32)  # E where a tile has none

    def kernel(owner: Any, rows: Any, stack: Any, out: Any) -> None:
        some, these = pl.ds(pl.program_id(0) * tile, tile), pl.ds(pl.program_id(1) * columns, columns)
        expert = owner[pl.program_id(0)]

        @pl.when(expert < E)
        def _() -> None:
            def step(k: jax.Array, total: jax.Array) -> jax.Array:
                part = pl.ds(k * depth, depth)
                x = rows[some, part]
                w = stack[expert, these, part] if transposed else stack[expert, part, these]
                return total + triton.dot(x, w.astype(x.dtype), trans_b=transposed)

            total = lax.fori_loop(0, K // depth, step, jnp.zeros((tile, columns), jnp.float32))
            out[some, these] = total.astype(out.dtype)

    return pl.pallas_call(
        kernel,
        grid=(M // tile, N // columns),
        out_shape=jax.ShapeDtypeStruct((M, N), rows.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_product",
    )(owner, rows, stack)


def _outer(tile: int, interpret: bool, sizes: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Sum each group's outer products: left [M, N], right [M, K] -> [E, N, K], zero for an empty group."""
    N, K = left.shape[1], right.shape[1]
    height, width = _divisor(N, DEPTH), _divisor(K, COLUMNS)
    ends = jnp.cumsum(sizes)

    def kernel(starts: Any, ends: Any, left: Any, right: Any, out: Any) -> None:
        expert = pl.program_id(0)
        these, those = pl.ds(pl.program_id(1) * height, height), pl.ds(pl.program_id(2) * width, width)

        def step(k: jax.Array, total: jax.Array) -> jax.Array:
            some = pl.ds(k * tile, tile)
            return total + triton.dot(left[some, these], right[some, those], trans_a=True)

        first, last = lax.div(starts[expert], jnp.int32(tile)), lax.div(ends[expert], jnp.int32(tile))
        out[expert, these, those] = lax.fori_loop(first, last, step, jnp.zeros((height, width), jnp.float32))

    return pl.pallas_call(
        kernel,
        grid=(len(sizes), N // height, K // width),
        out_shape=jax.ShapeDtypeStruct((len(sizes), N, K), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_outer_product",
    )(ends - sizes, ends, left, right)


def _divisor(n: int, most: int) -> int:
    """Return the largest power of two that divides n, up to `most`."""
    return min(n & -n, most)

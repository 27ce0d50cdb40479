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

from qwen3_jax.ops.moe import grouped, ragged_swiglu, round_up

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
    """Run each group through its expert in two kernels; see `moe.Swiglu`. M and all sizes are multiples of the tile.

    The gradient goes through `ragged_swiglu`: right, but with the temporaries this kernel avoids.
    """
    E = gate_proj.shape[0]
    first = jnp.arange(rows.shape[0] // tile, dtype=jnp.int32) * tile
    owner = jnp.sum(first[:, None] >= jnp.cumsum(sizes), axis=1, dtype=jnp.int32)  # E where a tile has none
    hidden = _multiply(tile, interpret, owner, E, rows, gate_proj, up_proj)
    return _multiply(tile, interpret, owner, E, hidden, down_proj)


def _multiply(tile: int, interpret: bool, owner: jax.Array, E: int, rows: jax.Array, *stacks: jax.Array) -> jax.Array:
    """Multiply each tile by its expert's matrix; of two stacks the first is the gate of the second."""
    M, K = rows.shape
    N = stacks[0].shape[1]
    columns, depth = (_divisor(n, most) for n, most in ((N, COLUMNS), (K, DEPTH)))

    def kernel(owner: Any, rows: Any, *rest: Any) -> None:
        *stacks, out = rest
        i, j = pl.program_id(0), pl.program_id(1)
        expert = owner[i]
        some, these = pl.ds(i * tile, tile), pl.ds(j * columns, columns)

        @pl.when(expert < E)
        def _() -> None:
            def step(k: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                part = pl.ds(k * depth, depth)
                x = rows[some, part]
                return tuple(
                    total + triton.dot(x, w[expert, these, part].astype(x.dtype), trans_b=True)
                    for total, w in zip(sums, stacks, strict=True)
                )

            zeros = tuple(jnp.zeros((tile, columns), jnp.float32) for _ in stacks)
            first, *second = lax.fori_loop(0, K // depth, step, zeros)
            product = jax.nn.silu(first) * second[0] if second else first
            out[some, these] = product.astype(out.dtype)

    return pl.pallas_call(
        kernel,
        grid=(M // tile, N // columns),
        out_shape=jax.ShapeDtypeStruct((M, N), rows.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_product",
    )(owner, rows, *stacks)


def _divisor(n: int, most: int) -> int:
    """Return the largest power of two that divides n, up to `most`."""
    return min(n & -n, most)


def _forward(tile: int, interpret: bool, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    return swiglu(tile, interpret, *arrays), arrays


def _backward(tile: int, interpret: bool, saved: Any, slope: jax.Array) -> tuple[Any, ...]:
    rows, sizes, *stacks = saved
    d_rows, *d_stacks = jax.vjp(lambda rows, *stacks: ragged_swiglu(rows, sizes, *stacks), rows, *stacks)[1](slope)
    return d_rows, None, *d_stacks


swiglu.defvjp(_forward, _backward)

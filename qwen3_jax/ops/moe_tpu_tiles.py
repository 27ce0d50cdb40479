"""Tiles of routed rows and slices of experts: what the kernels of `moe_tpu` and `moe_tpu_grad` have in common."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

WEIGHTS_VMEM_BYTES = 20 * 2**20  # of one expert, double buffered


def expected_tiles(mean: float, height: int) -> float:
    """Return how many tiles an expert probably fills, if it gets `mean` rows on average and its groups are whole tiles.

    That is the sum over k of the chance of more than k·height rows, each choosing on its own: nearly normal, as wide as
    the root of the mean.
    """
    likely = 1 - math.exp(-mean)
    for k in range(1, int((mean + 6 * math.sqrt(mean)) / height) + 1):
        likely += math.erfc((k * height + 0.5 - mean) / math.sqrt(2 * mean)) / 2
    return likely


def best_height(mean: float) -> int:
    """Return the height of tiles with which the least is multiplied beside `mean` rows of an expert.

    At 256 rows on average, tiles of 128 would be 2.5 to an expert, tiles of 144 are 2.
    """
    if mean >= 512:
        return 256
    return min(range(256, 127, -16), key=lambda height: height * expected_tiles(mean, height))


def probable(M: int, tile: int, likely: tuple[float, int], *, whole: bool) -> tuple[int, float]:
    """Return how many of M rows a kernel probably multiplies, and how many experts it reads, for its cost estimate.

    Args:
        likely: how many tiles and experts are expected to hold rows.
        whole: whether it holds an expert while its tiles last; else it reads one per tile.
    """
    tiles, busy = min(M // tile, likely[0]), likely[1]
    return round(tiles * tile), min(busy, tiles) if whole else tiles


def owners(tile: int, tiles: int, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return before which tile each group ends, and whose each of the tiles is; of groups that are whole tiles."""
    ends = jnp.cumsum(sizes) // tile
    owner = jnp.sum(jnp.arange(tiles, dtype=jnp.int32)[:, None] >= ends, axis=1)
    return ends, jnp.minimum(owner, len(sizes) - 1).astype(jnp.int32)


def slice_width(stack: jax.Array) -> int:
    """Return how much of the expert width of gate_proj's stack, or up_proj's, a kernel holds at once."""
    _, F, D = stack.shape
    return widest(F, 6 * D * stack.dtype.itemsize, WEIGHTS_VMEM_BYTES)


def widest(columns: int, bytes_per_column: int, most_bytes: int) -> int:
    """Return the widest even slice of the columns, in whole 128 lanes, that fits; all of them if none does."""
    slices = [w for w in range(128, columns + 1, 128) if columns % w == 0 and w * bytes_per_column <= most_bytes]
    return max(slices, default=columns)


def in_hbm(interpret: bool, *stacks: jax.Array) -> tuple[jax.Array, ...]:
    """Keep the experts in HBM: a kernel streams them while it multiplies.

    Fetched whole into VMEM before it starts, they would drive the activations around it out to HBM.
    """
    if interpret:
        return stacks
    return tuple(pltpu.with_memory_space_constraint(w, pltpu.HBM) for w in stacks)


def product(x: jax.Array, w: jax.Array, axis: int, over: int) -> jax.Array:
    """Contract an axis of x with one of w, in the dtype of x; the sum is float32."""
    return lax.dot_general(x, w.astype(x.dtype), (((axis,), (over,)), ((), ())), preferred_element_type=jnp.float32)


def add_slice(f: jax.Array, slices: int, part: jax.Array, total: Any, out: Any) -> None:
    """Add what slice f of an expert contributes to a tile; the last slice writes the sum."""
    if slices == 1:
        out[...] = part.astype(out.dtype)
        return

    @pl.when(f == 0)
    def _() -> None:
        total[...] = part

    @pl.when(f > 0)
    def _() -> None:
        total[...] += part

    @pl.when(f == slices - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)

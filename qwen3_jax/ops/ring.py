"""Linear layers on a ring of devices that send while they multiply. Runs inside `jax.shard_map`.

In a prefill the residual stream is split along its length over the axis that also splits heads and ffn width. A
column-parallel layer (q, k, v, gate, up) needs every device's part of the stream, a row-parallel one (o, down) ends in
a sum over devices of which each keeps its part. Done as collectives these stand still in front of and behind the
products. Here both go round the ring in both directions, one neighbour at a time, and each step's transfer runs while
the matrix unit works on what is already there (the decomposition of Wang et al., ASPLOS 2023).

Axis letters: B batch, t the local part of the length, n devices on the ring.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Product = Callable[[jax.Array], jax.Array]


class Pieces(NamedTuple):
    """All devices' parts of the stream, in the order in which they reach this one; see `gather`."""

    arrays: tuple[jax.Array, ...]


def _shift(x: jax.Array, axis: str, n: int, by: int) -> jax.Array:
    """Send to the device `by` further round the ring."""
    return lax.ppermute(x, axis, [(i, (i + by) % n) for i in range(n)])


def _offsets(n: int, t: int) -> list[tuple[int, int, int]]:
    """List (whose part, first row in it, rows) of each of `gather`'s arrays, relative to the device."""
    near = [(sign * d, 0, t) for d in range(1, (n + 1) // 2) for sign in (-1, 1)]
    far = [(n // 2, 0, t // 2), (n // 2, t // 2, t - t // 2)] if n % 2 == 0 else []
    return [(0, 0, t), *near, *far]


def gather(x: jax.Array, axis: str) -> Pieces:
    """Send the own part [B, t, ...] round the ring both ways; the part across an even ring comes half from each side.

    n is at least 2 and t even.
    """
    n, half = lax.axis_size(axis), x.shape[1] // 2
    arrays, ahead, behind = [x], x, x
    for _ in range(1, (n + 1) // 2):
        ahead, behind = _shift(ahead, axis, n, 1), _shift(behind, axis, n, -1)
        arrays += [ahead, behind]
    if n % 2 == 0:
        arrays += [_shift(ahead[:, :half], axis, n, 1), _shift(behind[:, half:], axis, n, -1)]
    return Pieces(tuple(arrays))


def column(pieces: Pieces, product: Product, axis: str) -> jax.Array:
    """Apply a layer to every part as it arrives; returns all rows [B, n·t, ...] in their order."""
    n, me, t = lax.axis_size(axis), lax.axis_index(axis), pieces.arrays[0].shape[1]
    out = None
    for x, (whose, first, _) in zip(pieces.arrays, _offsets(n, t), strict=True):
        y = product(x)
        out = jnp.zeros((y.shape[0], n * t, *y.shape[2:]), y.dtype) if out is None else out
        out = lax.dynamic_update_slice_in_dim(out, y, lax.rem(me + whose + n, n) * t + first, axis=1)
    assert out is not None
    return out


def row(x: jax.Array, product: Product, axis: str) -> jax.Array:
    """Apply a layer to all rows [B, n·t, ...] of the own columns, sum over devices; returns the own part [B, t, ...].

    Each device adds its product to a sum that comes round, and passes it on. One half of every part travels each way.
    The sums are in the product's dtype.
    """
    n, me, half = lax.axis_size(axis), lax.axis_index(axis), x.shape[1] // lax.axis_size(axis) // 2

    def share(whose: jax.Array, first: int) -> jax.Array:
        start = lax.rem(whose + 2 * n, n) * 2 * half + first
        return product(lax.dynamic_slice_in_dim(x, start, half, axis=1))

    ahead, behind = share(me - 1, 0), share(me + 1, half)
    for step in range(1, n):
        ahead = _shift(ahead, axis, n, 1) + share(me - 1 - step, 0)
        behind = _shift(behind, axis, n, -1) + share(me + 1 + step, half)
    return jnp.concatenate([ahead, behind], axis=1)

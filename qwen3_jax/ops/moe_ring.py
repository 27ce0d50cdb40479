"""Routed rows on a ring of TPUs: they travel while others are multiplied. Runs inside `jax.shard_map`.

A TPU does one thing after the other, in an order that the compiler fixes; only a permute between neighbours runs beside
it. So each device's experts are two halves, and the exchange has two of everything: rows for the first halves travel;
those for the second travel while the first are multiplied; the first results travel back while the second are. In a
half's turn (`moe.Turn`) there are as many kernels as the way has hops, and a kernel hides a hop. In sight stay half of
the way there and half of the way back. The price: a row that wants both halves of a device is sent twice, with 8 of 128
experts on 16 devices a ninth more rows than without.

Axis letters: R rows, C choices per row, E experts here, D hidden, n devices on the ring.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_jax.ops import ring
from qwen3_jax.ops.moe import Turn
from qwen3_jax.ops.routes import Routing, unpack

HALVES = 2


def target(peer: jax.Array, local: jax.Array, E: int, axis: str) -> jax.Array:
    """Return where each expert is, as 2 · (how far ahead on the ring) + (which half of that device's), or -1.

    Args:
        peer: [R, C] its device's place on the ring, -1 where that is none.
        local: [R, C] its number there.
    """
    n = lax.axis_size(axis)
    ahead = lax.rem(peer - lax.axis_index(axis) + n, jnp.int32(n))
    return jnp.where(peer < 0, -1, HALVES * ahead + (local >= E // HALVES).astype(jnp.int32))


def one_exchange(
    moe: Callable[..., jax.Array],
    axis: str,
    along: str,
    room: int,
    likely: int,
    total: jax.Array,
    k: jax.Array | int,
    routing: Routing,
    arrays: tuple[jax.Array, ...],
) -> jax.Array:
    """Return the total of this device's own rows with what the k-th `room` rows for each target add.

    Only the round that always runs, k a Python 0, is made in two halves; another is one plain exchange of the same.

    Args:
        moe: as `moe.grouped`, with turns.
        axis: of the ring; n is at least 2.
        along: the axis whose devices hold the same rows, over which the results are summed and split.
        likely: how many routes of a round probably name an expert that is here.
        routing: to what `target` returns, 2n.
        arrays: rows [R, D], weights [R, C], and the experts' stacks.
    """
    x, weights, *stacks = arrays
    (R, C), D = weights.shape, x.shape[1]
    E, n = stacks[0].shape[0], routing.sent.shape[0] // HALVES
    row, routes = routing.in_round(k, room, weights, E, x.dtype)
    # A row's routes lie along the lanes: as [.., 3C] they would be padded to 128.
    routes = _there(routes.reshape(n, HALVES, room, 3 * C).swapaxes(2, 3), axis).swapaxes(2, 3)

    def routes_of(halves: slice) -> tuple[jax.Array, jax.Array]:
        return unpack(routes[:, halves].reshape(-1, 3 * C))

    if isinstance(k, int):
        there, then = coming = [ring.Exchange([x[row[HALVES * d + h]] for d in range(n)], axis, 1) for h in (0, 1)]
        there.finish()
        there.chunks, then.arrays = lax.optimization_barrier((there.chunks, then.arrays))
        back, beside = [], then
        for half, exchange in enumerate(coming):
            begin, end = (h * E // HALVES for h in (half, half + 1))
            turn = Turn(begin, end - begin, beside)
            theirs = jnp.concatenate(exchange.chunks)
            done = moe(theirs, *routes_of(slice(half, half + 1)), *stacks, expected=-(-likely // HALVES), turn=turn)
            beside = ring.Exchange(jnp.split(done, n), axis, -1)
            back.append(beside)
        beside.finish()
        done = jnp.stack([jnp.stack(exchange.chunks) for exchange in back], axis=1)
    else:
        theirs = _there(x[row].reshape(n, HALVES * room, D), axis)
        done = moe(theirs.reshape(-1, D), *routes_of(slice(HALVES)), *stacks, expected=likely)
        done = _back(done.reshape(n, HALVES * room, D), axis)
    done = done.reshape(-1, D)  # by target and place in its order

    def share(begin: jax.Array | int, rows: int) -> jax.Array:
        """Sum what has come back for some rows."""
        slots = lax.dynamic_slice_in_dim(routing.at, begin, rows, axis=1) - k * room
        here = (slots >= 0) & (slots < room)
        slots = jnp.clip(slots, 0, room - 1) + room * jnp.arange(HALVES * n, dtype=jnp.int32)[:, None]
        each = done[slots.reshape(-1)].reshape(HALVES * n, rows, D).astype(jnp.float32)
        return jnp.sum(jnp.where(here[:, :, None], each, 0), axis=0).astype(x.dtype)[None]

    if total.shape[0] % 2:
        return total + lax.psum_scatter(share(0, R)[0], along, scatter_dimension=0, tiled=True)
    return total + ring.row(share, R, along)[0]


def _there(chunks: jax.Array, axis: str) -> jax.Array:
    """Send chunk d to the device d further round the ring; returns at d what came from the one d before."""
    me = lax.axis_index(axis)
    came = lax.all_to_all(jnp.roll(chunks, me, axis=0), axis, split_axis=0, concat_axis=0, tiled=True)
    return jnp.roll(jnp.flip(came, 0), me + 1, axis=0)


def _back(chunks: jax.Array, axis: str) -> jax.Array:
    """Undo `_there`."""
    me = lax.axis_index(axis)
    chunks = jnp.roll(jnp.flip(chunks, 0), me + 1, axis=0)
    return jnp.roll(lax.all_to_all(chunks, axis, split_axis=0, concat_axis=0, tiled=True), -me, axis=0)

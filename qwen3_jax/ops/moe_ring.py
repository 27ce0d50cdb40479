"""Routed rows on a ring of TPUs: they travel while others are multiplied. Runs inside `jax.shard_map`.

A TPU does one thing after the other, in an order that the compiler fixes; only a permute between neighbours runs beside
it. So each device's experts are two halves, and the exchange has two of everything: rows for the first halves travel;
those for the second travel while the first are multiplied; the first results travel back while the second are. In a
half's turn (`moe.Turn`) there are as many kernels as the way has hops, and a kernel hides a hop. In sight stay half of
the way there and half of the way back. The price: a row that wants both halves of a device is sent twice, with 8 of 128
experts on 16 devices a ninth more rows than without.

Where the two axes are of one size there are two lanes: half of the rows is collected along the first axis and exchanged
over the second, the other half the other way round, at the same time. In a torus the axes are different wires; with one
lane either's lie idle in turn. The kernels multiply both lanes' rows together.

Axis letters: R rows, C choices per row, E experts here, D hidden, n devices on the ring.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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


class Lane(NamedTuple):
    """The way of some of the rows: over which axis they are exchanged, and which axis's devices hold the same ones."""

    axis: str
    along: str


def collect(parts: Sequence[jax.Array], lanes: Sequence[Lane]) -> list[jax.Array]:
    """Collect each lane's rows [R, ...] from all devices along its second axis."""
    if len(parts[0]) % 2:
        return [lax.all_gather(part, lane.along, tiled=True) for part, lane in zip(parts, lanes, strict=True)]
    sent = [ring.gather(part[None], lane.along) for part, lane in zip(parts, lanes, strict=True)]
    return [ring.column(pieces, lambda rows: rows, lane.along)[0] for pieces, lane in zip(sent, lanes, strict=True)]


def one_exchange(
    moe: Callable[..., jax.Array],
    lanes: Sequence[Lane],
    room: int,
    likely: int,
    total: jax.Array,
    k: jax.Array | int,
    routings: Sequence[Routing],
    arrays: tuple[Any, ...],
) -> jax.Array:
    """Return the total of this device's own rows with what the k-th `room` rows for each target add.

    Only the round that always runs, k a Python 0, is made in two halves; another is one plain exchange of the same.

    Args:
        moe: as `moe.grouped`, with turns.
        lanes: every lane has as many of the own rows, in their order. The rings have n devices, at least 2.
        likely: how many routes of a round probably name an expert that is here.
        routings: of each lane, to what `target` returns, 2n.
        arrays: each lane's rows [R, D], their weights [R, C], and the experts' stacks.
    """
    xs, weights, *stacks = arrays
    E, dtype = stacks[0].shape[0], xs[0].dtype
    chosen, routes = [], []
    for lane, routing, x, w in zip(lanes, routings, xs, weights, strict=True):
        row, packed = routing.in_round(k, room, w, E, dtype)
        chosen.append(lambda targets, x=x, row=row: x[row[targets]])
        n = len(row) // HALVES
        # A row's routes lie along the lanes: as [.., 3C] they would be padded to 128.
        packed = packed.reshape(n, HALVES, room, -1).swapaxes(2, 3)
        routes.append(_there(packed, lane.axis).swapaxes(2, 3))
    exchange = _in_halves if isinstance(k, int) else _at_once
    # By target and place in its order.
    done = exchange(moe, lanes, likely, chosen, routes, stacks)
    R, shares = len(xs[0]), []
    for routing, part in zip(routings, done, strict=True):
        shares.append(partial(_share, k * room, room, routing.at, part.reshape(-1, part.shape[-1])))
    if R // lax.axis_size(lanes[0].along) % 2:
        own = [
            lax.psum_scatter(share(0, R)[0], lane.along, scatter_dimension=0, tiled=True)
            for lane, share in zip(lanes, shares, strict=True)
        ]
    else:
        sums = ring.rows([(share, lane.along) for lane, share in zip(lanes, shares, strict=True)], R)
        own = [part[0] for part in sums]
    return total + jnp.concatenate(own)


Chosen = Callable[[Any], jax.Array]
"""The rows [.., room, D] that a lane sends to some targets, by their numbers."""


def _in_halves(
    moe: Callable[..., jax.Array],
    lanes: Sequence[Lane],
    likely: int,
    chosen: Sequence[Chosen],
    routes: Sequence[jax.Array],
    stacks: Sequence[jax.Array],
) -> list[jax.Array]:
    """Send rows for the experts' first halves, then for their second; return each lane's results [n, 2, room, D].

    Args:
        moe, lanes, likely: as in `one_exchange`.
        chosen: what each lane sends.
        routes: [n, 2, room, 3C] of what each lane receives, see `pack`.
        stacks: the experts.
    """
    n, E = len(routes[0]), len(stacks[0])
    there, then = coming = [
        ring.Together(
            ring.Exchange([rows(HALVES * d + half) for d in range(n)], lane.axis, 1)
            for lane, rows in zip(lanes, chosen, strict=True)
        )
        for half in (0, 1)
    ]
    there.finish()
    there.chunks, then.arrays = lax.optimization_barrier((there.chunks, then.arrays))
    back, beside = [], then
    for half, exchange in enumerate(coming):
        begin, end = (h * E // HALVES for h in (half, half + 1))
        turn = Turn(begin, end - begin, beside)
        theirs = _routes([part[:, half] for part in routes])
        done = moe(jnp.concatenate(exchange.chunks), *theirs, *stacks, expected=-(-likely // HALVES), turn=turn)
        beside = ring.Together(
            ring.Exchange(jnp.split(part, n), lane.axis, -1)
            for lane, part in zip(lanes, jnp.split(done, len(lanes)), strict=True)
        )
        back.append(beside)
    beside.finish()
    return [jnp.stack([jnp.stack(together.exchanges[i].chunks) for together in back], 1) for i in range(len(lanes))]


def _at_once(
    moe: Callable[..., jax.Array],
    lanes: Sequence[Lane],
    likely: int,
    chosen: Sequence[Chosen],
    routes: Sequence[jax.Array],
    stacks: Sequence[jax.Array],
) -> list[jax.Array]:
    """Do what `_in_halves` does in one plain exchange."""
    n, _, room, _ = routes[0].shape
    theirs = [
        _there(rows(slice(None)).reshape(n, HALVES * room, -1), lane.axis)
        for lane, rows in zip(lanes, chosen, strict=True)
    ]
    rows = jnp.concatenate(theirs)
    done = moe(rows.reshape(-1, rows.shape[-1]), *_routes(routes), *stacks, expected=likely)
    parts = jnp.split(done.reshape(rows.shape), len(lanes))
    return [_back(part, lane.axis).reshape(n, HALVES, room, -1) for lane, part in zip(lanes, parts, strict=True)]


def _routes(packed: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Unpack the routes of all lanes, one lane's after the other's."""
    return unpack(jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in packed]))


def _share(
    first: jax.Array | int, room: int, at: jax.Array, done: jax.Array, begin: jax.Array | int, rows: int
) -> jax.Array:
    """Sum what has come back for some rows; returns [1, rows, D].

    Args:
        first: number of the round's first slot; it has `room` for each target.
        at: [targets, R], the rows' slots, see `Routing`.
        done: [targets * room, D].
        begin: the first of the rows, of all R.
    """
    targets = at.shape[0]
    slots = lax.dynamic_slice_in_dim(at, begin, rows, axis=1) - first
    here = (slots >= 0) & (slots < room)
    slots = jnp.clip(slots, 0, room - 1) + room * jnp.arange(targets, dtype=jnp.int32)[:, None]
    each = done[slots.reshape(-1)].reshape(targets, rows, -1).astype(jnp.float32)
    return jnp.sum(jnp.where(here[:, :, None], each, 0), axis=0).astype(done.dtype)[None]


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

"""Linear layers on a ring of devices that send while they multiply. Runs inside `jax.shard_map`.

In a prefill the residual stream is split along its length over the axis that also splits heads and ffn width. A
column-parallel layer (q, k, v, gate, up) needs every device's part of the stream, a row-parallel one (o, down) ends in
a sum over devices of which each keeps its part. Done as collectives these stand still in front of and behind the
products. Here both go round the ring in both directions, one neighbour at a time, and each step's transfer runs while
the matrix unit works on what is already there (the decomposition of Wang et al., ASPLOS 2023). o_proj is sent for
longer than it is multiplied: the attention in front of it is done rows by rows between the same sends. The experts'
rows change places on a ring too, see `moe_ring`.

Axis letters: B batch, t the local part of the length, n devices on the ring.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Product = Callable[[jax.Array], jax.Array]


class Pieces(NamedTuple):
    """All devices' parts of the stream, in the order in which they reach this one; see `gather`."""

    arrays: tuple[jax.Array, ...]


class Context(NamedTuple):
    """Attention that is still to be done: o_proj asks for it some rows at a time, in the order in which it sends."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    scale: float
    blocks: bool
    """Whether the queries lie in the order of `Ops.blocks`."""


def _shift(x: jax.Array, axis: str, n: int, by: int) -> jax.Array:
    """Send to the device `by` further round the ring."""
    return lax.ppermute(x, axis, [(i, (i + by) % n) for i in range(n)])


def _offsets(n: int, t: int) -> list[tuple[int, int, int]]:
    """List (whose part, first row in it, rows) of each of `gather`'s arrays, relative to the device."""
    first, second = (0, t // 2), (t // 2, t - t // 2)
    near = []
    for d in range(1, (n + 1) // 2):
        near += [(-d, *first), (d, *second), (-d, *second), (d, *first)]
    far = [(n // 2, *first), (n // 2, *second)] if n % 2 == 0 else []
    return [(0, 0, t), *near, *far]


def gather(x: jax.Array, axis: str) -> Pieces:
    """Send the own part [B, t, ...] round the ring both ways; the part across an even ring comes half from each side.

    Parts travel in halves, first the one that goes furthest: work on what arrives begins after half the time, and the
    next device can pass the first half on while the second is under way. n is at least 2 and t even.
    """
    n, half = lax.axis_size(axis), x.shape[1] // 2
    arrays, ahead, behind = [x], (x[:, :half], x[:, half:]), (x[:, half:], x[:, :half])
    for _ in range(1, (n + 1) // 2):
        first = _shift(ahead[0], axis, n, 1), _shift(behind[0], axis, n, -1)
        # A link takes one at a time anyway. Tied to the first halves, the second do not get in front of them.
        *_, a, b = lax.optimization_barrier((*first, ahead[1], behind[1]))
        second = _shift(a, axis, n, 1), _shift(b, axis, n, -1)
        arrays += [*first, *second]
        ahead, behind = zip(first, second, strict=True)
    if n % 2 == 0:
        a, b = ahead[0], behind[0]
        if n > 2:
            *_, a, b = lax.optimization_barrier((*arrays[-2:], a, b))
        arrays += [_shift(a, axis, n, 1), _shift(b, axis, n, -1)]
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


Share = Callable[[jax.Array, int], jax.Array]
"""(first row, rows) -> [B, rows, ...]: what this device's columns make of some of all rows."""


def row(
    share_of: Share, length: int, axis: str, last: Callable[[jax.Array], jax.Array] = lambda share: share
) -> jax.Array:
    """Sum a layer's results over devices; returns the own part [B, t, ...] of the rows.

    Each device adds its share to a sum that comes round, and passes it on. One half of every part travels each way.
    The sums are in the shares' dtype.

    Args:
        share_of: what a device adds.
        length: n·t, all rows.
        last: the end of what makes a share. It is done once the sum has come: schedulers that think a short product
            hides the sending start to send right in front of it, and behind the longer work.
    """
    return rows([(share_of, axis)], length, last)[0]


def rows(
    lanes: Sequence[tuple[Share, str]], length: int, last: Callable[[jax.Array], jax.Array] = lambda share: share
) -> list[jax.Array]:
    """Do as `row` for several sums, each over an axis of its own, at the same time; the axes are of one size."""
    n = lax.axis_size(lanes[0][1])
    half = length // n // 2

    def shares(me: Sequence[jax.Array], step: int) -> list[jax.Array]:
        """Return for each lane what this device adds before a step's sending: ahead, behind."""
        both = []
        for (share_of, _), place in zip(lanes, me, strict=True):
            for whose, first in ((-1 - step, 0), (1 + step, half)):
                both.append(share_of(lax.rem(place + whose + 2 * n, n) * 2 * half + first, half))
        return both

    me = [lax.axis_index(axis) for _, axis in lanes]
    sums = [last(share) for share in shares(me, 0)]
    for step in range(1, n):
        # The next shares are worked on from here until the sums have come, neither earlier nor, fused into the
        # addition, later: that is what hides the sending.
        sums, me = lax.optimization_barrier((sums, me))
        arriving = [_shift(sums[2 * i + j], axis, n, (1, -1)[j]) for i, (_, axis) in enumerate(lanes) for j in (0, 1)]
        arrived, own = lax.optimization_barrier((arriving, shares(me, step)))
        sums = [total + last(share) for total, share in zip(arrived, own, strict=True)]
    return [jnp.concatenate(sums[2 * i : 2 * i + 2], axis=1) for i in range(len(lanes))]


class Exchange:
    """Chunks on their way: chunk d goes to the device way · d further round the ring, in n // 2 hops.

    Every chunk takes the shorter way, from neighbour to neighbour; what goes across an even ring goes half each way. A
    `hop` sets `arrays` on their way, `arrive` takes in what they brought; between the two is time for something else.
    `loads` says how many rows each hop moves. After the last, `chunks[d]` is from the device way · d back. n is at
    least 2.
    """

    def __init__(self, chunks: Sequence[jax.Array], axis: str, way: int):
        n = len(chunks)
        self.chunks = list(chunks)
        self._axis, self._way, self._made = axis, way, 0
        ahead, behind = ([chunks[d * sign % n] for d in range(1, (n + 1) // 2)] for sign in (way, -way))
        if n % 2 == 0:
            half = chunks[n // 2].shape[0] // 2
            ahead.append(chunks[n // 2][:half])
            behind.append(chunks[n // 2][half:])
        self._sizes = [[chunk.shape[0] for chunk in one_way] for one_way in (ahead, behind)]
        self.arrays = [jnp.concatenate(ahead), jnp.concatenate(behind)]
        self.loads = [sum(map(sum, (sizes[d:] for sizes in self._sizes))) for d in range(n // 2)]

    def hop(self) -> None:
        """Send what has farther to go to the next device, both ways."""
        n = len(self.chunks)
        self.arrays = [_shift(one_way, self._axis, n, by) for one_way, by in zip(self.arrays, (1, -1), strict=True)]

    def arrive(self) -> None:
        """Keep what is for this device."""
        self._made += 1
        n, d = len(self.chunks), self._made
        sizes = [sizes.pop(0) for sizes in self._sizes]
        first, second = (array[:size] for array, size in zip(self.arrays, sizes, strict=True))
        self.arrays = [array[size:] for array, size in zip(self.arrays, sizes, strict=True)]
        if 2 * d == n:
            self.chunks[d] = jnp.concatenate([first, second])
        else:
            self.chunks[d * self._way % n], self.chunks[-d * self._way % n] = first, second


class Together:
    """Exchanges over rings of one size, hop by hop at the same time: over different axes they use different links."""

    def __init__(self, exchanges: Iterable[Exchange]):
        self.exchanges = list(exchanges)
        self.loads = [sum(loads) for loads in zip(*(one.loads for one in self.exchanges), strict=True)]

    @property
    def arrays(self) -> list[jax.Array]:
        return [array for one in self.exchanges for array in one.arrays]

    @arrays.setter
    def arrays(self, arrays: list[jax.Array]) -> None:
        for i, one in enumerate(self.exchanges):
            one.arrays = list(arrays[2 * i : 2 * i + 2])

    @property
    def chunks(self) -> list[jax.Array]:
        return [chunk for one in self.exchanges for chunk in one.chunks]

    @chunks.setter
    def chunks(self, chunks: Sequence[jax.Array]) -> None:
        n = len(chunks) // len(self.exchanges)
        for i, one in enumerate(self.exchanges):
            one.chunks = list(chunks[i * n : (i + 1) * n])

    def hop(self) -> None:
        for one in self.exchanges:
            one.hop()

    def arrive(self) -> None:
        for one in self.exchanges:
            one.arrive()

    def finish(self) -> None:
        """Make all hops, with nothing between."""
        for _ in self.loads:
            self.hop()
            self.arrive()

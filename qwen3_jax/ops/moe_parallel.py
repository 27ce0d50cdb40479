"""The experts of one MoE layer on a mesh: who sends what to whom. Runs on each device inside `jax.shard_map`.

Mesh axes play four roles in a layer. *Shared* axes split both the rows and the experts; *other* axes split the experts
only, so that their devices hold the same rows; *slices* split the rows and the width of every expert, so that their
rows are collected first and what they get is summed; the remaining axes split rows only and take no part. One
signature, five algorithms, every one dropless for every routing:

    replicated         collect the shared axes' rows, run the local experts on all of them, sum over shared and other
                       axes in one reduction, keep the own rows
    gather             the same, but the sum over the shared axes is scattered: each device receives its own rows only
    all_to_all         send each row, once, to every device that holds one of its experts, and the sum of these back,
                       in blocks of a fixed size: as many exchanges as the fullest pair of devices needs. Of several
                       shared axes some may be collected first, and the rows exchanged over the rest
    ragged_all_to_all  the same, sending only what a block holds; TPU and GPU only, XLA's CPU backend has no such
                       collective
    ring               all_to_all from neighbour to neighbour, half of the rows while the other half is multiplied: for
                       TPUs, where an all-to-all stands still. Only where one shared axis is collected and one exchanged
                       over, or, of two as large as each other, each of them for half of the rows; see `moe_ring`

`choose` says which one runs. Axis letters: R rows of this device, C choices per row, E experts here, D hidden.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_jax.ops import moe_ring
from qwen3_jax.ops.moe import round_up, sum_of_rounds
from qwen3_jax.ops.routes import Routing, pack, unpack

ALGORITHMS = ("replicated", "gather", "all_to_all", "ragged_all_to_all", "ring")
FEW_ROWS = 128

LocalMoe = Callable[..., jax.Array]


class Island(NamedTuple):
    """The mesh as one MoE layer sees it."""

    sizes: tuple[tuple[str, int], ...]
    """Every mesh axis and its size."""
    rows: tuple[str, ...]
    """The axes that split the rows, major first."""
    experts: tuple[str, ...]
    """The axes that split the experts, major first."""
    slices: tuple[str, ...] = ()
    """The axes that split the width of every expert, and the rows."""

    def whole(self) -> "Island":
        """Return the mesh as it is once the rows of the slices are collected."""
        return self._replace(rows=tuple(axis for axis in self.rows if axis not in self.slices), slices=())

    @property
    def shared(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.rows if axis in self.experts)

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.experts if axis not in self.rows)

    def ways(self, axes: tuple[str, ...]) -> int:
        """Return over how many devices the axes split."""
        return math.prod(dict(self.sizes)[axis] for axis in axes)


def island(shape: Mapping[str, int], rules: Mapping[str, tuple[str, ...]]) -> Island:
    """Read the roles of a mesh's axes from the rules; rows are split by the axes of "batch" and of "length"."""
    rows = rules["batch"] + tuple(axis for axis in rules["length"] if axis not in rules["batch"])
    return Island(tuple(shape.items()), rows, rules["experts"], rules["expert_mlp"])


def choose(place: Island, *, rows: int, choices: int, platform: str) -> str:
    """Return the algorithm for a layer, from what is known when it is traced.

    A group is the devices along the shared axes; rows of slices are collected before.
      - A group of one, or one that holds at most 128 rows together (decoding): "replicated". Everything is in reach or
        small, and a single reduction costs one latency.
      - Otherwise what keeps the links busy for the shorter time, by `transfers`: "gather" or "all_to_all", the latter
        on GPU as "ragged_all_to_all", on TPU as "ring" if it is over one axis and collects one more.

    Args:
        place: the mesh.
        rows: R of one device.
        choices: C, experts per row.
        platform: "cpu", "tpu", "gpu" or "cuda".
    """
    group, rows = place.ways(place.shared), rows * place.ways(place.slices)
    if group * place.ways(place.slices) == 1 or group * rows <= FEW_ROWS:
        return "replicated"
    if group == 1:
        return "gather"
    place = place.whole()
    if transfers(place, choices, platform) >= group - 1:
        return "gather"
    if platform == "tpu":
        return "ring" if _has_ring(place, exchange_axes(place, choices, platform)) else "all_to_all"
    return "ragged_all_to_all" if platform in ("gpu", "cuda") else "all_to_all"


def _has_ring(place: Island, over: tuple[str, ...]) -> bool:
    """Say whether the exchange is over one axis, and the rows of one more are collected."""
    return len(over) == 1 < place.ways(over) and sum(place.ways((axis,)) > 1 for axis in place.shared) == 2


def exchange_axes(place: Island, choices: int, platform: str) -> tuple[str, ...]:
    """Return the shared axes over which an exchange goes; the rows of the others are collected first."""
    axes = [axis for axis in place.shared if place.ways((axis,)) > 1]
    sets = [over for n in range(len(axes), 0, -1) for over in itertools.combinations(axes, n)]
    return min(sets, key=lambda over: _transfers(place, over, choices, platform), default=place.shared)


def transfers(place: Island, choices: int, platform: str) -> float:
    """Return what the cheapest exchange of rows costs in one direction, in rows sent over a link per row of a device.

    Collecting all rows of the shared axes instead costs their number of devices minus one.
    """
    return _transfers(place, exchange_axes(place, choices, platform), choices, platform)


def _transfers(place: Island, over: tuple[str, ...], choices: int, platform: str) -> float:
    """Return what one direction costs, in rows sent over a link per row of a device, for an exchange over some axes.

    Collecting the rows of `collected` devices moves collected - 1; then an exchange moves `needed` of group * collected
    rows, over group / 4 links on average in a ring of a TPU, over one through a GPU's switch.
    """
    group, collected = place.ways(over), place.ways(tuple(axis for axis in place.shared if axis not in over))
    hops = max(1.0, group / 4) if platform == "tpu" else 1.0
    return collected - 1 + hops * group * collected * needed(place, choices)


def run(
    algorithm: str,
    moe: LocalMoe,
    place: Island,
    platform: str,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
    *,
    room: int | None = None,
) -> jax.Array:
    """Apply a layer's experts, wherever they are, to this device's rows.

    Args:
        algorithm: one of `ALGORITHMS`.
        moe: the single-device formulation, see `Ops.moe`.
        place: the mesh.
        platform: as in `choose`.
        x, weights, experts: this device's rows [R, D], [R, C], [R, C] int32 ids over the whole layer; an id beyond the
            layer's experts means none.
        gate_proj, up_proj, down_proj: this device's experts.
        room: rows that one device sends to another in one exchange; by default what a fair router needs (its mean
            and three standard deviations).

    Returns:
        [R, D], complete on every device.

    Raises:
        ValueError: the algorithm is none of them, or the mesh has no ring.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"MoE algorithm {algorithm!r} is unknown: use {', '.join(ALGORITHMS)}")
    stacks = (gate_proj, up_proj, down_proj)
    if algorithm in ("replicated", "gather"):
        return _collected(algorithm, moe, place, x, weights, experts, *stacks)
    if place.ways(place.slices) > 1:
        E = place.ways(place.experts) * stacks[0].shape[0]
        rows = _gather(place.slices, x, weights, jnp.minimum(experts, E))
        out = run(algorithm, moe, place.whole(), platform, *rows, *stacks, room=room)
        return lax.psum_scatter(out, place.slices, scatter_dimension=0, tiled=True)
    over = exchange_axes(place, experts.shape[1], platform)
    if algorithm == "ring" and not _has_ring(place, over):
        sizes = ",".join(f"{axis}={size}" for axis, size in place.sizes)
        split = [axis for axis in place.shared if place.ways((axis,)) > 1]
        collected, exchanged = (" and ".join(a for a in split if (a in over) == there) or "none" for there in (0, 1))
        raise ValueError(
            f"MoE algorithm 'ring' collects rows over one mesh axis and exchanges them over one more: {sizes} would "
            f"collect over {collected} and exchange over {exchanged}; use all_to_all, or None to let the mesh decide"
        )
    if algorithm == "ring":
        return _on_rings(moe, place, over, room, x, weights, experts, *stacks)
    return _exchanged(algorithm, moe, place, over, room, x, weights, experts, *stacks)


def _collected(
    algorithm: str,
    moe: LocalMoe,
    place: Island,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    *stacks: jax.Array,
) -> jax.Array:
    R, C = experts.shape
    E = stacks[0].shape[0]
    together = place.slices + place.shared
    group = place.ways(together)
    ways = place.ways(place.experts)
    if group > 1:
        x, weights, experts = _gather(together, x, weights, jnp.minimum(experts, ways * E))
    mine = experts - lax.axis_index(place.experts) * E
    mine = jnp.where((mine >= 0) & (mine < E), mine, E)
    out = moe(x, weights, mine, *stacks, expected=None if ways == 1 else -(-group * R * C // ways))
    if algorithm == "gather" and group > 1:
        out = lax.psum_scatter(out, together, scatter_dimension=0, tiled=True)
        return lax.psum(out, place.others)
    out = lax.psum(out, together + place.others)
    return lax.dynamic_slice_in_dim(out, lax.axis_index(together) * R, R) if group > 1 else out


def _gather(
    axes: tuple[str, ...], x: jax.Array, weights: jax.Array, experts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Collect all rows and their routes in one transfer."""
    packed = jnp.concatenate([x, pack(weights, experts, x.dtype)], axis=1)
    packed = lax.all_gather(packed, axes, axis=0, tiled=True)
    return packed[:, : x.shape[1]], *unpack(packed[:, x.shape[1] :])


def _exchanged(
    algorithm: str,
    moe: LocalMoe,
    place: Island,
    over: tuple[str, ...],
    room: int | None,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    *stacks: jax.Array,
) -> jax.Array:
    """Exchange rows over some axes; each of the other axes' devices takes the routes of its own experts."""
    E = stacks[0].shape[0]
    collected, others = tuple(axis for axis in place.shared if axis not in over), place.others
    if place.ways(collected) > 1:
        x, weights, experts = _gather(collected, x, weights, jnp.minimum(experts, place.ways(place.experts) * E))
    own = jax.ShapeDtypeStruct((x.shape[0] // place.ways(collected), x.shape[1]), x.dtype)
    # From here on the collected axes are like the other ones: their devices hold the same rows.
    place = place._replace(rows=tuple(axis for axis in place.rows if axis not in collected))
    R, C = experts.shape
    group = place.ways(place.shared)
    routing = Routing.of(_peer(place, experts, E), lax.rem(experts, jnp.int32(E)), group)
    room = min(R, _room(R * needed(place, C), 8) if room is None else room)
    likely = -(-group * R * C // place.ways(place.experts))
    step = partial(_one_exchange, algorithm, moe, place, collected, room, likely)
    out = _all_rounds(place, step, room, R, (routing,), (x, weights, *stacks), own)
    return lax.psum(out, others)


def _on_rings(
    moe: LocalMoe,
    place: Island,
    over: tuple[str, ...],
    room: int | None,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    *stacks: jax.Array,
) -> jax.Array:
    """Exchange rows over one axis of two, neighbour to neighbour, or half of them over each; see `moe_ring`."""
    (R, C), E = experts.shape, stacks[0].shape[0]
    (axis,), (along,) = over, (axis for axis in place.shared if axis not in over and place.ways((axis,)) > 1)
    lanes = [moe_ring.Lane(axis, along)]
    if place.ways((axis,)) == place.ways((along,)) and R % 4 == 0:
        lanes.append(moe_ring.Lane(along, axis))
    packed = jnp.concatenate([x, pack(weights, jnp.minimum(experts, place.ways(place.experts) * E), x.dtype)], axis=1)
    parts = jnp.split(packed, len(lanes))
    n, R_lane = place.ways((axis,)), place.ways((along,)) * len(parts[0])
    xs, all_weights, routings = [], [], []
    for lane, rows in zip(lanes, moe_ring.collect(parts, lanes), strict=True):
        weights, experts = unpack(rows[:, x.shape[1] :])
        # The collected axis is like the other ones: its devices hold the same rows.
        peer = _peer(place._replace(rows=tuple(a for a in place.rows if a != lane.along)), experts, E)
        local = lax.rem(experts, jnp.int32(E))
        routings.append(Routing.of(moe_ring.target(peer, local, E, lane.axis), local, n * moe_ring.HALVES))
        xs.append(rows[:, : x.shape[1]])
        all_weights.append(weights)
    if room is None:
        room = _room(R_lane * needed(place, C, moe_ring.HALVES), 8 * moe_ring.HALVES)
    room = min(R_lane, room)
    likely = -(-len(lanes) * n * R_lane * C // place.ways(place.experts))
    step = partial(moe_ring.one_exchange, moe, lanes, room, likely)
    out = _all_rounds(place, step, room, R_lane, tuple(routings), (tuple(xs), tuple(all_weights), *stacks), x)
    return lax.psum(out, place.others)


def _room(mean: float, multiple: int) -> int:
    """Return the room that a fair router needs for rows of which it sends `mean` on average."""
    return round_up(math.ceil(mean + 3 * math.sqrt(mean)), multiple)


def _all_rounds(
    place: Island,
    step: Callable[..., jax.Array],
    room: int,
    R: int,
    routings: tuple[Routing, ...],
    arrays: Any,
    like: jax.Array | jax.ShapeDtypeStruct,
) -> jax.Array:
    """Make as many exchanges as the fullest pair of devices needs, of R rows `room` at a time."""
    if room >= R:
        return step(jnp.zeros(like.shape, like.dtype), jnp.int32(0), routings, arrays)
    # All devices must take part in every exchange, so all run as many. They agree on that before they begin: while rows
    # travel, a small reduction would wait for all of them.
    fullest = jnp.max(jnp.stack([jnp.max(routing.sent) for routing in routings]))
    fullest, routings = lax.optimization_barrier((lax.pmax(fullest, tuple(dict(place.sizes))), routings))
    return sum_of_rounds(step, lax.div(fullest + (room - 1), jnp.int32(room)), routings, arrays, like=like)


def needed(place: Island, choices: int, parts: int = 1) -> float:
    """Return the fraction of all rows that one of equal parts of a device's experts is expected to see.

    That is if every expert is as likely.
    """
    return 1 - (1 - 1 / (place.ways(place.experts) * parts)) ** choices


def _peer(place: Island, experts: jax.Array, E: int) -> jax.Array:
    """Return where along the shared axes each expert is, or -1 where it is in no device of this column of them."""
    device = lax.div(experts, jnp.int32(E))
    here = device < place.ways(place.experts)
    sizes = dict(place.sizes)
    at = {}
    for axis in reversed(place.experts):
        at[axis] = lax.rem(device, jnp.int32(sizes[axis]))
        device = lax.div(device, jnp.int32(sizes[axis]))
    for axis in place.others:
        here = here & (at[axis] == lax.axis_index(axis))
    peer = jnp.zeros_like(experts)
    for axis in place.shared:
        peer = peer * sizes[axis] + at[axis]
    return jnp.where(here, peer, -1)


def _one_exchange(
    algorithm: str,
    moe: LocalMoe,
    place: Island,
    collected: tuple[str, ...],
    room: int,
    likely: int,
    total: jax.Array,
    k: jax.Array | int,
    routings: tuple[Routing, ...],
    arrays: tuple[jax.Array, ...],
) -> jax.Array:
    """Return the total of this device's own rows with what the k-th `room` rows for each peer add.

    Args:
        collected: the axes whose rows are in `arrays`, and over which what they get is summed and split again.
        routings: one, to the peers.
    """
    (routing,) = routings
    x, weights, *stacks = arrays
    C, group = weights.shape[1], routing.sent.shape[0]
    outgoing = jnp.clip(routing.sent - k * room, 0, room)
    incoming = lax.all_to_all(outgoing, place.shared, split_axis=0, concat_axis=0, tiled=True)
    row, routes = routing.in_round(k, room, weights, stacks[0].shape[0], x.dtype)
    # A row's routes lie along the lanes: as [.., 3C] they would be padded to 128.
    routes = routes.reshape(group, room, 3 * C).swapaxes(1, 2)
    routes = lax.all_to_all(routes, place.shared, split_axis=0, concat_axis=0, tiled=True)
    their_weights, their_experts = unpack(routes.swapaxes(1, 2).reshape(group * room, 3 * C))
    swap = partial(_swap, algorithm, place.shared, room)
    theirs = swap(x[row.reshape(-1)], outgoing, incoming)
    done = swap(moe(theirs, their_weights, their_experts, *stacks, expected=likely), incoming, outgoing)
    out = jnp.zeros(x.shape, jnp.float32)
    for back, slots in zip(jnp.split(done, group), routing.at - k * room, strict=True):
        here = (slots >= 0) & (slots < room)
        out += jnp.where(here[:, None], back[jnp.clip(slots, 0, room - 1)].astype(jnp.float32), 0)
    out = out.astype(x.dtype)
    if place.ways(collected) > 1:
        out = lax.psum_scatter(out, collected, scatter_dimension=0, tiled=True)
    return total + out


def _swap(
    algorithm: str, axes: tuple[str, ...], room: int, rows: jax.Array, outgoing: jax.Array, incoming: jax.Array
) -> jax.Array:
    """Give each peer its `room` rows and return theirs, in the order of the peers.

    Args:
        rows: [group * room, D], the rows for peer p from p * room on.
        outgoing: [group] how many of them are real.
        incoming: [group] how many real ones each peer has for this device.
    """
    if algorithm == "all_to_all":
        return lax.all_to_all(rows, axes, split_axis=0, concat_axis=0, tiled=True)
    starts = jnp.arange(outgoing.shape[0], dtype=jnp.int32) * room
    there = jnp.full_like(starts, lax.axis_index(axes) * room)
    return lax.ragged_all_to_all(
        rows, jnp.zeros_like(rows), starts, outgoing, there, incoming, axis_name=axes[0] if len(axes) == 1 else axes
    )

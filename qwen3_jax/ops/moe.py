"""The experts of one MoE layer on one device: one signature (`Ops.moe`), several algorithms, one obvious oracle.

    dense      every expert for every row, masked by definition: the oracle
    every      the same work arranged for few rows: each expert's weights are read once, in the layout they have
    grouped    rows sorted by expert; `swiglu` multiplies each group by its own expert; for many rows

All are dropless: what a router does changes the time, never the result. An expert id of E or more means none, which is
how a device that holds some of the experts sees a row that belongs elsewhere.

Axis letters: R rows, C choices per row, E experts here, D hidden, F expert width, M routed rows that are multiplied.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

Swiglu = Callable[..., jax.Array]
"""(rows [M,D], sizes [E] int32, gate_proj [E,F,D], up_proj [E,F,D], down_proj [E,D,F]) -> [M,D] in the rows' dtype:
expert e's SwiGLU on the e-th group of consecutive rows. Rows beyond the last group come back undefined. Only where
turns are taken it is also called with only=(begin, end): other experts' rows may come back undefined too."""


class Turn(NamedTuple):
    """Of all experts, which it is the turn of, and a transfer that goes on while they are multiplied."""

    first: int
    experts: int
    """It is the turn of experts first .. first + experts - 1; a route that names another adds nothing."""
    beside: "Transfer"


class Transfer(Protocol):
    """Rows on their way to other devices, see `ring.Together`."""

    loads: list[int]
    """What each hop moves, in rows."""

    @property
    def arrays(self) -> list[jax.Array]: ...
    @arrays.setter
    def arrays(self, arrays: list[jax.Array]) -> None: ...

    def hop(self) -> None: ...
    def arrive(self) -> None: ...


def dense(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
    *,
    expected: int | None = None,
) -> jax.Array:
    """Compute every expert for every row and mask: the definition; see `Ops.moe`."""
    E = gate_proj.shape[0]
    share = jnp.sum(jax.nn.one_hot(experts, E, dtype=jnp.float32) * weights[..., None].astype(jnp.float32), axis=1)
    gate, up = _linear("RD,EFD->REF", x, gate_proj), _linear("RD,EFD->REF", x, up_proj)
    hidden = jax.nn.silu(gate.astype(x.dtype)) * up.astype(x.dtype)
    return jnp.einsum("RED,RE->RD", _linear("REF,EDF->RED", hidden, down_proj), share).astype(x.dtype)


def every(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
    *,
    expected: int | None = None,
) -> jax.Array:
    """Run all rows through all experts in three products, the weights folded in before the last; see `Ops.moe`.

    Reading an expert's weights takes longer than multiplying a hundred rows by them, so with few rows the masked work
    is free, and there is nothing to sort, gather or scatter.
    """
    E = gate_proj.shape[0]
    share = jnp.sum(jax.nn.one_hot(experts, E, dtype=jnp.float32) * weights[..., None].astype(jnp.float32), axis=1)
    hidden = jax.nn.silu(_linear("RD,EFD->ERF", x, gate_proj)) * _linear("RD,EFD->ERF", x, up_proj)
    hidden = (hidden * share.T[:, :, None]).astype(x.dtype)
    return _linear("ERF,EDF->RD", hidden, down_proj).astype(x.dtype)


def _linear(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def grouped(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
    *,
    expected: int | None = None,
    turn: Turn | None = None,
    swiglu: Swiglu | None = None,
    align: int = 1,
) -> jax.Array:
    """Sort the routed rows by expert and run each group through its expert; see `Ops.moe`.

    Args:
        expected: how many of the R*C routes probably name an expert that is here; sizes the buffers. Where more do, the
            same code runs again on the rest, as often as it takes; None takes room for all.
        turn: run these experts only, in as many kernels as the transfer beside has hops: each hop starts before one,
            with a share of the experts as large as its own of the rows, and is waited for when that ends. Not
            differentiable.
        swiglu: multiplies the groups, `ragged_swiglu` by default.
        align: every group starts at a multiple of this, which `swiglu` may rely on; what pads a group is ignored.
    """
    R, C = experts.shape
    E = gate_proj.shape[0]
    swiglu = ragged_swiglu if swiglu is None else swiglu
    first, count = (0, E) if turn is None else turn[:2]
    flat = jnp.where((experts >= first) & (experts < first + count), experts, E).reshape(-1)
    order = jnp.argsort(flat, stable=False)
    sizes = jnp.sum(flat[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    before = jnp.cumsum(sizes) - sizes
    ends = jnp.cumsum(lax.div(sizes + (align - 1), jnp.int32(align)) * align)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    # An aligned slot holds route order[slot - shift] of its expert, if that is one of the expert's.
    routing = (order, starts, ends, starts - before, starts + sizes)
    arrays = (x, weights, gate_proj, up_proj, down_proj)
    most = round_up(R * C + min(count, R * C) * (align - 1), align)
    block = most if expected is None else round_up(expected * 5 // 4 + count * align // 2, align)
    wide = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    rounds = lax.div(ends[-1] + (block - 1), jnp.int32(block))
    out: jax.Array
    if 2 * block > most:
        out = _one_block(swiglu, most, C, turn, jnp.zeros(x.shape, jnp.float32), 0, routing, arrays)
    elif turn is None:
        out = sum_of_rounds(partial(_one_block, swiglu, block, C, None), rounds, routing, arrays, like=wide)
    else:
        out = _one_block(swiglu, block, C, turn, jnp.zeros(x.shape, jnp.float32), 0, routing, arrays)
        out = rounds_after(1, partial(_one_block, swiglu, block, C, None), rounds, routing, arrays, out)
    return out.astype(x.dtype)


def _one_block(
    swiglu: Swiglu,
    block: int,
    C: int,
    turn: Turn | None,
    total: jax.Array,
    k: jax.Array | int,
    routing: tuple[jax.Array, ...],
    arrays: tuple[jax.Array, ...],
) -> jax.Array:
    """Return the total [R, D], in float32, with what the k-th block of slots adds to it."""
    order, starts, ends, shift, filled = routing
    x, weights, gate_proj, up_proj, down_proj = arrays
    slot = k * block + jnp.arange(block, dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(slot[:, None] >= ends, axis=1), ends.shape[0] - 1)
    real = slot < filled[expert]
    route = order[jnp.clip(slot - shift[expert], 0, order.shape[0] - 1)]
    token = lax.div(route, jnp.int32(C))
    here = jnp.clip(ends - k * block, 0, block) - jnp.clip(starts - k * block, 0, block)
    rows = _only_real(x[token], real)
    if turn is None:
        each = swiglu(rows, here, gate_proj, up_proj, down_proj)
    else:
        each = _beside(partial(swiglu, rows, here, gate_proj, up_proj, down_proj), turn, expert)
    # Undefined rows and padding must not reach the sum, not even as NaN times zero.
    each = jnp.where(real[:, None], each.astype(jnp.float32), 0)
    each = each * weights.reshape(-1)[route, None].astype(jnp.float32)
    return total.at[token].add(each)


def _beside(swiglu: Swiglu, turn: Turn, expert: jax.Array) -> jax.Array:
    """Run a kernel for some experts beside each hop of a transfer; `expert` says whose a row is."""
    each, loads = None, turn.beside.loads
    ends = [turn.first + round(turn.experts * sum(loads[:i]) / sum(loads)) for i in range(len(loads) + 1)]
    for begin, end in itertools.pairwise(ends):
        turn.beside.hop()
        part = swiglu(only=(begin, end))
        part, turn.beside.arrays = lax.optimization_barrier((part, turn.beside.arrays))
        turn.beside.arrive()
        each = part if each is None else jnp.where((expert >= begin)[:, None], part, each)
    assert each is not None
    return each


@jax.custom_vjp
def _only_real(rows: jax.Array, real: jax.Array) -> jax.Array:
    """Return the rows; their gradient where they are not real is undefined too, and stops here."""
    del real
    return rows


_only_real.defvjp(
    lambda rows, real: (rows, real), lambda real, slope: (jnp.where(real[:, None], slope, 0).astype(slope.dtype), None)
)


def ragged_swiglu(
    rows: jax.Array,
    sizes: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
    only: tuple[int, int] | None = None,
) -> jax.Array:
    """Multiply the groups with `lax.ragged_dot_general`, which runs and differentiates everywhere; see `Swiglu`."""
    del only
    gate, up = _ragged_linear(rows, gate_proj, sizes), _ragged_linear(rows, up_proj, sizes)
    return _ragged_linear(jax.nn.silu(gate) * up, down_proj, sizes)


def _ragged_linear(rows: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    contract_in = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    out = lax.ragged_dot_general(rows, w.astype(rows.dtype), sizes, contract_in, preferred_element_type=jnp.float32)
    return out.astype(rows.dtype)


Step = Callable[[jax.Array, jax.Array | int, Any, Any], jax.Array]
"""(total, k, routing, arrays) -> total + what round k adds; `routing` holds integers, `arrays` is differentiable. Where
k is a Python 0 it is the round that always runs."""


def sum_of_rounds(
    step: Step, rounds: jax.Array, routing: Any, arrays: Any, *, like: jax.Array | jax.ShapeDtypeStruct
) -> jax.Array:
    """Return the sum over `rounds` rounds, whose number only the device knows, of the shape and dtype of `like`.

    Buffers are cut so that a fair router needs one round. That one always runs, in front of the loop over the others:
    nothing is scheduled across a loop's border, and what a loop carries lies in HBM. The gradient is the same sum, each
    round recomputed, so that nothing grows with the number of rounds.
    """
    return rounds_after(0, step, rounds, routing, arrays, jnp.zeros(like.shape, like.dtype))


UNLIKELY = "rounds_after_the_first"
"""The name scope of a loop that is expected not to run; `plan` does not bill it."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def rounds_after(begin: int, step: Step, rounds: jax.Array, routing: Any, arrays: Any, total: jax.Array) -> jax.Array:
    """Return a total to which rounds from `begin` on, 0 or 1, are added; see `sum_of_rounds`."""
    if begin == 0:
        total = step(total, 0, routing, arrays)
    with jax.named_scope(UNLIKELY):
        return _repeat(lambda k, total: step(total, k, routing, arrays), 1, rounds, total)


def _forward(
    begin: int, step: Step, rounds: jax.Array, routing: Any, arrays: Any, total: jax.Array
) -> tuple[jax.Array, Any]:
    return rounds_after(begin, step, rounds, routing, arrays, total), (rounds, routing, arrays)


def _backward(begin: int, step: Step, saved: Any, slope: jax.Array) -> tuple[None, None, Any, jax.Array]:
    rounds, routing, arrays = saved
    zeros = jnp.zeros_like(slope)

    def slopes(k: jax.Array) -> Any:
        return jax.vjp(lambda arrays: step(zeros, k, routing, arrays), arrays)[1](slope)[0]

    # A Python 0 is never passed: the round that it names may take turns, which have no gradient.
    first = slopes(jnp.int32(0)) if begin == 0 else jax.tree.map(jnp.zeros_like, arrays)
    with jax.named_scope(UNLIKELY):
        rest = _repeat(lambda k, total: jax.tree.map(jnp.add, total, slopes(k)), 1, rounds, first)
    return None, None, rest, slope


rounds_after.defvjp(_forward, _backward)


def _repeat(body: Callable[[jax.Array, Any], Any], begin: int, end: jax.Array, total: Any) -> Any:
    def more(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return carry[0] + 1, body(*carry)

    return lax.while_loop(lambda carry: carry[0] < end, more, (jnp.int32(begin), total))[1]


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple that is not below n."""
    return -(-n // multiple) * multiple

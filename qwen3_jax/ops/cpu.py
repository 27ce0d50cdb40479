"""The operations in the shapes that XLA's CPU backend runs fast.

Same arithmetic as `plain.ORACLE`; what differs is which library kernel each product reaches and what is copied on the
way. The facts behind it, seen in compiled HLO and timed on two cores (jaxlib 0.10.2):

- A bfloat16 × bfloat16 → float32 product of two or more rows runs in the library's kernel (YNNPACK). One row does not:
  it is widened to float32 first, weights included, at a tenth of the speed. So one row is multiplied and summed, which
  the library fuses with the widening (10–14 GB of weights a second, where one row padded to two reaches 8–14); or, with
  a large matrix on AMD's processors, a piece of it at a time is widened by a shift of its bits and multiplied from the
  processor's caches. What is faster there, 16–19 GB a second, takes twice as long as the sum where the last level of
  cache is far from the cores: 5–8 on a Xeon of the fifth generation.
- The library packs the right operand of a product on every call. With 2–64 rows that has to be the rows and not the
  weights: 1.2–1.7 times as fast in float32; in bfloat16 1.05–1.2 times from 16 rows on, and slower with fewer.
- Everything else in bfloat16 (slicing, updating, gathering) is widened to float32 around the operation, for the whole
  operand, and the widened copy of a loop-invariant operand is hoisted out of the loop: a second model in memory. Where
  a loop slices a weight, the weight is tied to the loop's state by an `optimization_barrier`, and its bits are sliced
  as uint16.
- A KV cache in bfloat16 would be rewritten whole by every one-slot update, for that reason; of its bits as uint16 the
  update is in place. With slots as the minor axis of keys and values, no step of decoding repacks the cache.
- `lax.ragged_dot` is 20–40 times slower here than a loop over tiles of rows that share an expert.

Axis letters: B batch, T query length, S cache slots, N query heads, K kv heads, G = N/K, H head_dim, D hidden,
E experts, C experts per token, F expert width, R routed tokens, M rows of a tile.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from qwen3_jax import ops
from qwen3_jax.ops import LayerCache, Ops, bits, plain

_QUERY_BLOCK = 256
_QUERY_GROUPS = 8
_SCORES = 2**19  # numbers: scores of one head's block of queries
_SLOT_BLOCK = 512
_WIDENED = 2**20  # numbers that decoding widens to float32 at a time: of keys, of values, of a large matrix
_FEW_ROWS = 64  # up to which a product is taken as weights times rows
_TOP_BLOCK = 64
_MASKED = -1e30  # finite, so that a row without any allowed key gives numbers, not NaN


def einsum(
    spec: str, x: jax.Array, w: jax.Array, out_dtype: jnp.dtype | None = None, *, turn: bool = True
) -> jax.Array:
    """Apply a linear layer as one product of matrices [rows, in] and [out, in]; see `Ops.einsum` and `_product`."""
    inputs, result = spec.split("->")
    x_axes, w_axes = inputs.split(",")
    contracted = sum(axis not in result for axis in w_axes)
    kept, out_axes = len(x_axes) - contracted, len(w_axes) - contracted
    if result != x_axes[:kept] + w_axes[:out_axes] or x_axes[kept:] != w_axes[out_axes:]:
        raise ValueError(f"einsum {spec!r} is not a linear layer: the trailing axes of both inputs must be contracted")
    fan_in = math.prod(w.shape[out_axes:])
    y = _linear(x.reshape(-1, fan_in), w.reshape(-1, fan_in), turn)
    return y.astype(x.dtype if out_dtype is None else out_dtype).reshape(x.shape[:kept] + w.shape[:out_axes])


def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Look tokens up in table [V, D], tied to the tokens: a widened table must not be hoisted out of a decode loop."""
    table, tokens = lax.optimization_barrier((table, tokens))
    return table[tokens]


def top(x: jax.Array, k: int, count: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Find the k largest of x [B, V] in the k blocks with the largest maxima; see `Ops.top`.

    XLA's kernel goes through a row on one core, and selects where this takes a maximum (V 151936, k 20, 64 rows: 22
    against 4 ms). Blocks stay in order, so that of equal numbers the first is still found first: whatever comes before
    one of the k largest fills fewer than k blocks.
    """
    B, V = x.shape
    count = V if count is None else min(count, V)
    blocks, rest = divmod(count, _TOP_BLOCK)
    if blocks <= 2 * k:
        return ops.top(x, k, count)
    whole = x[:, : V - V % _TOP_BLOCK].reshape(B, -1, _TOP_BLOCK)
    # Maxima of all blocks, since masking or cutting the numbers themselves takes as long again as their maxima.
    highest = lax.optimization_barrier(jnp.max(whole, axis=2))[:, :blocks]
    chosen = jnp.sort(ops.top(highest, k)[1], axis=1)
    some = jnp.take_along_axis(whole, chosen[:, :, None], axis=1, mode="promise_in_bounds").reshape(B, -1)
    ids = (chosen[:, :, None] * _TOP_BLOCK + jnp.arange(_TOP_BLOCK, dtype=jnp.int32)).reshape(B, -1)
    if rest:
        some = jnp.concatenate([some, x[:, count - rest : count]], axis=1)
        last = jnp.broadcast_to(jnp.arange(count - rest, count, dtype=jnp.int32), (B, rest))
        ids = jnp.concatenate([ids, last], axis=1)
    values, at = ops.top(lax.optimization_barrier(some), k)
    return values, jnp.take_along_axis(ids, at, axis=1, mode="promise_in_bounds")


def _linear(x: jax.Array, w: jax.Array, turn: bool = True) -> jax.Array:
    """Multiply x [R, in] by w [out, in] into float32 [R, out]; x's dtype is the products', w is cast to it."""
    if x.shape[0] == 1 and w.dtype == jnp.bfloat16 and (some := _rows_at_once(*w.shape)) is not None:
        return _vector_linear(some, x, w)
    if x.shape[0] == 1 and jnp.bfloat16 in (x.dtype, w.dtype):
        wide, w = lax.optimization_barrier((x.astype(jnp.float32), w))
        return jnp.sum(w.astype(x.dtype).astype(jnp.float32) * wide, axis=1)[None]
    return _product(x, w, turn)


def _product(x: jax.Array, w: jax.Array, turn: bool = True) -> jax.Array:
    """Multiply x [R, in] by w [out, in] into float32 [R, out] as a product of matrices; to turn puts few rows right.

    The result is laid out as if it had not been turned. Left to itself the compiler carries the turned layout as far as
    it pleases, and sums what follows, a norm for instance, in another order in each program. A layout cannot be held so
    where the compiler partitions an array: it would gather the array first.
    """
    if w.dtype != x.dtype:
        x, w = lax.optimization_barrier((x, w))
        w = w.astype(x.dtype)
    least = 16 if x.dtype == jnp.bfloat16 else 2  # one row is a matrix-vector product either way
    if turn and least <= x.shape[0] <= _FEW_ROWS:
        turned = lax.dot_general(w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        turned = lax.optimization_barrier(turned)  # without which the product would be turned back
        return with_layout_constraint(turned.T, Layout((0, 1)))
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _rows_at_once(rows: int, width: int) -> int | None:
    """Return in pieces of how many rows a large matrix is widened; None if it is small or has no even pieces so large.

    Less than `_WIDENED` numbers are not spread over the cores, and many times as many are not held by their caches.
    """
    if not _caches_are_near():
        return None
    pieces = [n for n in range(1, rows // 2 + 1) if rows % n == 0 and _WIDENED <= n * width <= 4 * _WIDENED]
    return min(pieces, default=None)


@lru_cache
def _caches_are_near() -> bool:
    """Return whether the last level of cache is written about as fast as read: AMD's, one for a few cores."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vector_linear(some: int, x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply x [1, in] by a large w [out, in] of bfloat16, `some` rows at a time.

    That reads 16–19 GB of weights a second where multiplying and summing, in the same run, reads 12–16.
    """
    rows, x = w.shape[0], x.astype(jnp.float32)[0]

    def product(i: jax.Array, out: jax.Array) -> jax.Array:
        tied, i = lax.optimization_barrier((w, i))
        piece = lax.dynamic_slice_in_dim(bits.of(tied), i * some, some)
        wide = lax.optimization_barrier(bits.numbers(piece, x.dtype))
        part = lax.dot_general(wide, x, (((1,), (0,)), ((), ())))
        return lax.dynamic_update_slice_in_dim(out, part[None], i * some, axis=1)

    return lax.fori_loop(0, rows // some, product, jnp.zeros((1, rows), jnp.float32))


# Bits have no gradient.
_vector_linear.defvjp(
    lambda some, x, w: (_vector_linear(some, x, w), (x, w)), lambda _, saved, ct: jax.vjp(_product, *saved)[1](ct)
)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    start: jax.Array | None = None,
    *,
    span: int | None = None,
) -> jax.Array:
    """Attend causally within segments, block of queries by block, skipping the keys above the diagonal.

    Large heads go one after the other, so that scores stay in the processor's caches; small ones together.
    """
    if start is not None:  # a part of the queries, on a mesh that splits the length
        return plain.attend(q, k, v, segment_ids, scale, start)
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    head = partial(_attend_head, scale=scale)
    if G * T * min(T, _QUERY_BLOCK) < _SCORES:
        queries = q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B * K, T, G, H)
        keys, values = (a.transpose(0, 2, 1, 3).reshape(B * K, T, H) for a in (k, v))
        segments = None if segment_ids is None else jnp.repeat(segment_ids, K, axis=0)
        out = jax.vmap(head)(queries, keys, values, segments)
    else:

        def one(i: jax.Array) -> jax.Array:
            row, at = i // K, i % K
            mine = lax.dynamic_slice(q, (row, 0, at * G, 0), (1, T, G, H))[0]
            keys, values = (lax.dynamic_slice(a, (row, 0, at, 0), (1, T, 1, H)).reshape(T, H) for a in (k, v))
            return head(mine, keys, values, None if segment_ids is None else segment_ids[row])

        out = lax.map(one, jnp.arange(B * K))
    return out.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _attend_head(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, scale: float) -> jax.Array:
    """Attend with the query heads q [T, G, H] of one key head k, v [T, H]; segments [T].

    The queries fall into at most `_QUERY_GROUPS` groups, each of which reads a static prefix of the keys; a group
    longer than `_QUERY_BLOCK` is mapped over in blocks, so that scores take [block, G, T] and never [T, G, T].
    """
    T, G, H = q.shape
    group = _QUERY_BLOCK * math.ceil(T / (_QUERY_BLOCK * _QUERY_GROUPS))
    padding = -T % group if group > _QUERY_BLOCK else 0
    q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
    own = None if segments is None else jnp.pad(segments, (0, padding), constant_values=-1)
    values = v.T

    def block(first: jax.Array | int, rows: int, seen: int) -> jax.Array:
        allowed = jnp.arange(seen) <= (first + jnp.arange(rows))[:, None]
        if segments is not None and own is not None:
            allowed = allowed & (lax.dynamic_slice_in_dim(own, first, rows)[:, None] == segments[:seen])
        some = lax.dynamic_slice_in_dim(q, first, rows).reshape(rows * G, H)
        scores = _rows_by(some, k[:seen]) * jnp.float32(scale)
        scores = jnp.where(allowed[:, None], scores.reshape(rows, G, seen), _MASKED)
        # Dividing by the sum comes after the product with the values, which has fewer numbers.
        p = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(p, axis=-1, keepdims=True)
        context = _rows_by(p.astype(q.dtype).reshape(rows * G, seen), values[:, :seen])
        return (context.reshape(rows, G, H) / total).astype(q.dtype)

    outs = []
    for first in range(0, T, group):
        seen = min(first + group, T)
        if group == _QUERY_BLOCK:
            outs.append(block(first, seen - first, seen))
            continue
        step = jax.checkpoint(lambda at, seen=seen: block(at, _QUERY_BLOCK, seen))
        outs.append(lax.map(step, first + jnp.arange(0, group, _QUERY_BLOCK)).reshape(group, G, H))
    return jnp.concatenate(outs)[:T]


def _rows_by(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply a [..., rows, in] by b [..., out, in] into float32 [..., rows, out].

    In bfloat16 some processors have no kernel for a product that contracts another axis than the minor one, which
    fails when it runs. Hence the barrier: b's transposition must not be folded into the product.
    """
    rows, minor = a.shape[-2], a.ndim - 1
    if a.dtype == jnp.bfloat16:
        if rows == 1:
            a = jnp.pad(a, [(0, 0)] * (minor - 1) + [(0, 1), (0, 0)])
        a, b = lax.optimization_barrier((a, b))
    batch = tuple(range(minor - 1))
    return lax.dot_general(a, b, (((minor,), (minor,)), (batch, batch)), preferred_element_type=jnp.float32)[
        ..., :rows, :
    ]


def init_cache(batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> LayerCache:
    """Make an empty layer cache {k, v} of [B*K, H, S], of bfloat16 as its bits: no gradient goes through that."""
    shape = (batch * kv_heads, head_dim, capacity)
    return {name: jnp.zeros(shape, bits.dtype_of(dtype)) for name in "kv"}


def update_cache(cache: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array) -> LayerCache:
    """Write each row's new keys and values where that row stands, in place when the cache is donated."""

    def write(slots: jax.Array, new: jax.Array) -> jax.Array:
        B, _, K, _ = new.shape
        new = bits.kept(new, slots.dtype).transpose(0, 2, 3, 1)
        for row in range(B):
            slots = lax.dynamic_update_slice(slots, new[row], (row * K, 0, start[row]))
        return slots

    return {"k": write(cache["k"], k), "v": write(cache["v"], v)}


def attend_cache(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
    """Attend to slots 0..position: one token in float32 over all slots, more by blocks; see `Ops.attend_cache`."""
    B, T, N, H = q.shape
    K = cache["k"].shape[0] // B
    queries = q.transpose(0, 2, 1, 3).reshape(B * K, N // K * T, H)
    context = (_attend_slots if T == 1 else _attend_blocks)(queries, cache, positions, scale)
    return context.reshape(B, N, T, H).transpose(0, 2, 1, 3).astype(q.dtype)


def _attend_slots(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
    """Attend one token's heads q [B*K, G, H] to the whole cache, with positions [B, 1].

    A few key heads of bfloat16 at a time are widened to where the processor's caches hold them: memory is read once,
    whatever the number of query heads. In float32 a loop would only copy them: a step of a layer 1.2–2 times slower.
    """
    heads, G, H = q.shape
    B, S = positions.shape[0], cache["k"].shape[2]
    q = q.astype(jnp.float32) * jnp.float32(scale)
    last = jnp.repeat(positions, heads // B, axis=0)
    if cache["k"].dtype == jnp.float32:
        return _attend_wide(_contract(q, cache["k"], 2, 1), last, cache["v"])
    # At least two rounds: outside of a loop the widening is not spread over the cores.
    some = max((n for n in range(1, heads) if heads % n == 0 and n * H * S <= _WIDENED), default=1)

    def attend(i: jax.Array, out: jax.Array) -> jax.Array:
        mine, at, keys, values = (
            lax.dynamic_slice_in_dim(a, i * some, some) for a in (q, last, cache["k"], cache["v"])
        )
        keys, values = lax.optimization_barrier([bits.numbers(a, q.dtype) for a in (keys, values)])
        if G > 2:
            scores = _contract(mine, keys, 2, 1)
        else:  # as a product the keys would be repacked
            scores = jnp.stack([_contract(keys, mine[:, g], 1, 1) for g in range(G)], axis=1)
        return lax.dynamic_update_slice_in_dim(out, _attend_wide(scores, at, values), i * some, axis=0)

    return lax.fori_loop(0, heads // some, attend, jnp.zeros(q.shape, jnp.float32))


def _attend_wide(scores: jax.Array, last: jax.Array, values: jax.Array) -> jax.Array:
    """Sum values [heads, H, S] by scores [heads, G, S] of slots 0..last [heads, 1] into [heads, G, H].

    One matrix-vector product per head of a group: as one product of matrices the values are repacked on every call
    (batch 8, G = 2: 10 instead of 3 ms a layer).
    """
    p = jax.nn.softmax(jnp.where((jnp.arange(scores.shape[2]) <= last)[:, None], scores, _MASKED), axis=-1)
    return jnp.stack([_contract(values, p[:, g], 2, 1) for g in range(p.shape[1])], axis=1)


def _attend_blocks(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
    """Attend q [B*K, G*T, H] to as many blocks of slots as positions [B, T] need, with a running softmax."""
    heads, rows, H = q.shape
    B, T = positions.shape
    S = cache["k"].shape[2]
    size = min(S, _SLOT_BLOCK)
    at = positions[:, None, None, :, None]

    def block(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, context = state
        first = jnp.minimum(i * size, S - size)  # the last block may overlap the one before
        keys, values = (bits.numbers(lax.dynamic_slice_in_dim(cache[x], first, size, axis=2), q.dtype) for x in "kv")
        slots = first + jnp.arange(size)
        scores = _rows_by(q, keys.transpose(0, 2, 1)).reshape(B, -1, rows // T, T, size) * jnp.float32(scale)
        scores = jnp.where((slots <= at) & (slots >= i * size), scores, _MASKED).reshape(heads, rows, size)
        higher = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        p, shrink = jnp.exp(scores - higher), jnp.exp(largest - higher)
        total = total * shrink + jnp.sum(p, axis=-1, keepdims=True)
        return higher, total, context * shrink + _rows_by(p.astype(q.dtype), values)

    column = jnp.zeros((heads, rows, 1), jnp.float32)
    state = (column + _MASKED, column, jnp.zeros((heads, rows, H), jnp.float32))
    _, total, context = lax.fori_loop(0, jnp.max(positions) // size + 1, block, state)
    return context / total


def _contract(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Multiply batches of matrices or vectors, contracting one axis of each, into float32."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)


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
    """Run the chosen experts tile by tile of rows that share an expert; see `Ops.moe`.

    The routed rows are sorted by expert and walked in tiles of M rows. A tile's surplus rows belong to the next
    experts, whose own tiles come later and overwrite them, so nothing is masked; and the loop ends after the tiles
    that this routing needs, so decoding touches only the chosen experts' weights.
    """
    del expected  # the loop's trip count follows the routing
    return _moe(x, weights, experts, gate_proj, up_proj, down_proj)


@jax.custom_vjp
def _moe(x, weights, experts, gate_proj, up_proj, down_proj):
    stacks = (gate_proj, up_proj, down_proj)
    tiles = _Tiles.of(experts, gate_proj.shape)

    def step(t: jax.Array, out: jax.Array) -> jax.Array:
        expert, first, _ = tiles.at(t)
        y = _swiglu(tiles.rows(x, first), *(_pick(w, expert, t) for w in stacks))
        return lax.dynamic_update_slice_in_dim(out, y, first, axis=0)

    out = tiles.walk(step, jnp.zeros((tiles.slots, x.shape[1]), jnp.float32))
    return _combine(weights, tiles.unsort(out)).astype(x.dtype)


def _moe_forward(x, weights, experts, *stacks):
    return _moe(x, weights, experts, *stacks), (x, weights, experts, stacks)


def _moe_backward(saved, ct):
    """Walk the same tiles again: each recomputes its expert and adds to that expert's gradient, in float32."""
    x, weights, experts, stacks = saved
    C = experts.shape[1]
    tiles = _Tiles.of(experts, stacks[0].shape)
    token_ct = ct.astype(jnp.float32)
    wide_weights = weights.astype(jnp.float32).reshape(-1)

    def step(t, state):
        out, rows_ct, stacks_ct = state
        expert, first, own = tiles.at(t)
        route = lax.dynamic_slice_in_dim(tiles.order, first, tiles.height)
        y, pull = jax.vjp(_swiglu, tiles.rows(x, first), *(_pick(w, expert, t) for w in stacks))
        y_ct = jnp.where(own[:, None], token_ct[route // C] * wide_weights[route][:, None], 0)
        tile_ct, *expert_ct = pull(y_ct)
        out = lax.dynamic_update_slice_in_dim(out, y, first, axis=0)
        rows_ct = lax.dynamic_update_slice_in_dim(rows_ct, tile_ct.astype(jnp.float32), first, axis=0)
        return (
            out,
            rows_ct,
            [s.at[expert].add(g.astype(jnp.float32)) for s, g in zip(stacks_ct, expert_ct, strict=True)],
        )

    zeros = jnp.zeros((tiles.slots, x.shape[1]), jnp.float32)
    out, rows_ct, stacks_ct = tiles.walk(step, (zeros, zeros, [jnp.zeros(w.shape, jnp.float32) for w in stacks]))
    _, pull = jax.vjp(lambda w: _combine(w, tiles.unsort(out)), weights)
    (weights_ct,) = pull(token_ct)
    x_ct = jnp.sum(tiles.unsort(rows_ct), axis=1)
    stacks_ct = [g.astype(w.dtype) for g, w in zip(stacks_ct, stacks, strict=True)]
    return x_ct.astype(x.dtype), weights_ct, None, *stacks_ct


_moe.defvjp(_moe_forward, _moe_backward)


def _combine(weights: jax.Array, each: jax.Array) -> jax.Array:
    """Sum each [R, C, D] over C, weighted, in float32."""
    return jnp.sum(each * weights.astype(jnp.float32)[..., None], axis=1)


def _swiglu(x: jax.Array, gate_proj: jax.Array, up_proj: jax.Array, down_proj: jax.Array) -> jax.Array:
    """Run one expert on x [M, D] into float32 [M, D]."""
    gate, up = _linear(x, gate_proj).astype(x.dtype), _linear(x, up_proj).astype(x.dtype)
    return _linear(jax.nn.silu(gate) * up, down_proj)


def _pick(stack: jax.Array, expert: jax.Array, t: jax.Array) -> jax.Array:
    """Slice one expert's matrix out of [E, out, in], inside a loop over t, without widening or copying the stack."""
    stack, expert, _ = lax.optimization_barrier((stack, expert, t))
    if stack.dtype != jnp.bfloat16:
        return lax.dynamic_index_in_dim(stack, expert, keepdims=False)
    picked = lax.dynamic_index_in_dim(bits.of(stack), expert, keepdims=False)
    return bits.numbers(picked, stack.dtype)


@dataclass(frozen=True)
class _Tiles:
    """The routed rows in order of their expert, cut into tiles of `height` rows that share an expert."""

    order: jax.Array  # [slots] the route, row * C + choice, at each place of the sorted order; surplus at the end
    inverse: jax.Array  # [R, C] the place of each route
    chosen: jax.Array  # [R, C] whether the route names an expert
    starts: jax.Array  # [E] the place of each expert's first route
    sizes: jax.Array  # [E]
    ends: jax.Array  # [E] tiles of this and all earlier experts
    height: int

    @classmethod
    def of(cls, experts: jax.Array, stack: tuple[int, ...]) -> "_Tiles":
        """Sort the routes [R, C] for products with matrices stacked as `stack`, (E, F, D)."""
        E, F, D = stack
        routes = experts.size
        height = _tile_rows(routes, E, F * D)
        flat = jnp.minimum(experts.reshape(-1), E)
        order = jnp.argsort(flat).astype(jnp.int32)
        inverse = jnp.zeros(routes, jnp.int32).at[order].set(jnp.arange(routes, dtype=jnp.int32))
        sizes = jnp.sum(flat[:, None] == jnp.arange(E, dtype=flat.dtype), axis=0, dtype=jnp.int32)
        ends = jnp.cumsum((sizes + height - 1) // height)
        order = jnp.pad(order, (0, height))
        return cls(order, inverse.reshape(experts.shape), experts < E, jnp.cumsum(sizes) - sizes, sizes, ends, height)

    @property
    def slots(self) -> int:
        return self.order.shape[0]

    def at(self, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return tile t's expert, its first place, and which of its rows are that expert's [height]."""
        expert = jnp.sum(t >= self.ends, dtype=jnp.int32)
        before = self.ends[expert] - (self.sizes[expert] + self.height - 1) // self.height
        skipped = (t - before) * self.height
        return expert, self.starts[expert] + skipped, jnp.arange(self.height) < self.sizes[expert] - skipped

    def rows(self, x: jax.Array, first: jax.Array) -> jax.Array:
        """Gather the rows of x [R, D] that stand at places first..first+height-1."""
        return x[lax.dynamic_slice_in_dim(self.order, first, self.height) // self.inverse.shape[1]]

    def unsort(self, places: jax.Array) -> jax.Array:
        """Bring [slots, D] back into [R, C, D]; a route without an expert is zero."""
        return jnp.where(self.chosen[..., None], places[self.inverse], 0)

    def walk(self, step: Callable[[jax.Array, Any], Any], state: Any) -> Any:
        """Return the state after step(t, state) for every tile."""
        return lax.fori_loop(0, self.ends[-1], step, state)


def _tile_rows(routes: int, E: int, matrix: int) -> int:
    """Return the tile height, about the mean rows per expert as a power of two, for matrices of so many elements.

    Taller tiles waste more surplus rows, so 64 is the most, unless the matrices are small and starting a tile costs
    more than its products (D 192, F 288, a training step of 4,096 routes to 8 experts: 932 ms at 64, 699 at 512).
    Shorter ones read the expert again, so 4 is the least, except for so few routes that hardly two share an expert
    (a step of decoding 8 tokens, 8 of 64 experts, in float32: 524 ms at height 1, 382 at 2, 364 at 4, 372 at 8).
    """
    if routes <= 16:
        return 1
    most = max(64, min(512, 2 ** int(math.log2(2**25 / matrix))))
    return max(4, min(most, 2 ** math.ceil(math.log2(routes / E))))


CPU = Ops(
    einsum,
    attend,
    init_cache,
    update_cache,
    attend_cache,
    moe,
    {"k": "batch head_dim slots", "v": "batch head_dim slots"},
    embed=embed,
    top=top,
    einsum_on_mesh=partial(einsum, turn=False),
)

"""A KV cache in pages behind the same signatures as a dense one, so that the network does not know the difference.

A layer's pages are k and v [K, P, page, H]; position p of row b lies in page table[b, p // page], at slot p % page. The
last page is scratch: whatever belongs to nobody is written there, and nothing that counts is read from it. A step puts
the table beside every layer's pages (`opened`) and takes it out again (`closed`), so that the pages alone are donated
from step to step.

Formulations of the three cache operations, chosen by platform in `paged`:
    ORACLE  gathers each row's pages into a dense cache: the definition
    blocks  walks the table in blocks with a running softmax, as far as the longest row; what a CPU runs fast
    TPU and GPU decode with JAX's own kernels and prefill in blocks

Blocks never use slots above a row's position, whatever they hold: their values are replaced by zeros before they meet a
probability of zero. The kernels multiply NaN by zero, so the pages of a sequence whose numbers broke are `scrubbed`
before somebody else gets them.

Axis letters: B rows, T query length, K kv heads, G query heads of one of them, N = K*G, H head_dim, P pages, S slots.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qwen3_jax.ops import LayerCache, Ops, bits, plain
from qwen3_jax.sharding import Rules, spec

Layers = list[LayerCache]

CACHE_AXES = {"k": "kv_heads slots slots head_dim", "v": "kv_heads slots slots head_dim"}
DECODE_ROWS, DECODE_SLOTS = 4, 128  # of a block of decoding: small enough to stay in a core's cache
PREFILL_SLOTS, LAST_SLOTS = 512, 128  # of a block of a prompt, and of its blocks where no whole ones are left
TPU_PAGES = 16  # pages of a row per block of the TPU's kernel
GPU_PAGES, GPU_SPLITS = 8, 16  # the same for the GPU's, and the parts of a row that run side by side
_MASKED = -1e30


def opened(layers: Layers, table: jax.Array) -> Layers:
    """Return the layers with the table [B, columns] int32 beside their pages."""
    return [{**layer, "table": table} for layer in layers]


def closed(layers: Layers) -> Layers:
    """Return the pages alone."""
    return [{"k": layer["k"], "v": layer["v"]} for layer in layers]


def init(pages: int, page_tokens: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> LayerCache:
    """Make a layer's empty pages, one more than asked for: the scratch page, whose number is `pages`.

    Pages of uint16 hold bfloat16, see `bits`.
    """
    shape = (kv_heads, pages + 1, page_tokens, head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


# Writing


def update(cache: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array) -> LayerCache:
    """Write k and v [B, T, K, H] from position start [B] of each row; see `Ops.update_cache`.

    More than one token per row is written page by page: start is then a multiple of the page. A last page that is not
    filled gets zeros behind the tokens.
    """
    page, T = cache["k"].shape[2], k.shape[1]
    if T == 1:
        return cache | {"k": _put(cache, "k", k, start, 1), "v": _put(cache, "v", v, start, 1)}
    padding = ((0, 0), (0, -T % page), (0, 0), (0, 0))
    return cache | {name: _put(cache, name, jnp.pad(new, padding), start, page) for name, new in (("k", k), ("v", v))}


def scrubbed(pages: Layers, table: jax.Array) -> Layers:
    """Fill the pages of a table [columns] with zeros, so that NaN in them meets nobody's probability of zero."""
    return jax.tree.map(lambda array: array.at[:, table].set(0), pages)


def _put(cache: LayerCache, name: str, new: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Write new [B, T, K, H] in pieces of `size` tokens, each within one page, in place when donated."""
    pages, table = cache[name], cache["table"]
    page, (B, T) = pages.shape[2], new.shape[:2]
    pieces = T // size
    new = bits.kept(new, pages.dtype).reshape(B * pieces, size, *new.shape[2:]).transpose(0, 2, 1, 3)  # [., K, size, H]

    def write(i: jax.Array, pages: jax.Array) -> jax.Array:
        row, at = i // pieces, start[i // pieces] + i % pieces * size
        zero = jnp.int32(0)
        piece = lax.dynamic_index_in_dim(new, i, keepdims=False)[:, None]
        return lax.dynamic_update_slice(pages, piece, (zero, table[row, at // page], at % page, zero))

    return lax.fori_loop(0, B * pieces, write, pages)


# Reading


def attend_gathered(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
    """Attend to a dense copy of each row's pages: the definition; see `Ops.attend_cache`."""
    table = cache["table"]
    dense = {}
    for name in "kv":
        rows = jnp.take(cache[name], table, axis=1)  # [K, B, columns, page, H]
        rows = bits.numbers(rows, q.dtype).reshape(rows.shape[0], table.shape[0], -1, rows.shape[-1])
        dense[name] = rows.transpose(1, 2, 0, 3)
    used = jnp.arange(dense["v"].shape[1]) <= jnp.max(positions, axis=1)[:, None]
    dense["v"] = jnp.where(used[:, :, None, None], dense["v"], 0)
    return plain.attend_cache(q, dense, positions, scale)


def attend_blocks(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
    """Attend block by block of the table, with a running softmax; see `Ops.attend_cache`.

    One token meets bits as float32, more tokens as bfloat16: the same numbers, and what a CPU multiplies faster.

    A block that lies above a row's position changes nothing of that row, to the bit: its probabilities are zero and
    its largest score is not larger. So a row's result does not depend on how long the others are.
    """
    B, T, N, H = q.shape
    K = cache["k"].shape[0]
    some = _rows_together(B, T)
    queries = q.reshape(B // some, some, T, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)
    queries = queries.reshape(B // some, K * some, N // K * T, H)
    if T == 1 and cache["k"].dtype == jnp.uint16:
        queries = queries.astype(jnp.float32)
    walk = _walk_rows if T == 1 else _walk_prompts
    out = walk(queries, cache, positions.reshape(B // some, some, T), scale)
    out = out.reshape(B // some, K, some, N // K, T, H).transpose(0, 2, 4, 1, 3, 5)
    return out.reshape(B, T, N, H).astype(q.dtype)


def _rows_together(B: int, T: int) -> int:
    """Return how many rows go through their blocks together, as far as the longest of them: all rows of a prefill."""
    return B if T > 1 else max(n for n in range(1, DECODE_ROWS + 1) if B % n == 0)


def _walk_rows(queries: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
    """Attend with one token of each row, group after group of rows in one loop.

    Args:
        queries: [groups, K * rows, G, H].
        positions: [groups, rows, 1].
    """
    rows, page = positions.shape[1], cache["k"].shape[2]
    count = max(1, DECODE_SLOTS // rows // page)
    table = _columns(cache, count).reshape(*positions.shape[:2], -1)
    rounds = jnp.max(positions, axis=(1, 2)) // (count * page) + 1
    ends = jnp.cumsum(rounds)

    def block(i: jax.Array, state: Softmax) -> Softmax:
        group = jnp.sum(i >= ends, dtype=jnp.int32)
        first = (i - ends[group] + rounds[group]) * count
        q, at, columns, *mine = (
            lax.dynamic_index_in_dim(a, group, keepdims=False) for a in (queries, positions, table, *state)
        )
        mine = _take_in(q, cache, columns, first, count, at, scale, Softmax(*mine))
        return Softmax(*(lax.dynamic_update_index_in_dim(a, new, group, 0) for a, new in zip(state, mine, strict=True)))

    state = lax.fori_loop(0, ends[-1], block, Softmax.empty(queries))
    return state.context / state.total


def _walk_prompts(queries: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
    """Attend with several tokens of each row, [1, K * B, G * T, H] and [1, B, T], in blocks of two widths.

    Where the whole blocks of a prompt end depends on the longest row, so several rows have one width. A block as wide
    as the table would be gathered before the loop, and with the new keys and values at that, which copies the cache.
    """
    (queries,), (positions,) = queries, positions
    page = cache["k"].shape[2]
    last = max(1, LAST_SLOTS // page)
    whole = max(1, PREFILL_SLOTS // LAST_SLOTS) * last
    counts = [whole] if len(positions) > 1 else [whole, last] if cache["table"].shape[1] > whole else [last]
    table = _columns(cache, counts[0])

    def block(count: int, _: jax.Array, carry: tuple[jax.Array, Softmax]) -> tuple[jax.Array, Softmax]:
        first, state = carry
        return first + count, _take_in(queries, cache, table, first, count, positions, scale, state)

    carry = jnp.int32(0), Softmax.empty(queries)
    columns = jnp.max(positions) // page + 1 if table.shape[1] > counts[-1] else 1
    for count in counts:
        left = columns - carry[0]
        rounds = left // count if count > counts[-1] else -(-left // count)
        carry = lax.fori_loop(0, rounds, functools.partial(block, count), carry)
    _, state = carry
    return (state.context / state.total)[None]


class Softmax(NamedTuple):
    """A softmax under way, [..., 1] each and context [..., H], in float32."""

    largest: jax.Array
    total: jax.Array
    context: jax.Array

    @classmethod
    def empty(cls, queries: jax.Array) -> "Softmax":
        context = jnp.zeros(queries.shape, jnp.float32)
        return cls(context[..., :1] + _MASKED, context[..., :1], context)


def _take_in(
    queries: jax.Array,
    cache: LayerCache,
    table: jax.Array,
    first: jax.Array,
    count: int,
    positions: jax.Array,
    scale: float,
    state: Softmax,
) -> Softmax:
    """Take `count` columns of a table [B, columns], from `first` on, into softmaxes of queries [K * B, G * T, H]."""
    (K, _, page, H), (B, T) = cache["k"].shape, positions.shape
    size = count * page
    ids = lax.dynamic_slice_in_dim(table, first, count, axis=1)
    slots = first * page + jnp.arange(size)
    keys, values = (jnp.take(cache[name], ids, axis=1, mode="clip").reshape(K, B, size, H) for name in "kv")
    values = jnp.where((slots <= jnp.max(positions, axis=1)[:, None])[None, :, :, None], values, 0)
    keys, values = (bits.numbers(a, queries.dtype).reshape(K * B, size, H) for a in (keys, values))
    scores = _product(queries, keys, 2).reshape(K, B, -1, T, size) * jnp.float32(scale)
    allowed = (slots <= positions[:, :, None])[None, :, None]
    scores = jnp.where(allowed, scores, _MASKED).reshape(K * B, -1, size)
    higher = jnp.maximum(state.largest, jnp.max(scores, axis=-1, keepdims=True))
    p, shrink = jnp.exp(scores - higher), jnp.exp(state.largest - higher)
    total = state.total * shrink + jnp.sum(p, axis=-1, keepdims=True)
    return Softmax(higher, total, state.context * shrink + _product(p.astype(values.dtype), values, 1))


def attend_tpu(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
    """Attend one token per row with JAX's paged attention for TPU, more in blocks; see `Ops.attend_cache`."""
    if q.shape[1] > 1:
        return attend_blocks(q, cache, positions, scale)
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    with jax.numpy_dtype_promotion("standard"):  # the kernel mixes its dtypes
        out = paged_attention(
            (q[:, 0].astype(jnp.float32) * scale).astype(q.dtype),
            cache["k"],
            cache["v"],
            positions[:, 0] + 1,
            _columns(cache, TPU_PAGES),
            pages_per_compute_block=TPU_PAGES,
        )
    return out[:, None].astype(q.dtype)


def attend_gpu(
    q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float, *, interpret: bool = False
) -> jax.Array:
    """Attend one token per row with JAX's paged attention for GPU, more in blocks; see `Ops.attend_cache`."""
    if q.shape[1] > 1:
        return attend_blocks(q, cache, positions, scale)
    with warnings.catch_warnings():
        # jax 0.12 calls it deprecated and names no successor; pyproject.toml ends where it may be gone.
        warnings.filterwarnings("ignore", message=".*paged_attention is deprecated", category=DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    out = paged_attention(
        (q[:, 0].astype(jnp.float32) * scale).astype(q.dtype),
        cache["k"],
        cache["v"],
        _columns(cache, GPU_SPLITS * GPU_PAGES),
        positions[:, 0] + 1,
        pages_per_compute_block=GPU_PAGES,
        k_splits=GPU_SPLITS,
        interpret=interpret,
    )
    return out[:, None].astype(q.dtype)


def _columns(cache: LayerCache, multiple: int) -> jax.Array:
    """Return the table with its columns padded by the scratch page."""
    table, scratch = cache["table"], cache["k"].shape[1] - 1
    return jnp.pad(table, ((0, 0), (0, -table.shape[1] % multiple)), constant_values=scratch)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Multiply a [M, R, in] by b, contracting its axis 1 or 2, into float32 [M, R, out].

    A few rows go one by one: as one product of matrices, XLA on a CPU repacks b first.
    """
    if a.shape[1] <= 4:
        return jnp.stack([_contract(b, a[:, row], axis, 1) for row in range(a.shape[1])], axis=1)
    return _contract(a, b, 2, axis)


def _contract(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def paged(ops: Ops, *, platform: str, mesh: Mesh | None = None, rules: Rules | None = None) -> Ops:
    """Return a formulation whose cache is in pages; the rest of it stays.

    `init_cache` of the result takes (pages, page_tokens, kv_heads, head_dim, dtype), see `init`.

    Args:
        ops: the formulation of everything else.
        platform: as in `ops.for_platform`.
        mesh, rules: where the arrays lie, if they are spread. Every device has all pages of its heads and writes the
            tokens of all rows; it attends for its own rows, or its own part of them.
    """

    def init_cache(pages: int, page_tokens: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> LayerCache:
        return init(pages, page_tokens, kv_heads, head_dim, bits.dtype_of(dtype) if platform == "cpu" else dtype)

    write, read = update, {"tpu": attend_tpu, "gpu": attend_gpu, "cuda": attend_gpu}.get(platform, attend_blocks)
    if mesh is not None and rules is not None:
        write, read = _on_mesh(write, read, mesh, rules)
    return ops._replace(init_cache=init_cache, update_cache=write, attend_cache=read, cache_axes=CACHE_AXES)


def _on_mesh(
    write: Callable[..., LayerCache], read: Callable[..., jax.Array], mesh: Mesh, rules: Rules
) -> tuple[Callable[..., LayerCache], Callable[..., jax.Array]]:
    """Run the two on every device's own heads; see `paged`."""
    pages = {name: spec(axes, rules) for name, axes in CACHE_AXES.items()} | {"table": PartitionSpec()}
    heads = PartitionSpec(None, None, rules["kv_heads"] or None)

    def even(name: str, size: int) -> tuple[str, ...] | None:
        """Return the mesh axes that split an axis of this size; None if it does not divide, and stays whole."""
        ways = math.prod(mesh.shape[axis] for axis in rules[name])
        return (rules[name] or None) if size % ways == 0 else None

    def shard(function: Callable[..., Any], ins: Any, outs: Any) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)

    def update_all(cache: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array) -> LayerCache:
        return shard(write, (pages, heads, heads, PartitionSpec()), pages)(cache, k, v, start)

    def attend_own(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
        batch, length = even("batch", q.shape[0]), even("length", q.shape[1])
        queries = PartitionSpec(batch, length, rules["heads"] or None)
        ins = (queries, pages | {"table": PartitionSpec(batch)}, PartitionSpec(batch, length))
        return shard(lambda *args: read(*args, scale), ins, queries)(q, cache, positions)

    return update_all, attend_own

"""The operations as TPUs run them well: chosen by what the compiler's own programs cost, see `plan`.

What differs from `plain.XLA`, and why (each seen in the compiled program of a TPU slice):
    einsum        leaves the matrix unit in the result's dtype. It accumulates in float32 inside; asking for float32
                  outside would send float32 over the links wherever a sum over chips follows.
    weight_order  o_proj's heads outermost, as the product reads them. In the order of its shape the heads of a chip lie
                  in sublanes, and where they do not fill a tile (8B on eight chips: four) every call of decoding
                  copied all layers' o_proj.
    cache         [B, K, S, H]: slots lie in sublanes, so no tile is padded whatever the number of local heads.
    update_cache  one token per row: a kernel that rewrites one aligned block of slots per row in place. XLA's
                  own update loops over the rows and carries the whole cache through VMEM: every step wrote it back.
    attend        flash attention, the scores never leave VMEM, blocks above the diagonal are skipped.
    moe           see `moe_tpu`.

A kernel sees one device's arrays: on a mesh the functions here run inside `jax.shard_map`, see `mesh.on_mesh`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3_jax.ops import LayerCache, Ops, moe_tpu, plain

SUBLANES = 16
"""Slots that a cache update rewrites: one tile of bfloat16 (two of float32), the least that can be addressed."""


def einsum(spec: str, x: jax.Array, w: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """Apply a linear layer; see `Ops.einsum`."""
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=out_dtype)


# The cache


def init_cache(batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> LayerCache:
    """Make an empty layer cache {k, v} of [B, K, S, H], S rounded up to whole tiles; see `Ops.init_cache`."""
    slots = -(-capacity // SUBLANES) * SUBLANES
    shape = (batch, kv_heads, slots, head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


CACHE_AXES = {"k": "batch kv_heads slots head_dim", "v": "batch kv_heads slots head_dim"}


def update_cache(
    cache: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array, *, interpret: bool = False
) -> LayerCache:
    """Write new keys and values; see `Ops.update_cache`."""
    k, v = (jnp.swapaxes(new, 1, 2).astype(cache["k"].dtype) for new in (k, v))
    if k.shape[2] == 1:
        k, v = _update_one(start, k, v, cache["k"], cache["v"], interpret=interpret)
        return {"k": k, "v": v}

    def write(row: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(row, new, (jnp.zeros_like(at), at, jnp.zeros_like(at)))

    return {"k": jax.vmap(write)(cache["k"], k, start), "v": jax.vmap(write)(cache["v"], v, start)}


def _update_one(start, k, v, k_cache, v_cache, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    B, K, _, H = k_cache.shape
    item = k_cache.dtype.itemsize
    hbm, vmem = (pl.BlockSpec(memory_space=space) for space in (pltpu.HBM, pltpu.VMEM))
    block = pltpu.VMEM((B, K, SUBLANES, H), k_cache.dtype)
    return pl.pallas_call(
        _update_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[vmem, vmem, hbm, hbm],
            out_specs=[hbm, hbm],
            scratch_shapes=[block, block, pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=[pltpu.HBM(c.shape, c.dtype) for c in (k_cache, v_cache)],
        input_output_aliases={3: 0, 4: 1},
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * (2 * B * K * SUBLANES * H + B * K * H) * item
        ),
        interpret=interpret,
    )(start, k, v, k_cache, v_cache)


def _update_kernel(start, k, v, k_in, v_in, k_out, v_out, k_block, v_block, done) -> None:
    """Fetch the block of slots that holds each row's next one, put the new token in, send it back."""
    rows = k.shape[0]

    def copies(b: jax.Array, *, back: bool):
        first = pl.multiple_of(start[b] // SUBLANES * SUBLANES, SUBLANES)
        for i, (array, block) in enumerate(((k_out, k_block), (v_out, v_block))):
            there, here = array.at[b, :, pl.ds(first, SUBLANES), :], block.at[b]
            source, target = (here, there) if back else (there, here)
            yield pltpu.make_async_copy(source, target, done.at[i])

    def move(*, back: bool) -> None:
        @pl.loop(0, rows)
        def _(b):
            for copy in copies(b, back=back):
                copy.start()

        @pl.loop(0, rows)
        def _(b):
            for copy in copies(b, back=back):
                copy.wait()

    move(back=False)

    @pl.loop(0, rows)
    def _(b):
        slot = lax.broadcasted_iota(jnp.int32, k_block.shape[1:], 1)
        for new, block in ((k, k_block), (v, v_block)):
            block[b] = jnp.where(slot == start[b] % SUBLANES, new[b], block[b])

    move(back=True)


def attend_cache(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
    """Attend to the cache; see `Ops.attend_cache`."""
    B, T, N, H = q.shape
    k, v = cache["k"].astype(q.dtype), cache["v"].astype(q.dtype)
    K, S = k.shape[1], k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * jnp.float32(scale)
    allowed = jnp.arange(S)[None, None] <= positions[:, :, None]
    scores = jnp.where(allowed[:, None, None], scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("BKGTS,BKSH->BTKGH", probabilities, v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H).astype(q.dtype)


# Attention of a prompt to itself


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    start: jax.Array | int = 0,
    *,
    span: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally within segments; see `Ops.attend`. Packed rows and odd lengths take the plain formulation."""
    if segment_ids is not None or q.shape[1] % 128 or k.shape[1] % 128:
        return plain.attend(q, k, v, segment_ids, scale, start)
    return flash(q, k, v, scale, start, span=span, interpret=interpret)


def flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    start: jax.Array | int,
    *,
    span: int | None = None,
    block: int = 512,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally, block by block, with a running softmax (arXiv 2205.14135).

    The query heads that share a key head are multiplied together, as rows of one product. T and S must be multiples of
    128. The cost estimate is that of the last T of the S queries, the dearest ones; with a span, the mean over the
    parts of the last so many.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    G = N // K
    rows = math.gcd(T, max(128, block // G))
    columns = math.gcd(S, block)
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)  # BKGTH
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # BKSH

    def last(i: jax.Array | int, start: jax.Array | int) -> jax.Array:
        """The last block of keys that block i of the queries sees."""
        return lax.div(jnp.int32(start + (i + 1) * rows - 1), jnp.int32(columns))

    span = T if span is None else span
    visited = sum((S - span + (i + 1) * rows - 1) // columns + 1 for i in range(span // rows)) * T // span
    query_spec = pl.BlockSpec((1, 1, G, rows, H), lambda b, h, i, j, start: (b, h, 0, i, 0))
    # A block that is not visited is not fetched: the same index again moves nothing.
    key_spec = pl.BlockSpec((1, 1, columns, H), lambda b, h, i, j, start: (b, h, jnp.minimum(j, last(i, start[0])), 0))
    out = pl.pallas_call(
        functools.partial(_flash_kernel, scale=scale, last=last),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, T // rows, S // columns),
            in_specs=[query_spec, key_spec, key_spec],
            out_specs=query_spec,
            scratch_shapes=[
                pltpu.VMEM((G * rows, 128), jnp.float32),
                pltpu.VMEM((G * rows, 128), jnp.float32),
                pltpu.VMEM((G * rows, H), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * H * rows * columns * visited,
            transcendentals=B * N * rows * columns * visited,
            bytes_accessed=q.dtype.itemsize * (2 * q.size + 2 * B * K * visited * columns * H),
        ),
        interpret=interpret,
    )(jnp.atleast_1d(jnp.int32(start)), q, k, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _flash_kernel(start, q, k, v, out, peak, total, sums, *, scale: float, last) -> None:
    i, j = pl.program_id(2), pl.program_id(3)
    G, rows, H = q.shape[2:]
    columns = k.shape[2]
    first, end = start[0] + i * rows, last(i, start[0])

    @pl.when(j == 0)
    def _():
        peak[...] = jnp.full_like(peak, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def visit(*, masked: bool) -> None:
        queries = q[0, 0].reshape(G * rows, H)
        scores = lax.dot_general(queries, k[0, 0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores = scores * jnp.float32(scale)
        if masked:
            at = lax.broadcasted_iota(jnp.int32, (G, rows, columns), 1).reshape(G * rows, columns) + first
            slot = lax.broadcasted_iota(jnp.int32, (G * rows, columns), 1) + j * columns
            scores = jnp.where(slot <= at, scores, -jnp.inf)
        before = peak[:, :1]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - now)
        keep = jnp.exp(before - now)
        total[...] = jnp.broadcast_to(keep * total[:, :1] + jnp.sum(weights, axis=1, keepdims=True), total.shape)
        sums[...] = keep * sums[...] + jnp.dot(weights.astype(v.dtype), v[0, 0], preferred_element_type=jnp.float32)
        peak[...] = jnp.broadcast_to(now, peak.shape)

    diagonal = (j + 1) * columns - 1 > first
    pl.when((j <= end) & diagonal)(lambda: visit(masked=True))
    pl.when((j <= end) & ~diagonal)(lambda: visit(masked=False))

    @pl.when(j == end)
    def _():
        out[0, 0] = (sums[...] / total[:, :1]).astype(out.dtype).reshape(G, rows, H)


WEIGHT_ORDER = {"embed heads head_dim": (1, 0, 2)}
TPU = Ops(einsum, attend, init_cache, update_cache, attend_cache, moe_tpu.moe, CACHE_AXES, weight_order=WEIGHT_ORDER)
INTERPRETED = TPU._replace(
    attend=functools.partial(attend, interpret=True), update_cache=functools.partial(update_cache, interpret=True)
)
"""The same with the kernels emulated, to check their arithmetic on any platform."""

"""The operations written for reading: `ORACLE` is the definition, `XLA` the portable way to run it.

Every faster formulation is tested against `ORACLE`. The two differ only in the experts: the oracle computes every
expert for every token and masks, `XLA` sorts the tokens by expert and multiplies the groups.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_jax.ops import LayerCache, Ops, moe


def einsum(spec: str, x: jax.Array, w: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """Apply a linear layer; see `Ops.einsum`."""
    out_dtype = x.dtype if out_dtype is None else out_dtype
    return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(out_dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    start: jax.Array | int = 0,
    *,
    span: int | None = None,
) -> jax.Array:
    """Attend causally within segments; see `Ops.attend`."""
    T, S = q.shape[1], k.shape[1]
    allowed = (jnp.arange(S)[None, :] <= start + jnp.arange(T)[:, None])[None]
    if segment_ids is not None:
        own = lax.dynamic_slice_in_dim(segment_ids, start, T, axis=1)
        allowed = allowed & (own[:, :, None] == segment_ids[:, None, :])
    return _masked_attention(q, k, v, allowed, scale)


def init_cache(batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> LayerCache:
    """Make an empty layer cache {k, v} of [B, S, K, H]; see `Ops.init_cache`."""
    shape = (batch, capacity, kv_heads, head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def update_cache(cache: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array) -> LayerCache:
    """Write new keys and values; see `Ops.update_cache`."""

    def write(row: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(row, new.astype(row.dtype), (at, jnp.zeros_like(at), jnp.zeros_like(at)))

    return {"k": jax.vmap(write)(cache["k"], k, start), "v": jax.vmap(write)(cache["v"], v, start)}


def attend_cache(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
    """Attend to the cache; see `Ops.attend_cache`."""
    slots = jnp.arange(cache["k"].shape[1])
    allowed = slots[None, None, :] <= positions[:, :, None]
    return _masked_attention(q, cache["k"].astype(q.dtype), cache["v"].astype(q.dtype), allowed, scale)


def _masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, scale: float) -> jax.Array:
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * jnp.float32(scale)
    scores = jnp.where(allowed[:, None, None], scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H).astype(q.dtype)


CACHE_AXES = {"k": "batch slots kv_heads head_dim", "v": "batch slots kv_heads head_dim"}
ORACLE = Ops(einsum, attend, init_cache, update_cache, attend_cache, moe.dense, CACHE_AXES)
XLA = ORACLE._replace(moe=moe.grouped)

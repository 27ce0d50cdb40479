"""The operations written for reading: `ORACLE` is the definition, `XLA` the portable way to run it.

Every faster formulation is tested against `ORACLE`. The two differ only in the experts: the oracle computes every
expert for every token and masks, `XLA` sorts the tokens by expert and multiplies the groups.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_jax.ops import LayerCache, Ops


def einsum(spec: str, x: jax.Array, w: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """Apply a linear layer; see `Ops.einsum`."""
    out_dtype = x.dtype if out_dtype is None else out_dtype
    return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(out_dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float) -> jax.Array:
    """Attend causally within segments; see `Ops.attend`."""
    T = q.shape[1]
    allowed = jnp.tril(jnp.ones((T, T), bool))[None]
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, :, None] == segment_ids[:, None, :])
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


def moe_dense(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
) -> jax.Array:
    """Compute every expert for every token and mask; see `Ops.moe`."""
    E = gate_proj.shape[0]
    share = jnp.sum(jax.nn.one_hot(experts, E, dtype=x.dtype) * weights[..., None].astype(x.dtype), axis=1)
    hidden = jax.nn.silu(einsum("RD,EFD->REF", x, gate_proj)) * einsum("RD,EFD->REF", x, up_proj)
    each = jnp.einsum("REF,EDF->RED", hidden, down_proj.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.einsum("RED,RE->RD", each, share.astype(jnp.float32)).astype(x.dtype)


def moe_grouped(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
) -> jax.Array:
    """Sort the routed rows by expert and multiply the groups with `lax.ragged_dot_general`; see `Ops.moe`."""
    R, C = experts.shape
    E = gate_proj.shape[0]
    order = jnp.argsort(experts.reshape(-1))
    sizes = jnp.bincount(experts.reshape(-1), length=E).astype(jnp.int32)
    rows = x[order // C]
    gate, up = _ragged_linear(rows, gate_proj, sizes), _ragged_linear(rows, up_proj, sizes)
    each = _ragged_linear(jax.nn.silu(gate) * up, down_proj, sizes)
    # Rows beyond the last group belong to no expert here and hold nothing that is defined.
    each = jnp.where(jnp.arange(R * C)[:, None] < jnp.sum(sizes), each.astype(jnp.float32), 0)
    each = each * weights.reshape(-1)[order, None].astype(jnp.float32)
    return jnp.zeros((R, x.shape[1]), jnp.float32).at[order // C].add(each).astype(x.dtype)


def _ragged_linear(rows: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiply consecutive groups of rows [R, in] by their own [out, in] matrix of w [E, out, in]."""
    contract_in = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    out = lax.ragged_dot_general(rows, w.astype(rows.dtype), sizes, contract_in, preferred_element_type=jnp.float32)
    return out.astype(rows.dtype)


CACHE_AXES = {"k": "batch slots kv_heads head_dim", "v": "batch slots kv_heads head_dim"}
ORACLE = Ops(einsum, attend, init_cache, update_cache, attend_cache, moe_dense, CACHE_AXES)
XLA = ORACLE._replace(moe=moe_grouped)

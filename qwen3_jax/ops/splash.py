"""Attention for training on TPUs: packed rows, forward and backward, without scores in memory.

JAX's splash attention kernel, one call per row and kv head with its group of query heads. Serving's own kernel (see
`tpu.flash`) knows no segments and no gradient; this one knows both. Heads narrower than a lane of 128, and lengths that
are no multiple of 128, take the plain formulation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from qwen3_jax.ops import plain

LANES = 128
BLOCKS = (1024, 512, 256, LANES)  # the largest that divides the length


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    start: jax.Array | int | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally within segments; see `Ops.attend`. `interpret` runs the kernel on a CPU, for tests."""
    B, T, N, H = q.shape
    K = k.shape[2]
    if start is not None or T % LANES or H % LANES:
        return plain.attend(q, k, v, segment_ids, scale, 0 if start is None else start)
    block = next(size for size in BLOCKS if T % size == 0)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    group = masks.MultiHeadMask([masks.CausalMask((T, T))] * (N // K))
    one: Any = kernel.make_splash_mqa(group, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    segments = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids

    def row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return jax.vmap(lambda q, k, v: one(q, k, v, kernel.SegmentIds(segments, segments)))(q, k, v)

    grouped = (q.astype(jnp.float32) * scale).astype(q.dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    context = jax.vmap(row)(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), segments)
    return context.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)

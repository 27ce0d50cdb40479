"""The KV cache as a value: it goes into a step and comes out of it, donated.

A cache is a list with one entry per layer, in the layout that the layer's `Ops` wants. Slot index equals position: row
b's token at position p lies in slot p, so a mask needs positions only and a row's padding is overwritten by its next
tokens.
"""

import jax.numpy as jnp

from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import LayerCache, Ops

Cache = list[LayerCache]


def init(config: Qwen3Config, *, batch: int, capacity: int, dtype: jnp.dtype, ops: Ops) -> Cache:
    """Make an empty cache of `capacity` slots for each of `batch` rows, for activations of `dtype`."""
    return [
        ops.init_cache(batch, capacity, config.num_key_value_heads, config.head_dim, dtype)
        for _ in range(config.num_hidden_layers)
    ]

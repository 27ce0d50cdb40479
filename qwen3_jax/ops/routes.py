"""Routes as arrays that travel between devices: the weights and the expert ids of rows, packed in the rows' dtype.

Axis letters: R rows, C choices per row.
"""

import jax
import jax.numpy as jnp
from jax import lax


def pack(weights: jax.Array, experts: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Lay routes out as [R, 3C] of one dtype: the weights, and the ids as two digits that bfloat16 holds exactly."""
    digits = lax.div(experts, jnp.int32(256)), lax.rem(experts, jnp.int32(256))
    return jnp.concatenate([a.astype(dtype) for a in (weights, *digits)], axis=1)


def unpack(routes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the weights [R, C] and the ids [R, C] int32 of what `pack` made."""
    weights, high, low = jnp.split(routes, 3, axis=1)
    return weights, high.astype(jnp.int32) * 256 + low.astype(jnp.int32)

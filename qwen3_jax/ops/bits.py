"""Arrays of bfloat16 as their bits, uint16: XLA's CPU backend moves integers as they are, and widens bfloat16 first.

No gradient goes through bits, and JAX would take it for zero: asking for one is refused.
"""

import jax
import jax.numpy as jnp
from jax import lax


def dtype_of(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which a cache of some dtype is kept."""
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else jnp.dtype(dtype)


def kept(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return numbers as a cache of this dtype, a result of `dtype_of`, keeps them."""
    return of(x.astype(jnp.bfloat16)) if dtype == jnp.uint16 else x.astype(dtype)


@jax.custom_jvp
def of(x: jax.Array) -> jax.Array:
    """Return the bits of bfloat16."""
    return lax.bitcast_convert_type(x, jnp.uint16)


@of.defjvp
def _no_gradient(*_: object) -> tuple[jax.Array, jax.Array]:
    raise NotImplementedError(
        "no gradient goes through a cache of bfloat16 on a CPU: use float32, or run the whole sequence without a cache"
    )


def numbers(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return what is kept, bits or not, as numbers of a dtype."""
    if x.dtype != jnp.uint16:
        return x.astype(dtype)
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.bfloat16)
    return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)

"""Routes as arrays: which rows go to which device, and the weights and expert ids that travel with them.

Axis letters: R rows, C choices per row, E experts of one device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Routing(NamedTuple):
    """Which rows an exchange sends to which target, a device or a part of one's experts."""

    order: jax.Array
    """[targets, R], for each target first the rows that it is sent."""
    at: jax.Array
    """[targets, R], where in that order a row stands, or -1."""
    target: jax.Array
    """[R, C], where an expert is, or -1 where that is none of the targets."""
    local: jax.Array
    """[R, C], its number there."""
    sent: jax.Array
    """[targets], how many rows."""

    @classmethod
    def of(cls, target: jax.Array, local: jax.Array, targets: int) -> "Routing":
        """Send each row, once, to every target that has one of its experts."""
        wanted = jnp.any(target == jnp.arange(targets)[:, None, None], axis=2)
        sent = jnp.sum(wanted, axis=1, dtype=jnp.int32)
        at = jnp.where(wanted, jnp.cumsum(wanted, axis=1, dtype=jnp.int32) - 1, -1)
        return cls(jnp.argsort(~wanted, axis=1), at, target, local, sent)

    def in_round(
        self, k: jax.Array | int, room: int, weights: jax.Array, E: int, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array]:
        """Return the k-th `room` rows for each target, and their routes.

        Args:
            weights: [R, C].
            E: the id for "none", which the routes to other targets get, and all of the rows beyond `sent`.
            dtype: of the routes.

        Returns:
            The rows' numbers [targets, room]; and what `pack` makes of their routes, [targets * room, 3C].
        """
        R, C = weights.shape
        slot = k * room + jnp.arange(room, dtype=jnp.int32)
        row = self.order[:, jnp.minimum(slot, R - 1)]
        there = self.target[row] == jnp.arange(self.sent.shape[0])[:, None, None]
        there &= (slot < self.sent[:, None])[:, :, None]
        return row, pack(weights[row].reshape(-1, C), jnp.where(there, self.local[row], E).reshape(-1, C), dtype)


def pack(weights: jax.Array, experts: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Lay routes out as [R, 3C] of one dtype: the weights, and the ids as two digits that bfloat16 holds exactly."""
    digits = lax.div(experts, jnp.int32(256)), lax.rem(experts, jnp.int32(256))
    return jnp.concatenate([a.astype(dtype) for a in (weights, *digits)], axis=1)


def unpack(routes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the weights [R, C] and the ids [R, C] int32 of what `pack` made."""
    weights, high, low = jnp.split(routes, 3, axis=1)
    return weights, high.astype(jnp.int32) * 256 + low.astype(jnp.int32)

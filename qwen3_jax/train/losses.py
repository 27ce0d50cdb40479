"""What is minimised: next-token cross-entropy without whole logits, and the routers' auxiliary losses.

Cross-entropy walks over chunks of the sequence: logits of a chunk, their loss, and in the same pass the gradients of
hidden states and output matrix, so that no more than [B, c, V] ever exists and no product is computed twice. On a mesh
the output matrix is gathered before the walk and its gradient, a sum over the rows of each device, added up after it:
no weight is sent per chunk. Sums and softmax are float32. Letters: B rows, T length, D hidden, V vocabulary, c chunk,
n groups of devices with rows of their own; M MoE layers, g groups of rows, E experts, C experts per token.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_jax.ops import Ops
from qwen3_jax.train.stacked import Routing


class TokenSums(NamedTuple):
    """Weighted sums over tokens, float32 scalars without gradient."""

    cross_entropy: jax.Array
    z: jax.Array
    """Of logsumexp(logits)^2."""
    correct: jax.Array
    """Of the tokens whose target has the largest logit."""


def cross_entropy(
    ops: Ops,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    z_loss: float,
) -> tuple[jax.Array, TokenSums]:
    """Sum weights * (cross-entropy + z_loss * logsumexp(logits)^2) over the tokens.

    Args:
        ops: the formulation.
        hidden: [B, T, D] after the final norm.
        head: [V, D].
        targets: [B, T] int32.
        weights: [B, T] float32, 0 where nothing is learned.
        chunk: positions of each row whose logits exist at one time.
        z_loss: the coefficient (PaLM, arXiv 2204.02311 §5, uses 1e-4).

    Returns:
        The sum, differentiable in hidden and head, and its parts.
    """
    return _token_loss(ops, min(chunk, hidden.shape[1]), z_loss, hidden, head, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _token_loss(ops: Ops, chunk: int, z_loss: float, hidden, head, targets, weights) -> tuple[jax.Array, TokenSums]:
    head = _gathered(ops, head, hidden.dtype)

    def step(sums: TokenSums, part: tuple[jax.Array, ...]) -> tuple[TokenSums, None]:
        more, _ = _chunk(ops, z_loss, head, *part)
        return jax.tree.map(jnp.add, sums, more), None

    sums, _ = lax.scan(step, _zero(), _cut(chunk, hidden, targets, weights))
    return sums.cross_entropy + z_loss * sums.z, sums


def _forward(ops: Ops, chunk: int, z_loss: float, hidden, head, targets, weights) -> tuple[Any, Any]:
    B, T, D = hidden.shape
    n = ops.head_groups
    like, head = jnp.zeros((), head.dtype), _gathered(ops, head, hidden.dtype)

    def by_group(x: jax.Array) -> jax.Array:
        return x.reshape(n, B // n, *x.shape[1:])

    def laid_out(head_slopes: jax.Array) -> jax.Array:
        return ops.constrain(head_slopes, "head_batch vocab hidden")

    def step(state: tuple[TokenSums, jax.Array], part: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        sums, head_slopes = state
        more, slope = _chunk(ops, z_loss, head, *part)
        slope = slope.astype(hidden.dtype)
        x_slope = jnp.einsum("BTV,VD->BTD", slope, head, preferred_element_type=jnp.float32)
        head_slopes += jnp.einsum(
            "nBTV,nBTD->nVD", by_group(slope), by_group(part[0]), preferred_element_type=jnp.float32
        )
        return (jax.tree.map(jnp.add, sums, more), laid_out(head_slopes)), x_slope.astype(hidden.dtype)

    start = (_zero(), laid_out(jnp.zeros((n, *head.shape), jnp.float32)))
    (sums, head_slopes), slopes = lax.scan(step, start, _cut(chunk, hidden, targets, weights))
    slopes = jnp.moveaxis(slopes, 0, 1).reshape(B, -1, D)[:, :T]
    head_slope = ops.constrain(jnp.sum(head_slopes, axis=0), "vocab embed")
    return (sums.cross_entropy + z_loss * sums.z, sums), (slopes, head_slope, like)


def _backward(ops: Ops, chunk: int, z_loss: float, saved: Any, cotangent: Any) -> tuple[Any, ...]:
    slopes, head_slope, like = saved
    scale, _ = cotangent  # the parts are for reading only
    return slopes * scale.astype(slopes.dtype), (head_slope * scale).astype(like.dtype), None, None


_token_loss.defvjp(_forward, _backward)


def _gathered(ops: Ops, head: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the output matrix as the products take it, with every device's whole width of its vocabulary."""
    return ops.constrain(head.astype(dtype), "vocab hidden")


def _zero() -> TokenSums:
    return TokenSums(*(jnp.zeros((), jnp.float32) for _ in TokenSums._fields))


def _cut(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cut [B, T, ...] arrays into [chunks, B, chunk, ...]; the padding has weight 0 in every array."""

    def cut(x: jax.Array) -> jax.Array:
        B, T = x.shape[:2]
        x = jnp.pad(x, ((0, 0), (0, -T % chunk), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)


def _chunk(
    ops: Ops, z_loss: float, head: jax.Array, x: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[TokenSums, jax.Array]:
    """Return a chunk's sums and the slope of its loss in its logits [B, c, V]."""
    x = ops.constrain(x, "head_batch head_length hidden")
    logits = ops.einsum("BTD,VD->BTV", x, head, out_dtype=jnp.float32)
    logits = ops.constrain(logits, "head_batch head_length vocab")
    at_target = lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    largest = jnp.max(logits, axis=-1)
    powers = jnp.exp(logits - largest[..., None])
    total = jnp.sum(powers, axis=-1)
    z = largest + jnp.log(total)
    wanted = jnp.sum(jnp.where(at_target, logits, 0), axis=-1)
    sums = TokenSums(
        jnp.sum(weights * (z - wanted)),
        jnp.sum(weights * jnp.square(z)),
        jnp.sum(jnp.where(wanted >= largest, weights, 0)),
    )
    soft = powers * (weights * (1 + 2 * z_loss * z) / total)[..., None]
    return sums, soft - jnp.where(at_target, weights[..., None], 0)


def load_balance(routing: Routing, tokens: jax.Array, *, counts: jax.Array | None) -> jax.Array:
    """Return the load-balancing loss of one micro-batch, its part of a step of `tokens` tokens; mean over the layers.

    E * sum_i f_i * P_i, f_i how often expert i was chosen per token (they sum to C), P_i the mean of its softmax; C at
    perfect balance. Gradients flow through P only. With `counts` [M, g, E] of the whole step, f is the whole step's:
    the global-batch loss of arXiv 2501.11873 §3, to which every micro-batch adds its own P. Without, each of the g
    groups has its own f, and groups weigh as their tokens.
    """
    E = routing.counts.shape[-1]
    own = jnp.maximum(routing.tokens, 1)[..., None]
    share = routing.counts / own if counts is None else counts / tokens
    each = E * jnp.sum(lax.stop_gradient(share) * routing.probabilities, axis=(1, 2)) / tokens
    return jnp.mean(each)


def expert_load(counts: jax.Array) -> jax.Array:
    """Return each expert's load relative to a fair share, 1 at perfect balance: [M, E] for counts [M, E]."""
    return counts / jnp.maximum(jnp.mean(counts, axis=-1, keepdims=True), jnp.float32(1e-30))

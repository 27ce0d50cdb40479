"""The arithmetic under the network: one signature each, several formulations, one obvious oracle.

`model.py` calls an `Ops`; which one is chosen once, by platform, when the model is built. `plain.ORACLE` says what is
meant; `plain.XLA` is the portable formulation; `cpu.CPU` is what XLA's CPU backend runs fast.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LayerCache = dict[str, jax.Array]


def top(x: jax.Array, k: int, count: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Return the k largest of x [B, V], descending, the first of equals first, and their indices [B, k] int32.

    What comes after the first `count` of a row counts as -inf.
    """
    x = first_of(x, count)
    # The barrier keeps XLA from fusing later slices into it, after which it would sort the vocabulary: 60 times slower.
    # One barrier each: XLA passes the pair on as a whole otherwise, and fails to compile it on a mesh (jaxlib 0.10.2).
    values, ids = jax.lax.top_k(x, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(ids)


def first_of(x: jax.Array, count: int | None) -> jax.Array:
    """Return x [B, V] with -inf behind the first `count` of a row; None keeps all."""
    if count is None or count >= x.shape[-1]:
        return x
    return jnp.where(jnp.arange(x.shape[-1]) < count, x, -jnp.inf)


def pick(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Return x [B, V] at ids [B], as [B, 1]."""
    return jnp.take_along_axis(x, ids[:, None], axis=-1, mode="promise_in_bounds")


class Blocks(NamedTuple):
    """The order in which the equal blocks of a prompt lie along the devices that split its length.

    A late token attends to more than an early one: with the first block a device gets the last, with the second the
    last but one, and so on.
    """

    order: tuple[int, ...]

    def arrange(self, x: jax.Array) -> jax.Array:
        """Return x [B, T, ...] in this order."""
        parts = jnp.split(x, len(self.order), axis=1)
        return jnp.concatenate([parts[i] for i in self.order], axis=1)

    def in_order(self, x: jax.Array) -> jax.Array:
        """Undo `arrange`."""
        return Blocks(self._places()).arrange(x)

    def place(self, at: jax.Array, length: int) -> jax.Array:
        """Return where in this order the tokens lie that are at `at` of a length."""
        size = length // len(self.order)
        return jnp.asarray(self._places(), jnp.int32)[at // size] * size + at % size

    def _places(self) -> tuple[int, ...]:
        return tuple(sorted(range(len(self.order)), key=self.order.__getitem__))


def _no_blocks(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> Any:
    raise NotImplementedError("only a formulation that orders blocks attends to them")


class Ops(NamedTuple):
    """One formulation of every operation that the network needs.

    Softmax is in float32 in every formulation. Axis letters: B batch, T query length, S cache slots, D hidden,
    N query heads, K kv heads, H head_dim, E experts, C experts per token, F expert width, R routed tokens.
    """

    einsum: Callable[..., jax.Array]
    """(spec, x, w, out_dtype=None): a linear layer; w is contracted over its trailing axes, which are x's trailing
    axes ("BTD,NHD->BTNH"). The result has x's dtype, or out_dtype, accumulated in float32 at least."""

    attend: Callable[..., jax.Array]
    """(q [B,T,N,H], k [B,S,K,H], v [B,S,K,H], segment_ids [B,S] | None, scale, start=0, *, span=None) -> [B,T,N,H]:
    causal by index, within equal segment ids. Query head n reads kv head n // (N/K). T = S, or q is the part of the
    queries that begins at index start (int32). `span` says that this device takes that many queries T at a time: it
    changes no result, only what a kernel states as its cost."""

    init_cache: Callable[..., LayerCache]
    """(batch, capacity, kv_heads, head_dim, dtype) -> one layer's empty cache; its arrays' layout is private."""

    update_cache: Callable[..., LayerCache]
    """(cache, k [B,T,K,H], v [B,T,K,H], start [B]) -> cache with row b's keys and values at slots start[b]..+T-1.
    The caller guarantees start + T <= capacity."""

    attend_cache: Callable[..., jax.Array]
    """(q [B,T,N,H], cache, positions [B,T], scale) -> [B,T,N,H]: a query at position p reads slots 0..p."""

    moe: Callable[..., jax.Array]
    """(x [R,D], weights [R,C], experts [R,C] int32, gate_proj [E,F,D], up_proj [E,F,D], down_proj [E,D,F], *,
    expected=None) -> [R,D]: the weighted sum of the chosen experts' SwiGLU outputs. Dropless, whatever the routing. An
    expert id of E or more means none: it adds nothing. `expected` is how many of the R*C routes probably name an
    expert; it may size buffers and changes no result. On TPU also turn=None, see `moe.grouped`."""

    cache_axes: dict[str, str]
    """The logical axis names of each array of a layer's cache, for its sharding."""

    constrain: Callable[[jax.Array, str], jax.Array] = lambda x, axes: x
    """(x, "batch stream hidden") -> x, laid out over the mesh by those logical axes; without a mesh x itself."""

    head_groups: int = 1
    """Over how many groups of devices a mesh divides the rows of "head_batch"."""

    embed: Callable[[jax.Array, jax.Array], jax.Array] = lambda table, tokens: table[tokens]
    """(table [V,D], tokens [B,T]) -> [B,T,D]: look tokens up."""

    top: Callable[..., tuple[jax.Array, jax.Array]] = top
    """(logits [B,V], k, count=None) -> the k largest, of the first `count` if given, and their ids [B,k]; on a mesh no
    device sees more than its vocabulary and a few."""

    pick: Callable[[jax.Array, jax.Array], jax.Array] = pick
    """(logits [B,V], ids [B]) -> [B,1]: the logits of these ids; on a mesh every device looks at its vocabulary."""

    blocks: Callable[[int, int], Blocks | None] = lambda batch, length: None
    """(B, T) -> the order in which a whole prompt goes through the layers; None is its own."""

    attend_blocks: Callable[..., Any] = _no_blocks
    """(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H], scale) -> what o_proj takes: q in the order of `blocks`, k and v in
    their own, with no segments."""

    weight_order: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """{a parameter's logical axes: its axes from the outermost in memory to the innermost}, for parameters that the
    steps of serving read best in another order than that of their shape; see `placement.formats`."""

    einsum_on_mesh: Callable[..., jax.Array] | None = None
    """What `einsum` is where the compiler partitions its arrays; None is the same."""

    spread: Callable[[jax.Array], Any] = lambda x: x
    """x [B,T,D] -> what the linear layers on it take: x itself, or on a mesh that splits the stream its `ring.Pieces`,
    sent once for all of them."""


def for_platform(platform: str) -> Ops:
    """Return the formulation for a JAX platform name ("cpu", "tpu", "gpu").

    Raises:
        ValueError: the platform has none.
    """
    if platform == "cpu":
        from qwen3_jax.ops.cpu import CPU

        return CPU
    if platform == "tpu":
        from qwen3_jax.ops.tpu import TPU

        return TPU
    if platform in ("gpu", "cuda"):
        from qwen3_jax.ops import moe_gpu
        from qwen3_jax.ops.plain import XLA

        return XLA._replace(moe=moe_gpu.moe)
    if platform == "rocm":
        from qwen3_jax.ops.plain import XLA

        return XLA
    raise ValueError(f"platform {platform!r} has no formulation of the network's operations; have cpu, tpu, gpu")

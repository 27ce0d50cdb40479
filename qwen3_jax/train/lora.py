"""Low-rank adapters (LoRA, arXiv 2106.09685): small trained leaves beside frozen weights, by PEFT's formula.

    y = W x + scale · B (A x),    A [r, in] drawn, B [out, r] zero, scale = alpha / r

`Lora` makes the trained tree, which holds {"a", "b"} where the model has a weight; `assemble` puts an `Adapted` leaf in
the place of each such weight, and nothing in the network changes: the linear layers of `adapted_ops` add the two small
products, and `merge_experts` adds them to the stacked weights of experts, which their operation takes whole. `merge`
adds them for good. The base may be any leaf that the ops understand, quantised ones included.

Letters: r rank, N heads, H head_dim, D hidden, F ffn width, E experts. Shapes are those of one layer; in the trained
tree layers are stacked as `stacked.stack` does it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax import model
from qwen3_jax.checkpoint import names
from qwen3_jax.checkpoint.names import Path
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model import Params
from qwen3_jax.ops import Ops, plain
from qwen3_jax.sharding import Rules
from qwen3_jax.train import stacked

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
TARGETS = (*ATTENTION, *FEED_FORWARD)
EXPERTS = ("each", "shared", "none")
OUT_AXES = {name: 2 if name in ("q_proj", "k_proj", "v_proj") else 1 for name in TARGETS}  # the other axes are inputs


class LoraError(ValueError):
    """Adapters that a model cannot have, or files of them that do not fit it."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which weights have adapters, and how large they are."""

    rank: int
    alpha: float
    """The products are scaled by alpha / rank."""
    targets: tuple[str, ...] = TARGETS
    """Linear layers by name: any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""
    experts: str = "each"
    """In MoE layers gate_proj, up_proj and down_proj adapt every expert by itself (each), all of a layer alike
    (shared), or not at all (none)."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise LoraError(f"lora.targets holds {unknown[0]!r}: use any of {', '.join(TARGETS)}")
        if len(set(self.targets)) != len(self.targets) or not self.targets:
            raise LoraError(f"lora.targets is {list(self.targets)}: name at least one, each once")
        if self.rank < 1:
            raise LoraError(f"lora.rank is {self.rank}: give at least 1")
        if self.experts not in EXPERTS:
            raise LoraError(f"lora.experts {self.experts!r} is unknown: use {', '.join(EXPERTS)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@partial(jax.tree_util.register_dataclass, data_fields=("base", "a", "b"), meta_fields=("scale",))
@dataclass(frozen=True)
class Adapted:
    """A weight with its adapter, in the weight's place."""

    base: Any
    a: Any
    b: Any
    scale: float

    def __getitem__(self, key: Any) -> "Adapted":
        """Return itself for [...], which is how the network reads a weight."""
        if key is not Ellipsis:
            raise TypeError("an adapted weight is read whole")
        return self


class Site(NamedTuple):
    """A weight that has an adapter; `a` and `b` are shapes, the axes are logical names and None for the rank."""

    path: Path
    a: tuple[int, ...]
    b: tuple[int, ...]
    a_axes: tuple[str | None, ...]
    b_axes: tuple[str | None, ...]

    @property
    def inputs(self) -> int:
        """How many inputs the linear layer has."""
        return math.prod(self.a[self.a_axes.index(None) + 1 :])


class Lora:
    """The adapters of one model. Raises LoraError if no weight would have one."""

    def __init__(self, config: LoraConfig, of: Qwen3Config):
        self.config, self.of = config, of
        self.sites = tuple(_sites(config, of))
        if not self.sites:
            raise LoraError(
                f"no weight has an adapter: lora.targets {list(config.targets)} with experts {config.experts!r} leaves"
                " none, name others"
            )

    def abstract(self, dtype: Any = jnp.float32) -> Params:
        """Return the trained tree as shapes."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), dtype))

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Draw A as PEFT does, uniform within 1/sqrt(in), and B zero: the model begins as its base."""
        tree: Params = {}
        for site, k in zip(self.sites, jax.random.split(key, len(self.sites)), strict=True):
            bound = site.inputs**-0.5
            a = jax.random.uniform(k, site.a, jnp.float32, -bound, bound)
            names.put(tree, site.path, {"a": a.astype(dtype), "b": jnp.zeros(site.b, dtype)})
        return stacked.stack(self.of, tree)

    def shardings(self, mesh: Mesh, rules: Rules) -> Params:
        """Return every leaf's sharding: its axes lie as the weight's do, the rank and the layers are whole."""

        def place(axes: tuple[str | None, ...]) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(None, *(rules[name] or None if name else None for name in axes)))

        tree: Params = {"layers": {}}
        for site in self.sites:
            if site.path[1] in stacked.runs(self.of):
                names.put(tree, site.path, {"a": place(site.a_axes), "b": place(site.b_axes)})
        return tree

    def assemble(self, adapters: Params, base: Params) -> Params:
        """Return the base's tree with an `Adapted` leaf where there is an adapter; both stacked, or both not."""

        def join(adapter: Any, base: Any) -> Any:
            if "a" in adapter:
                return Adapted(base, adapter["a"], adapter["b"], self.config.scale)
            return {key: join(adapter[key], leaf) if key in adapter else leaf for key, leaf in base.items()}

        return join(adapters, base)


def _sites(config: LoraConfig, of: Qwen3Config) -> Iterator[Site]:
    """Yield the weights that get an adapter, in the order of the name table."""
    axes = model.parameter_axes(of, ops=plain.XLA)
    for entry in names.table(of):
        name = str(entry.path[-1])
        if name not in config.targets or (entry.stacked and config.experts == "none"):
            continue
        shape, letters = entry.shape, tuple(names.get(axes, entry.path).split())
        experts, expert_letters = shape[: int(entry.stacked)], letters[: int(entry.stacked)]
        if config.experts == "shared":
            experts, expert_letters = (), ()
        shape, letters = shape[int(entry.stacked) :], letters[int(entry.stacked) :]
        out = OUT_AXES[name]
        yield Site(
            entry.path,
            (*experts, config.rank, *shape[out:]),
            (*experts, *shape[:out], config.rank),
            (*expert_letters, None, *letters[out:]),
            (*expert_letters, *letters[:out], None),
        )


def adapted_ops(ops: Ops) -> Ops:
    """Return the formulation whose linear layers honour `Adapted` weights."""

    def einsum(spec: str, x: Any, w: Any, out_dtype: Any = None) -> jax.Array:
        if not isinstance(w, Adapted):
            return ops.einsum(spec, x, w, out_dtype)
        batch, inner, outer = _split(spec)
        low = ops.einsum(f"{batch}{inner},R{inner}->{batch}R", x, w.a, jnp.float32)
        high = ops.einsum(f"{batch}R,{outer}R->{batch}{outer}", low, w.b, jnp.float32)
        out = ops.einsum(spec, x, w.base, out_dtype)
        return out + (high * jnp.float32(w.scale)).astype(out.dtype)

    return ops._replace(einsum=einsum)


def _split(spec: str) -> tuple[str, str, str]:
    """Take "BTD,NHD->BTNH" apart into batch "BT", inner "D" and outer "NH"."""
    x, w, out = spec.replace("->", ",").split(",")
    inner = "".join(letter for letter in x if letter in w)
    batch = x.removesuffix(inner)
    return batch, inner, out.removeprefix(batch)


def merge_experts(tree: Params, widen: Callable[[Any], jax.Array] = lambda base: base) -> Params:
    """Replace `Adapted` experts by plain arrays in the base's dtype: the `resolve` of a `stacked.Network`."""

    def one(path: Any, leaf: Any) -> Any:
        inside = any(getattr(key, "key", None) == "experts" for key in path)
        return summed(leaf, widen) if inside and isinstance(leaf, Adapted) else leaf

    return jax.tree.map_with_path(one, tree, is_leaf=lambda leaf: isinstance(leaf, Adapted))


def merge(tree: Params) -> Params:
    """Replace every `Adapted` leaf of an unstacked tree by the sum, added in float32, in the base's dtype."""
    is_leaf = lambda leaf: isinstance(leaf, Adapted)  # noqa: E731
    return jax.tree.map(lambda leaf: summed(leaf) if is_leaf(leaf) else leaf, tree, is_leaf=is_leaf)


def summed(leaf: Adapted, widen: Callable[[Any], jax.Array] = lambda base: base) -> jax.Array:
    """Return W + scale · B A. A leading axis of experts, where the adapters have one, is batch."""
    base = widen(leaf.base)
    a, b = jnp.asarray(leaf.a, jnp.float32), jnp.asarray(leaf.b, jnp.float32)
    if a.ndim == b.ndim == 3 and base.ndim == 3:  # one adapter per expert; o_proj and q_proj are 3 and 2
        delta = jnp.einsum("efr,erd->efd", b, a)
    else:
        delta = jnp.tensordot(b, a, 1)
        delta = delta if delta.ndim == base.ndim else delta[None]  # one adapter for all experts
    return (jnp.asarray(base, jnp.float32) + leaf.scale * delta).astype(base.dtype)

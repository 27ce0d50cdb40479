"""AdamW as training uses it: optax, a schedule, clipping, decay for matrices only, float32 master weights on request.

`Optimizer.init(params)` makes the state; `Optimizer.update(grads, state, params)` returns new parameters, the new state
and the learning rate that was applied. Everything is a pure function for the inside of the jitted step.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qwen3_jax.model import Params

SCHEDULES = ("constant", "cosine", "linear", "wsd")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate runs over the updates of a stage, or of the whole run."""

    kind: str = "cosine"
    """constant, cosine, linear, or wsd: warm-up, stable, decay by 1 - sqrt (arXiv 2405.18392)."""
    peak: float
    final: float = 0.0
    """Reached at the last update."""
    start: float = 0.0
    """Where warm-up begins."""
    warmup: int = 0
    """Updates until the peak."""
    decay: int = 0
    """wsd only: updates at the end over which it falls."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) and what surrounds it."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """For matrices; norm weights (and whatever else has one axis) do not decay."""
    decay_embeddings: bool = True
    """Whether embed_tokens and lm_head decay too."""
    clip: float = 1.0
    """Largest global norm of the gradients; 0 does not clip."""
    master: bool = False
    """Keep a float32 copy of lower-precision parameters and update that."""


class OptimizerError(ValueError):
    """Settings that make no schedule or optimiser."""


Schedule = Callable[[jax.Array], jax.Array]
"""Updates done, an int32 scalar → the learning rate of the next update, float32."""


def schedule(config: ScheduleConfig, updates: int) -> Schedule:
    """Return the learning rate as a function of the number of updates done, for `updates` in all.

    Raises:
        OptimizerError: an unknown kind, a value below zero, or phases longer than the stage.
    """
    if config.kind not in SCHEDULES:
        raise OptimizerError(f"schedule.kind {config.kind!r} is unknown: use {', '.join(SCHEDULES)}")
    for name in ("peak", "final", "start", "warmup", "decay"):
        if not (math.isfinite(value := getattr(config, name)) and value >= 0):
            raise OptimizerError(f"schedule.{name} is {value}: give a number of at least 0")
    if (config.kind == "wsd") != bool(config.decay):
        raise OptimizerError(f"schedule.decay is {config.decay}: kind wsd needs at least 1, {config.kind} was given")
    if config.warmup + config.decay > updates:
        raise OptimizerError(
            f"schedule.warmup {config.warmup} + decay {config.decay} = {config.warmup + config.decay} updates, the"
            f" stage has {updates}: shorten them"
        )
    decay = config.decay or max(updates - config.warmup, 1)
    peak, final = np.float32(config.peak), np.float32(config.final)

    def rate(done: jax.Array) -> jax.Array:
        done = done.astype(jnp.float32)
        warm = config.start + (peak - config.start) * done / max(config.warmup, 1)
        fallen = jnp.clip((done - (updates - decay)) / decay, 0, 1)
        left = {
            "constant": jnp.ones_like(fallen),
            "cosine": (1 + jnp.cos(np.pi * fallen)) / 2,
            "linear": 1 - fallen,
            "wsd": 1 - jnp.sqrt(fallen),
        }[config.kind]
        return jnp.where(done < config.warmup, warm, final + (peak - final) * left)

    return rate


def later(rate: Schedule, updates: int) -> Schedule:
    """Return a schedule that goes on where another one is after some updates."""
    return lambda done: rate(done + updates)


def one_after_another(rates: Sequence[tuple[Schedule, int]]) -> Schedule:
    """Join schedules, each with the updates that it lasts; the last one goes on."""

    def rate(done: jax.Array) -> jax.Array:
        value, begin = rates[0][0](done), 0
        for (_, count), (later, _) in itertools.pairwise(rates):
            begin += count
            value = jnp.where(done < begin, value, later(jnp.maximum(done - begin, 0)))
        return value

    return rate


def decays(params: Params, *, embeddings: bool) -> Any:
    """Return the tree of booleans: which parameters decay. Matrices do; norms and other vectors do not."""

    def one(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [str(key.key) for key in path]
        if not embeddings and names[-1] in ("embed_tokens", "lm_head"):
            return False
        axes = leaf.ndim - ("layers" in names)  # stacked
        return axes > 1 and not any("norm" in name for name in names)

    return jax.tree.map_with_path(one, params)


class Optimizer:
    """AdamW over a tree of parameters; see the module."""

    def __init__(self, config: OptimizerConfig, rate: Schedule):
        self.config, self.rate = config, rate
        mask: Any = functools.partial(decays, embeddings=config.decay_embeddings)
        self._transform = optax.chain(
            optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32),
            optax.add_decayed_weights(config.weight_decay, mask=mask),
        )

    def init(self, params: Params) -> dict[str, Any]:
        """Make the state: {"adam": …, "master": float32 copies (empty without `master`)}; moments are float32."""
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return {"adam": self._transform.init(wide), "master": wide if self.config.master else {}}

    def shardings(self, state: dict[str, Any], params: Any, whole: Any) -> dict[str, Any]:
        """Return the shardings of a state: each moment lies as its parameter does, scalars are `whole` everywhere."""
        adam = optax.tree_utils.tree_map_params(
            self._transform, lambda _, where: where, state["adam"], params, transform_non_params=lambda _: whole
        )
        return {"adam": adam, "master": params if self.config.master else {}}

    def update(
        self, grads: Params, state: dict[str, Any], params: Params, *, done: jax.Array, norm: jax.Array
    ) -> tuple[Params, dict[str, Any], jax.Array]:
        """Apply one update.

        Args:
            grads: of any float dtype.
            state: of `init`.
            params: what the gradients are of.
            done: int32 updates so far.
            norm: the global norm of the gradients.

        Returns:
            parameters in their own dtype, the new state, and the learning rate that was applied.
        """
        scale = jnp.float32(1)
        if self.config.clip:
            scale = jnp.minimum(scale, self.config.clip / jnp.maximum(norm, jnp.float32(1e-30)))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)
        wide = state["master"] if self.config.master else jax.tree.map(lambda p: p.astype(jnp.float32), params)
        rate = self.rate(done)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32
            directions, adam = self._transform.update(grads, state["adam"], wide)
        wide = jax.tree.map(lambda w, d: w - rate * d, wide, directions)
        params = jax.tree.map(lambda w, p: w.astype(p.dtype), wide, params)
        return params, {"adam": adam, "master": wide if self.config.master else {}}, rate

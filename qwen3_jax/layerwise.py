"""The steps of generation a few layers at a time: small programs, which the host runs one after the other.

`Steps` makes a program of a whole step, with the instructions of every layer in it. That suits accelerators, which the
host must not keep waiting. XLA's CPU compiler takes some 20 s and 0.2 GB for two such programs of Qwen3-0.6B, and keeps
the instructions as long as the program. Here layers share a program, `TOGETHER` in a row of the same kinds: for one
layer of this size, which takes some 3 ms, the start of a program of its own would cost another 0.2.

    step of tokens → residual stream → layers 0–3 → … → the last four, with their weights and caches → head → tokens

The same arithmetic in the same order as `Steps`; see there for the arguments and for what a row is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen3_jax import cache as caches
from qwen3_jax.cache import Cache
from qwen3_jax.model import Params, Pass, Taps, declare
from qwen3_jax.sampling import Rows, Sampler
from qwen3_jax.steps import CALL, Emitted, State, Steps, offset_of

TOGETHER = 4
Key = tuple[Any, ...]
Run = Callable[..., Any]
"""(key, function, args, donate=()) -> what the function returns, by a program compiled when its key is new."""


@dataclass(frozen=True, eq=False)
class Layerwise:
    """`start`, `extend` and `decode` of `Steps`, not to be jitted: they run programs, and wait where they must look."""

    steps: Steps
    run: Run

    def start(
        self, params: Params, tokens: np.ndarray, lengths: np.ndarray, *, key: Key, capacity: int
    ) -> tuple[Cache, jax.Array]:
        """Make a cache and run the first tokens of each prompt; see `Steps.start`."""
        cache, last = self.run(("empty", len(tokens), capacity), partial(self._empty, len(tokens), capacity), ())
        return self.extend(params, cache, last, tokens, lengths, np.int32(0), key=key, fresh=True)

    def extend(
        self,
        params: Params,
        cache: Cache,
        last: jax.Array,
        tokens: np.ndarray,
        lengths: np.ndarray,
        at: np.int32,
        *,
        key: Key,
        fresh: bool = False,
    ) -> tuple[Cache, jax.Array]:
        """Run the next part of the prompts, or with a `fresh` cache the first; see `Steps.extend`."""
        outer = _outer(params)
        x, *shared = self.run(("in", *tokens.shape), self._enter, (outer, tokens, at))
        key = ("fresh" if fresh else "more", *key)
        x, cache = self._layers(params, self._kinds(params), x, shared, cache, key=key, fresh=fresh)
        return cache, self.run(("out", *tokens.shape), self._leave, (outer, x, last, lengths, at))

    def decode(
        self,
        params: Params,
        cache: Cache,
        state: State,
        rows: Rows,
        halt: np.ndarray,
        count: np.int32,
        *,
        key: Key,
        sampler: Sampler,
    ) -> tuple[Cache, State, Emitted]:
        """Emit up to `count` tokens per row; see `Steps.decode`. Waits for each, to end when every row is done."""
        size, capacity, width = key
        outer = _outer(params)
        kinds = self._kinds(params)
        begin, leave = partial(self._begin, sampler), partial(self._leave_step, sampler)
        state, out = self.run(("begin", size, width, sampler), begin, (state, rows, halt), donate=(0,))
        for i in range(count):
            if np.all(state.done):
                break
            x, *shared = self.run(("step in", size), self._enter_step, (outer, state.token, state.position))
            x, cache = self._layers(params, kinds, x, shared, cache, key=("step", size, capacity), fresh=False)
            args = (outer, x, state, rows, out, np.int32(i))
            state, out = self.run(("step out", size, width, sampler), leave, args, donate=(2, 4))
        return cache, state, out

    def _kinds(self, params: Params) -> list[Key]:
        """Return what decides which layers share a program: what they are, and the dtypes that they lie in."""
        kinds = []
        for i in range(self.steps.config.num_hidden_layers):
            dtypes = tuple(leaf.dtype.name for leaf in jax.tree.leaves(params["layers"][i]))
            kinds.append((self.steps.config.is_moe_layer(i), dtypes))
        return kinds

    def _layers(
        self,
        params: Params,
        kinds: list[Key],
        x: jax.Array,
        shared: list[jax.Array],
        cache: Cache,
        *,
        key: Key,
        fresh: bool,
    ) -> tuple[jax.Array, Cache]:
        after: Cache = []
        groups = [tuple(kinds[at : at + TOGETHER]) for at in range(0, len(kinds), TOGETHER)]
        for i, group in enumerate(groups):
            first = groups.index(group) * TOGETHER
            at = slice(i * TOGETHER, i * TOGETHER + len(group))
            weights = [params["layers"][layer] for layer in range(at.start, at.stop)]
            function = partial(self._some, range(first, first + len(group)), fresh)
            x, some = self.run((*key, group), function, (weights, x, *shared, cache[at]), donate=(1, 5))
            after += some
        return x, after

    # What is compiled

    def _empty(self, batch: int, capacity: int) -> tuple[Cache, jax.Array]:
        steps = self.steps
        cache = caches.init(steps.config, batch=batch, capacity=capacity, dtype=steps.dtype, ops=steps.ops)
        return cache, jnp.zeros((batch, steps.config.hidden_size), steps.dtype)

    def _enter(self, outer: Params, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, ...]:
        positions = jnp.broadcast_to(at + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return self._entered(outer, tokens, positions)

    def _enter_step(self, outer: Params, token: jax.Array, position: jax.Array) -> tuple[jax.Array, ...]:
        return self._entered(outer, token[:, None], position[:, None])

    def _entered(self, outer: Params, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        shared = Pass.of(self.steps.config, positions, None)
        return self._model(outer).embedded(tokens), shared.cos, shared.sin, positions

    def _some(
        self,
        layers: range,
        fresh: bool,
        weights: list[Params],
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        positions: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        model = self._model({}, dict(zip(layers, weights, strict=True)))
        shared, after = Pass(cos, sin, positions, None, fresh=fresh), []
        for layer, before in zip(layers, cache, strict=True):
            x, mine = model.layers[layer](x, shared, before, Taps(), "")
            after.append(mine)
        return x, after

    def _leave(self, outer: Params, x: jax.Array, last: jax.Array, lengths: jax.Array, at: jax.Array) -> jax.Array:
        only, here = offset_of(lengths, at, x.shape[1])
        return jnp.where(here[:, None], self._model(outer).normed(x, only)[:, 0], last)

    def _begin(self, sampler: Sampler, state: State, rows: Rows, halt: jax.Array) -> tuple[State, Emitted]:
        return replace(state, done=state.done | halt), self.steps.nothing(sampler, state, rows, CALL)

    def _leave_step(
        self,
        sampler: Sampler,
        outer: Params,
        x: jax.Array,
        state: State,
        rows: Rows,
        out: Emitted,
        i: jax.Array,
    ) -> tuple[State, Emitted]:
        model = self._model(outer)
        state, emitted = self.steps.emit(sampler, model.logits(model.normed(x))[:, 0], state, rows)
        return state, jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), out, emitted)

    def _model(self, outer: Params, layers: Params | None = None) -> Any:
        """Return the network with these parameters, the others as shapes."""
        steps = self.steps
        _, shapes = declare(steps.config, dtype=steps.dtype, ops=steps.ops)
        return nnx.merge(steps.graphdef, {**shapes, **outer, "layers": {**shapes["layers"], **(layers or {})}})


def _outer(params: Params) -> Params:
    """Return the parameters that are in no layer."""
    return {name: value for name, value in params.items() if name != "layers"}

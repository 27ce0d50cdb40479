"""The jitted steps of generation: prefill, the first token, decode; policy-free, everything per row is an array.

    prefill(prompts) → cache, hidden of each row's last prompt token
    first(hidden) → state with one token per row
    decode(cache, state, n) → up to n more tokens per row, in one call

A row is described by `rows` (constant over a generation) and `State`; rows of a batch differ only in these arrays, so
one program serves every mixture of lengths, limits, seeds, stops and thinking budgets. Padding rows are born done.

The thinking budget (Qwen3's rule, quick start of the model's documentation): if the first `budget` tokens hold neither
the end of thinking nor a stop id, the ids of the stop text are emitted one by one in place of sampled tokens, then
sampling goes on. `stage` says where a row stands: 0 it may still think; 1..F the next forced id is
stop_text[stage - 1]; F + 1 it answers and nothing is ever forced.

Axis letters: B batch, T prompt tokens, S cache slots, D hidden, V vocabulary, M stop ids, F ids of the stop text.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwen3_jax import cache as caches
from qwen3_jax import sampling
from qwen3_jax.cache import Cache
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model import Params
from qwen3_jax.ops import Ops, paged
from qwen3_jax.sampling import Rows, Sampler

CALL = 32  # most tokens per row and decode call: the size of the output buffers
IDLE = -1  # in emitted tokens: the row was done before
BROKEN = -2  # in emitted tokens: the logits were not finite


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where each row stands; [B] each."""

    token: jax.Array  # int32, the last token emitted, not yet in the cache
    position: jax.Array  # int32, its position
    index: jax.Array  # int32, tokens generated so far
    stage: jax.Array  # int32, see the module docstring
    done: jax.Array  # bool
    history: sampling.History  # what penalties remember, [B, V]; empty without penalties


Emitted = dict[str, jax.Array]  # "token" [n, B], and what `sampling.logprobs` returns with a leading n


def emitted_ids(column: list[int]) -> tuple[list[int], bool]:
    """Return the ids among the tokens that one call emitted for a row, and whether its logits were not finite then."""
    if column[-1] >= 0:  # whoever is done stays so
        return column, False
    end = next(i for i, token in enumerate(column) if token < 0)
    return column[:end], column[end] == BROKEN


@dataclass(frozen=True, eq=False)
class Steps:
    """The functions to jit for one model; a program is one of them at given shapes and with a given `Sampler`."""

    graphdef: nnx.GraphDef[Any]
    config: Qwen3Config
    dtype: Any  # of activations
    ops: Ops
    stop_text: tuple[int, ...]  # forced when the thinking budget is spent; empty: the model does not think
    think_end: int  # id of </think>

    def start(self, params: Params, tokens: jax.Array, lengths: jax.Array, capacity: int) -> tuple[Cache, jax.Array]:
        """Make a cache of `capacity` slots and run the first T tokens of each prompt.

        Args:
            tokens: [B, T] int32, right-padded; T must not exceed the capacity.
            lengths: [B] int32, of the whole prompts.

        Returns:
            The cache, and hidden [B, D] of each row's last prompt token where it lies in this part.
        """
        batch = tokens.shape[0]
        cache = caches.init(self.config, batch=batch, capacity=capacity, dtype=self.dtype, ops=self.ops)
        last = jnp.zeros((batch, self.config.hidden_size), self.dtype)
        return self._prefill(params, cache, last, tokens, lengths, jnp.int32(0), fresh=True)

    def extend(
        self, params: Params, cache: Cache, last: jax.Array, tokens: jax.Array, lengths: jax.Array, at: jax.Array
    ) -> tuple[Cache, jax.Array]:
        """Run the next part of the prompts, tokens [B, T] from position `at` of every row; see `start`."""
        return self._prefill(params, cache, last, tokens, lengths, at, fresh=False)

    def _prefill(self, params, cache, last, tokens, lengths, at, *, fresh: bool):
        model = nnx.merge(self.graphdef, params)
        positions = jnp.broadcast_to(at + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        only, here = offset_of(lengths, at, tokens.shape[1])
        hidden, cache = model(tokens, positions=positions, cache=cache, fresh=fresh, only=only)
        return cache, jnp.where(here[:, None], hidden[:, 0], last)

    def first(
        self,
        params: Params,
        last: jax.Array,
        lengths: jax.Array,
        rows: Rows,
        history: sampling.History,
        sampler: Sampler,
    ) -> tuple[State, Emitted]:
        """Emit the first token of every row from hidden [B, D] of its last prompt token."""
        model = nnx.merge(self.graphdef, params)
        state = State(
            token=jnp.zeros_like(lengths),
            position=lengths - 1,
            index=jnp.zeros_like(lengths),
            stage=rows["stage"],
            done=rows["limit"] == 0,
            history=history,
        )
        state, emitted = self.emit(sampler, model.logits(last[:, None])[:, 0], state, rows)
        return state, jax.tree.map(lambda x: x[None], emitted)

    def decode(
        self,
        params: Params,
        cache: Cache,
        state: State,
        rows: Rows,
        halt: jax.Array,
        count: jax.Array,
        sampler: Sampler,
        *,
        most: int = CALL,
        table: jax.Array | None = None,
        known: jax.Array | None = None,
    ) -> tuple[Cache, State, Emitted]:
        """Emit up to `count` tokens per row; ends early when every row is done.

        Args:
            cache, state: donated.
            halt: [B] bool, rows that the host has ended (a stop string).
            count: int32, at most `most`; a value and not a shape, so that any number runs the same program.
            most: the size of the output buffers.
            table: [B, columns] int32, where the cache is in pages.
            known: [most, B] int32, tokens to emit in place of drawn ones; -1 draws.

        Returns:
            cache, state, and the emitted tokens [most, B], IDLE where nothing was emitted.
        """
        model = nnx.merge(self.graphdef, params)
        state = replace(state, done=state.done | halt)

        def more(carry) -> jax.Array:
            i, _, state, _ = carry
            return (i < count) & ~jnp.all(state.done)

        def step(carry):
            i, cache, state, out = carry
            hidden, cache = advance(model, cache, state, table)
            told = None if known is None else jax.lax.dynamic_index_in_dim(known, i, keepdims=False)
            state, emitted = self.emit(sampler, model.logits(hidden)[:, 0], state, rows, told)
            out = jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), out, emitted)
            return i + 1, cache, state, out

        out = self.nothing(sampler, state, rows, most)
        _, cache, state, out = jax.lax.while_loop(more, step, (jnp.int32(0), cache, state, out))
        return cache, state, out

    def nothing(self, sampler: Sampler, state: State, rows: Rows, most: int) -> Emitted:
        """Make the output buffers of a call, for at most so many tokens per row."""
        batch = state.token.shape[0]
        logits = jax.ShapeDtypeStruct((batch, self.config.vocab_size), jnp.float32)
        _, shapes = jax.eval_shape(lambda x, s: self.emit(sampler, x, s, rows), logits, state)
        out = jax.tree.map(lambda s: jnp.zeros((most, *s.shape), s.dtype), shapes)
        return {**out, "token": jnp.full((most, batch), IDLE, jnp.int32)}

    def grow(self, cache: Cache, batch: int, capacity: int) -> Cache:
        """Copy a cache into an empty one of more slots, whatever the layout of its arrays."""
        wider = caches.init(self.config, batch=batch, capacity=capacity, dtype=self.dtype, ops=self.ops)
        return jax.tree.map(lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim), wider, cache)

    def emit(
        self, sampler: Sampler, logits: jax.Array, state: State, rows: Rows, known: jax.Array | None = None
    ) -> tuple[State, Emitted]:
        """Turn logits [B, V] into each row's next token, unless `known` [B] holds one; advance its state."""
        token = sampling.sample(sampler, logits, rows, state.index, state.history, ops=self.ops)
        broken = token < 0
        if known is not None:
            token = jnp.where((known >= 0) & ~broken, known, token)
        answering = len(self.stop_text) + 1
        stage = jnp.where((state.stage == 0) & (state.index >= rows["budget"]), 1, state.stage)
        forced = (stage > 0) & (stage < answering) & ~broken
        if self.stop_text:
            ids = jnp.asarray(self.stop_text, jnp.int32)
            token = jnp.where(forced, ids[jnp.clip(stage - 1, 0, len(self.stop_text) - 1)], token)
        stops = jnp.any(token[:, None] == rows["stop_ids"], axis=-1)
        closes = (stage == 0) & ((token == self.think_end) | stops)
        stage = jnp.where(forced, stage + 1, jnp.where(closes, answering, stage))
        active = ~state.done
        emitted = {"token": jnp.where(active, jnp.where(broken, BROKEN, token), IDLE)}
        emitted |= sampling.logprobs(sampler, logits, token, ops=self.ops)
        one = active.astype(jnp.int32)
        index = state.index + one
        state = State(
            token=jnp.where(active & ~broken, token, state.token),
            position=state.position + one,
            index=index,
            stage=jnp.where(active, stage, state.stage),
            done=state.done | broken | stops | (index >= rows["limit"]),
            history=sampling.remember(state.history, jnp.maximum(token, 0), active),
        )
        return state, emitted


def offset_of(lengths: jax.Array, at: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return where among `count` tokens from `at` the prompts' last ones are [B], and whether they are there [B]."""
    offset = lengths - 1 - at
    return jnp.clip(offset, 0, count - 1), (offset >= 0) & (offset < count)


def advance(model: Any, cache: Cache, state: State, table: jax.Array | None) -> tuple[jax.Array, Cache]:
    """Run each row's last token; returns hidden [B, 1, D] and the cache.

    In a cache of pages a row that is done stands at position 0 of the scratch page, so that it touches nothing that
    may belong to others by now, and the rest does not wait for its length.
    """
    token, position = state.token, state.position
    if table is None:
        return model(token[:, None], positions=position[:, None], cache=cache)
    scratch = cache[0]["k"].shape[1] - 1
    token, position = (jnp.where(state.done, 0, x) for x in (token, position))
    table = jnp.where(state.done[:, None], scratch, table)
    hidden, cache = model(token[:, None], positions=position[:, None], cache=paged.opened(cache, table))
    return hidden, paged.closed(cache)

"""The arithmetic of an engine: a few programs over all rows, compiled before the first request and never after.

    prefill(tokens of one sequence) → pages written, hidden of its tokens
    score(hidden, the tokens that follow) → log-probabilities of a prompt
    join(hidden of the last prompt token) → the first token; the sequence takes a row of the device state
    decode(n) → up to n tokens of every active row, in one call
    forward() → logits, then draw(logits, masks) → one token: decode in two, so that the host can compute which tokens
        a grammar allows while the device runs the network

What a row is lies on the device, in `Rows` and `State`, and is replaced when a sequence joins. Rows that are not active
in a call stay as they are: they may be empty, or wait for the host.

Axis letters: B rows, T tokens of a chunk, D hidden, V vocabulary, W = ceil(V/32), M stop ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qwen3_jax import sampling
from qwen3_jax.cache import Cache
from qwen3_jax.model import Params
from qwen3_jax.ops import paged
from qwen3_jax.request import Request
from qwen3_jax.sampling import GREEDY_BELOW, Rows, Sampler
from qwen3_jax.sampling_params import LOGPROBS, SamplingParams
from qwen3_jax.steps import Emitted, State, Steps, advance

STOP_IDS = 32  # most ids that end one row on the device
DECODES = ("greedy", "bounded", "all")  # from the cheapest on; each does what those before it do
SCORED = 128  # tokens whose log-probabilities are computed at a time: [SCORED, V] float32

Edits = dict[str, jax.Array]  # "bias" [B, V] float32, and `sampling.History`; empty in programs that do without
Seat = dict[str, np.ndarray]  # what one sequence brings along, each with a leading axis of 1


@dataclass(frozen=True, eq=False)
class Programs:
    """The functions to jit for one engine; `sampler` is static in each."""

    steps: Steps
    prompts: nnx.GraphDef[Any]  # the network as a prefill runs it: on a mesh, with its activations split otherwise
    most: int  # most tokens per row and decode call
    chunk: int  # most tokens per prefill call

    def prefill(
        self, params: Params, cache: Cache, table: jax.Array, tokens: jax.Array, start: jax.Array, length: jax.Array
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """Run tokens [1, T], right-padded, from position start [1], a multiple of the page.

        Returns:
            the cache (donated), hidden [`chunk`, D], and hidden [1, D] of the last of `length` [1] tokens.
        """
        model = nnx.merge(self.prompts, params)
        positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        hidden, layers = model(tokens, positions=positions, cache=paged.opened(cache, table))
        last = jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)[:, 0]
        return paged.closed(layers), jnp.pad(hidden[0], ((0, self.chunk - tokens.shape[1]), (0, 0))), last

    def score(self, params: Params, hidden: jax.Array, targets: jax.Array, *, sampler: Sampler) -> Emitted:
        """Return the log-probabilities of targets [T] after hidden [T, D]; see `sampling.logprobs`."""
        model = nnx.merge(self.steps.graphdef, params)
        parts = []
        for at in range(0, hidden.shape[0], SCORED):
            logits = model.logits(hidden[None, at : at + SCORED])[0]
            parts.append(sampling.logprobs(sampler, logits, targets[at : at + SCORED], ops=self.steps.ops))
        return jax.tree.map(lambda *part: jnp.concatenate(part), *parts)

    def join(
        self,
        params: Params,
        hidden: jax.Array,
        state: State,
        rows: Rows,
        edits: Edits,
        tables: jax.Array,
        row: jax.Array,
        seat: Rows,
        *,
        sampler: Sampler,
    ) -> tuple[State, Rows, Edits, jax.Array, Emitted]:
        """Draw a sequence's next token from hidden [1, D] and give it a row.

        Args:
            state, rows, edits: donated, as are
            tables: [B, columns] int32, the pages of every row.
            row: int32.
            seat: of `seat`; with edits also "bias", "prompt", "counts" [1, V] and "allowed" [1, W].

        Returns:
            state, rows, edits, tables, and what was emitted, [1, 1] each.
        """
        model = nnx.merge(self.steps.graphdef, params)
        history = {name: seat[name] for name in ("prompt", "counts")} if sampler.edits else {}
        one = State(
            token=jnp.zeros_like(seat["position"]),
            position=seat["position"],
            index=seat["index"],
            stage=seat["stage"],
            done=jnp.zeros_like(seat["position"], jnp.bool_),
            history=history,
        )
        one, emitted = self.steps.emit(sampler, model.logits(hidden[:, None])[:, 0], one, seat, seat["known"])

        def put(all: jax.Array, new: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(all, new.astype(all.dtype), row, axis=0)

        if sampler.edits:
            edits = jax.tree.map(put, edits, {"bias": seat["bias"], **one.history})
        state = jax.tree.map(put, state, replace(one, history={}))
        rows = {name: put(rows[name], jnp.asarray(seat[name])) for name in rows}
        return state, rows, edits, put(tables, seat["table"]), jax.tree.map(lambda x: x[None], emitted)

    def decode(
        self,
        params: Params,
        cache: Cache,
        state: State,
        edits: Edits,
        tables: jax.Array,
        rows: Rows,
        growth: jax.Array,
        active: jax.Array,
        count: jax.Array,
        known: jax.Array,
        *,
        sampler: Sampler,
    ) -> tuple[Cache, State, Edits, jax.Array, Emitted]:
        """Emit up to `count` tokens per active [B] row; cache, state, edits and tables are donated and returned.

        Args:
            tables: [B, columns] int32, to which
            growth: [B, n, 2] int32 adds columns and their pages; -1 adds nothing.
            count, known: see `Steps.decode`.
        """
        tables = grown(tables, growth)
        before, rows = _with_edits(state, rows, edits)
        cache, after, out = self.steps.decode(
            params, cache, before, rows, ~active, count, sampler, most=self.most, table=tables, known=known
        )
        state, edits = _without_edits(state, after, active, edits)
        return cache, state, edits, tables, out

    def forward(
        self,
        params: Params,
        cache: Cache,
        tables: jax.Array,
        state: State,
        growth: jax.Array,
        active: jax.Array,
        count: jax.Array,
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """Run the last token of every active row; returns cache and tables (donated), and logits [B, V].

        Args:
            count: int32, one, which the compiler must not know. The same code of the network as in `decode`, to the
                last bit, takes the same surroundings: a loop of unknown length in which each round depends on the one
                before. As a step by itself, or with a part moved in front of the loop, sums were taken in other orders.
        """
        model = nnx.merge(self.steps.graphdef, params)
        tables = grown(tables, growth)
        state = replace(state, done=state.done | ~active)

        def step(carry: tuple[jax.Array, Cache, State, jax.Array]) -> tuple[jax.Array, Cache, State, jax.Array]:
            i, cache, state, _ = carry
            hidden, cache = advance(model, cache, state, tables)
            logits = model.logits(hidden)[:, 0]
            next = jnp.where(jnp.isnan(logits[:, 0]), 0, state.token)
            return i + 1, cache, replace(state, token=next, position=state.position + 1), logits

        logits = jnp.zeros((state.token.shape[0], self.steps.config.vocab_size), jnp.float32)
        carry = (jnp.int32(0), cache, state, logits)
        _, cache, _, logits = lax.while_loop(lambda carry: carry[0] < count, step, carry)
        return cache, tables, logits

    def draw(
        self,
        logits: jax.Array,
        state: State,
        edits: Edits,
        rows: Rows,
        active: jax.Array,
        known: jax.Array,
        answers: jax.Array,
        allowed: jax.Array,
        *,
        sampler: Sampler,
    ) -> tuple[State, Edits, Emitted]:
        """Draw one token per active row from logits [B, V]; state and edits are donated.

        Args:
            known: [B] int32, tokens to take instead; -1 draws.
            answers: [B] bool, rows whose thinking is over, whatever their stage says.
            allowed: [B, W] uint32, the bits of the ids that may be drawn.
        """
        before, rows = _with_edits(state, rows, edits)
        stage = jnp.where(answers, len(self.steps.stop_text) + 1, state.stage)
        before = replace(before, done=before.done | ~active, stage=stage)
        after, emitted = self.steps.emit(sampler, logits, before, {**rows, "allowed": allowed}, known)
        state, edits = _without_edits(state, after, active, edits)
        return state, edits, jax.tree.map(lambda x: x[None], emitted)

    def scrub(self, cache: Cache, table: jax.Array) -> Cache:
        """Fill the pages of a row's table [columns] with zeros; the cache is donated."""
        return paged.scrubbed(cache, table)


def grown(tables: jax.Array, growth: jax.Array) -> jax.Array:
    """Write pages into their columns; a scatter would go through the rows one by one on a CPU."""
    columns = jnp.arange(tables.shape[1])
    for i in range(growth.shape[1]):
        tables = jnp.where(columns == growth[:, i, :1], growth[:, i, 1:], tables)
    return tables


def _with_edits(state: State, rows: Rows, edits: Edits) -> tuple[State, Rows]:
    if not edits:
        return state, rows
    history = {name: edits[name] for name in ("prompt", "counts")}
    return replace(state, history=history), {**rows, "bias": jnp.where(rows["edited"][:, None], edits["bias"], 0)}


def _without_edits(before: State, after: State, active: jax.Array, edits: Edits) -> tuple[State, Edits]:
    state = replace(after, done=jnp.where(active, after.done, before.done), history={})
    return state, {"bias": edits["bias"], **after.history} if edits else {}


# What the host prepares


def program_for(params: SamplingParams, *, tokens: int) -> str:
    """Return the name of the cheapest program that does what a row asks for, see `samplers`."""
    sampler = Sampler.of([params], tokens=tokens)
    plain = not sampler.edits and sampler.logprobs is None
    return sampler.draw if plain and sampler.draw in DECODES else "all"


def samplers(*, tokens: int) -> dict[str, Sampler]:
    """Return the static half of every program, by name: few, since each costs its compilation.

    "greedy" and "bounded" decode, "whole" draws a first token; "all" does everything that a row can ask for.
    """
    plain = {draw: Sampler(draw, False, None, tokens) for draw in ("greedy", "bounded", "whole")}
    return {**plain, "all": Sampler("whole", True, LOGPROBS, tokens)}


def seat(
    steps: Steps,
    request: Request,
    output: Sequence[int],
    *,
    target: int,
    index: int,
    known: int,
    sampler: Sampler,
    allowed: np.ndarray | None,
    table: np.ndarray,
) -> Seat:
    """Lay out what a sequence brings to its row.

    Args:
        output: the tokens it has already.
        target: positions that are in the cache; the next token's position.
        index: of the token that is drawn.
        known: that token, or -1.
        sampler: the program it joins by.
        allowed: [W] uint32 for that token; None allows all.
        table: [columns] int32, its pages.
    """
    V = steps.config.vocab_size
    params = request.params
    if params.temperature < GREEDY_BELOW:
        params = params.replace(top_k=0, top_p=1.0, min_p=0.0)  # greedy rows must not cost the others a search
    full = replace(sampler, edits=True)
    out = full.rows([params], seeds=[request.seed], stop_ids=[request.stop_ids], batch=1, vocab_size=V)
    bias, ids = out.pop("bias"), out["stop_ids"]
    out["stop_ids"] = np.full((1, STOP_IDS), -1, np.int32)
    out["stop_ids"][0, : ids.shape[1]] = ids[0, :STOP_IDS]
    out["edited"] = np.array([Sampler.of([params], tokens=sampler.tokens).edits])
    out["limit"] = np.array([request.limit], np.int32)
    stage, budget = thinking(steps, request)
    for i in range(index):
        stage = stage_after(steps, request, stage, budget, i, output[i])
    out["budget"] = np.array([budget], np.int32)
    out["stage"] = np.array([stage], np.int32)
    out["position"] = np.array([target - 1], np.int32)
    out["index"] = np.array([index], np.int32)
    out["known"] = np.array([known], np.int32)
    out["table"] = table[None]
    if sampler.edits:
        history = sampler.history([request.prompt], batch=1, vocab_size=V)
        np.add.at(history["counts"][0], np.asarray(output[:index], np.int64), 1)
        out |= {"bias": bias, **history}
        out["allowed"] = np.full((1, -(-V // 32)), 0xFFFFFFFF, np.uint32) if allowed is None else allowed[None]
    return out


def row_names(seat: Seat) -> list[str]:
    """Return which entries of a seat stay in the row."""
    passing = {"stage", "position", "index", "known", "bias", "prompt", "counts", "allowed", "table"}
    return sorted(set(seat) - passing)


def thinking(steps: Steps, request: Request) -> tuple[int, int]:
    """Return the stage that a request's reply begins in, and its thinking budget; see `steps`."""
    answering, never = len(steps.stop_text) + 1, int(np.iinfo(np.int32).max)
    if not (request.thinks and steps.stop_text):
        return answering, never
    budget = request.params.thinking_budget
    return 0, never if budget is None else max(0, budget - request.thought)


def stage_after(steps: Steps, request: Request, stage: int, budget: int, index: int, token: int) -> int:
    """Return the stage after output token `index`: on the host what `Steps.emit` does on the device."""
    answering = len(steps.stop_text) + 1
    if stage == 0 and index >= budget:
        stage = 1
    if 0 < stage < answering:
        return stage + 1
    return answering if token == steps.think_end or token in request.stop_ids else stage

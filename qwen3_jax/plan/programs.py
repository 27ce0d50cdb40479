"""The programs that a plan compiles: the project's own jitted steps, lowered over a mesh without any array.

config, mesh, shapes → abstract parameters, cache and rows with their shardings → a method of `steps.Steps` per phase →
`jax.stages.Lowered`. This is the one place where planning touches the model.
"""

import functools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax import cache as caches
from qwen3_jax import model as models
from qwen3_jax import placement, sharding
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import Ops, plain
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.sampling import Sampler
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.steps import Steps


class Phase(NamedTuple):
    """A step of serving: the method of `Steps`, and the table of `sharding.RULES` it runs under."""

    step: str
    rules: str
    donates: tuple[int, ...] = ()


PHASES = {
    # whole prompts into a new cache, up to each row's last hidden state
    "prefill": Phase("start", "prefill"),
    # the head and the draw of each prompt's first token
    "first": Phase("first", "prefill"),
    # one token per row with a full cache: one round of the step's loop
    "decode": Phase("decode", "serve", donates=(1, 2)),
}
SAMPLING = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
"""What the released models recommend, thinking."""
STOP_IDS = (151645, 151643)


def programs(
    config: Qwen3Config,
    mesh: Mesh,
    *,
    ops: Ops,
    dtype: str,
    batch: int,
    context: int,
    phases: tuple[str, ...] = tuple(PHASES),
    sampling: SamplingParams = SAMPLING,
) -> dict[str, jax.stages.Lowered]:
    """Lower the steps of serving.

    Args:
        config: the model.
        mesh: over the devices to compile for, axes as in `sharding.AXES`.
        ops: the formulation, for one device.
        dtype: of weights, activations and cache.
        batch: rows of a decode step. A prefill runs `prefill_rows` of them at a time.
        context: slots of the cache, and tokens per row of a prefill.
        phases: keys of `PHASES`.
        sampling: what every row asks for.

    Returns:
        For each phase its lowered program. What a step consumes is donated.
    """
    shape = (jnp.dtype(dtype), batch, context, sampling)
    return {phase: _lower(PHASES[phase], config, mesh, ops, *shape) for phase in phases}


def rows_of(phase: str, sizes: dict[str, int], batch: int) -> int:
    """Return the rows of one step: all of the batch in decode, in a prefill as many as the mesh splits it into."""
    if PHASES[phase].rules == "serve":
        return batch
    return min(batch, math.prod(sizes[axis] for axis in sharding.RULES["prefill"]["batch"]))


def _lower(
    phase: Phase,
    config: Qwen3Config,
    mesh: Mesh,
    ops: Ops,
    dtype: jnp.dtype,
    batch: int,
    context: int,
    sampling: SamplingParams,
) -> jax.stages.Lowered:
    rules = sharding.RULES[phase.rules]
    config = placement.for_mesh(config, mesh, rules)
    ops = on_mesh(ops, mesh, rules)
    graphdef, params = models.declare(config, dtype=dtype, ops=ops)
    steps = Steps(graphdef, config, dtype, ops, stop_text=(), think_end=-1)
    B = batch if phase.rules == "serve" else min(batch, math.prod(mesh.shape[axis] for axis in rules["batch"]))
    sampler = Sampler.of([sampling] * B, tokens=config.vocab_size)
    rows = _rows(sampler, [sampling] * B, config.vocab_size)
    history = sampler.history([[]] * B, batch=B, vocab_size=config.vocab_size)
    cache = jax.eval_shape(lambda: caches.init(config, batch=B, capacity=context, dtype=dtype, ops=ops))

    whole = NamedSharding(mesh, PartitionSpec())  # rows and state: a few bytes that every device needs
    caches_at = sharding.shardings([ops.cache_axes] * config.num_hidden_layers, mesh, rules)
    params = placement.abstract(params, config, mesh, rules, ops=ops)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=whole)
    hidden = jax.ShapeDtypeStruct((B, config.hidden_size), dtype, sharding=whole)
    first = functools.partial(steps.first, sampler=sampler)
    state, _ = jax.eval_shape(first, params, hidden, lengths, rows, history)
    state, rows, history = (
        jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), t)
        for t in (state, rows, history)
    )
    if phase.step == "start":
        tokens = jax.ShapeDtypeStruct((B, context), jnp.int32, sharding=whole)
        function, arguments = functools.partial(steps.start, capacity=context), (params, tokens, lengths)
        results = (caches_at, whole)
    elif phase.step == "first":
        function, arguments, results = first, (params, hidden, lengths, rows, history), whole
    else:
        halt = jax.ShapeDtypeStruct((B,), jnp.bool_, sharding=whole)
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        function = functools.partial(steps.decode, sampler=sampler)
        arguments = (params, _placed(cache, caches_at), state, rows, halt, count)
        results = (caches_at, whole, whole)
    jitted = jax.jit(function, donate_argnums=phase.donates, out_shardings=results)
    with jax.set_mesh(mesh):
        return jitted.lower(*arguments)


def _rows(sampler: Sampler, params: list[SamplingParams], vocab_size: int) -> dict[str, Any]:
    """Lay out the rows of a batch as `runner.Batch` does: shapes are all that counts."""
    B = len(params)
    rows = sampler.rows(params, seeds=[0] * B, stop_ids=[STOP_IDS] * B, batch=B, vocab_size=vocab_size)
    return rows | {name: np.zeros(B, np.int32) for name in ("limit", "stage", "budget")}


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)


@lru_cache(maxsize=8)
def _declared(config: Qwen3Config, dtype: str) -> tuple[Any, Any]:
    """Return the abstract parameters and their axes; which formulation computes with them does not matter here."""
    _, abstract = models.declare(config, dtype=jnp.dtype(dtype), ops=plain.XLA)
    return abstract, models.parameter_axes(config, ops=plain.XLA)


def bytes_per_device(
    config: Qwen3Config, sizes: dict[str, int], *, ops: Ops, dtype: str, batch: int, context: int, rules: str = "serve"
) -> tuple[int, int]:
    """Count the bytes of weights and of cache that each device holds, by arithmetic on the abstract trees.

    Args:
        sizes: of the mesh axes, see `sharding.parse_mesh`.
        rules: which table of `sharding.RULES`.
    """
    table = sharding.RULES[rules]
    abstract, axes = _declared(config, dtype)
    cache = jax.eval_shape(lambda: caches.init(config, batch=batch, capacity=context, dtype=jnp.dtype(dtype), ops=ops))

    def local(shape: jax.ShapeDtypeStruct, names: str) -> int:
        amount = shape.dtype.itemsize
        for size, ways in zip(shape.shape, sharding.spec(names, table), strict=True):
            split = 1
            for axis in (ways,) if isinstance(ways, str) else ways or ():
                split *= sizes[axis]
            amount *= -(-size // split)  # fewer kv heads than devices: each holds a copy of one
        return amount

    weights = sum(jax.tree.leaves(jax.tree.map(local, abstract, axes)))
    slots = sum(jax.tree.leaves(jax.tree.map(local, cache, [ops.cache_axes] * config.num_hidden_layers)))
    return weights, slots

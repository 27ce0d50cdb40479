"""The programs that a plan compiles: the project's own prefill and decode, lowered over a mesh without any array.

config, mesh, shapes → abstract parameters and cache with their shardings → `programs` → `jax.stages.Lowered` per phase.
This is the one place where planning touches the model.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax import cache as caches
from qwen3_jax import model as models
from qwen3_jax import sampling, sharding
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import Ops, plain
from qwen3_jax.ops.mesh import on_mesh

PHASES = ("prefill", "decode")
RULES = {"prefill": "prefill", "decode": "serve"}
"""Which table of `sharding.RULES` each phase runs under."""


def programs(
    config: Qwen3Config,
    mesh: Mesh,
    *,
    ops: Ops,
    dtype: str,
    batch: int,
    context: int,
    phases: tuple[str, ...] = PHASES,
) -> dict[str, jax.stages.Lowered]:
    """Lower the steps of serving.

    Args:
        config: the model.
        mesh: over the devices to compile for, axes as in `sharding.AXES`.
        ops: the formulation, for one device.
        dtype: of weights, activations and cache.
        batch: rows of a decode step. A prefill runs `prefill_rows` of them at a time.
        context: slots of the cache, and tokens per row of a prefill.

    Returns:
        For each phase its lowered program: "prefill" of whole prompts into an empty cache up to each row's first token,
        "decode" of one token per row with a full cache. The cache is donated.
    """
    return {phase: _lower(phase, config, mesh, ops, jnp.dtype(dtype), batch, context) for phase in phases}


def prefill_rows(mesh: Mesh, batch: int) -> int:
    """Return how many prompts one prefill step runs: as many as the mesh splits the batch into."""
    rules = sharding.RULES[RULES["prefill"]]
    ways = 1
    for axis in rules["batch"]:
        ways *= mesh.shape[axis]
    return min(ways, batch)


def _lower(
    phase: str, config: Qwen3Config, mesh: Mesh, ops: Ops, dtype: jnp.dtype, batch: int, context: int
) -> jax.stages.Lowered:
    rules = sharding.RULES[RULES[phase]]
    ops = on_mesh(ops, mesh, rules)
    graphdef, abstract = models.declare(config, dtype=dtype, ops=ops)
    rows = batch if phase == "decode" else prefill_rows(mesh, batch)
    cache = jax.eval_shape(lambda: caches.init(config, batch=rows, capacity=context, dtype=dtype, ops=ops))
    placed = {
        "params": sharding.shardings(models.parameter_axes(config, ops=ops), mesh, rules),
        "cache": sharding.shardings([ops.cache_axes] * config.num_hidden_layers, mesh, rules),
        "tokens": NamedSharding(mesh, sharding.spec("batch length", rules)),
        "row": NamedSharding(mesh, sharding.spec("batch", rules)),
    }
    sampler = sampling.Sampler(draw="greedy", edits=False, logprobs=None, tokens=config.vocab_size)

    def token(model: models.Qwen3, hidden: jax.Array) -> jax.Array:
        index = jnp.zeros(hidden.shape[:1], jnp.int32)
        return sampling.sample(sampler, model.logits(hidden)[:, 0], {}, index, {})

    def prefill(params: Any, cache: Any, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(context, dtype=jnp.int32), tokens.shape)
        hidden, cache = model(tokens, positions=positions, cache=cache, fresh=True)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        return token(model, last), cache

    def decode(params: Any, cache: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params)
        hidden, cache = model(tokens, positions=positions[:, None], cache=cache)
        return token(model, hidden), cache

    step = decode if phase == "decode" else prefill
    length = 1 if phase == "decode" else context
    arguments = (
        _placed(abstract, placed["params"]),
        _placed(cache, placed["cache"]),
        jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=placed["tokens"]),
        jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=placed["row"]),
    )
    jitted = jax.jit(step, donate_argnums=1, out_shardings=(placed["row"], placed["cache"]))
    with jax.set_mesh(mesh):
        return jitted.lower(*arguments)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)


@lru_cache(maxsize=8)
def _declared(config: Qwen3Config, dtype: str) -> tuple[Any, Any]:
    """Return the abstract parameters and their axes; which formulation computes with them does not matter here."""
    _, abstract = models.declare(config, dtype=jnp.dtype(dtype), ops=plain.XLA)
    return abstract, models.parameter_axes(config, ops=plain.XLA)


def bytes_per_device(
    config: Qwen3Config, sizes: dict[str, int], *, ops: Ops, dtype: str, batch: int, context: int
) -> tuple[int, int]:
    """Count the bytes of weights and of cache that each device holds, by arithmetic on the abstract trees.

    Args:
        sizes: of the mesh axes, see `sharding.parse_mesh`.
    """
    rules = sharding.RULES[RULES["decode"]]
    abstract, axes = _declared(config, dtype)
    cache = jax.eval_shape(lambda: caches.init(config, batch=batch, capacity=context, dtype=jnp.dtype(dtype), ops=ops))

    def local(shape: jax.ShapeDtypeStruct, names: str) -> int:
        amount = shape.dtype.itemsize
        for size, ways in zip(shape.shape, sharding.spec(names, rules), strict=True):
            split = 1
            for axis in (ways,) if isinstance(ways, str) else ways or ():
                split *= sizes[axis]
            amount *= -(-size // split)
        return amount

    weights = sum(jax.tree.leaves(jax.tree.map(local, abstract, axes)))
    slots = sum(jax.tree.leaves(jax.tree.map(local, cache, [ops.cache_axes] * config.num_hidden_layers)))
    return weights, slots


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())

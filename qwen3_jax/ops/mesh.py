"""The same operations on a device mesh: layout hints for the compiler, and the experts as an island of our own.

`on_mesh(ops, mesh, rules)` wraps a formulation. Linear layers stay as they are and get layout constraints: the compiler
partitions them well. Attention and the cache run under `jax.shard_map`, each device on its own rows and heads, because
a kernel sees one device's arrays; so do the experts: which device holds a row's expert is known only at run time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.ops import LayerCache, Ops, moe_parallel
from qwen3_jax.sharding import Rules, spec


def on_mesh(ops: Ops, mesh: Mesh, rules: Rules, *, experts: str | None = None) -> Ops:
    """Return a formulation whose activations, cache and experts are laid out over the mesh by the rules.

    Args:
        ops: what runs on each device.
        mesh: the devices.
        rules: which mesh axes split which logical axis.
        experts: the algorithm of the MoE layers, one of `moe_parallel.ALGORITHMS`; None leaves it to
            `moe_parallel.choose`, layer by layer.
    """
    place = moe_parallel.island(mesh.shape, rules)
    platform = mesh.devices.flat[0].platform
    algorithm = experts

    def constrain(x: jax.Array, axes: str) -> jax.Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, rules)))

    def moe(
        x: jax.Array,
        weights: jax.Array,
        experts: jax.Array,
        gate_proj: jax.Array,
        up_proj: jax.Array,
        down_proj: jax.Array,
        *,
        expected: int | None = None,
    ) -> jax.Array:
        R, C = experts.shape
        ways = place.ways(place.rows)
        padding = -R % ways  # shard_map wants even shards; padded rows choose no expert
        x, weights = (jnp.pad(a, ((0, padding), (0, 0))) for a in (x, weights))
        experts = jnp.pad(experts, ((0, padding), (0, 0)), constant_values=gate_proj.shape[0])
        chosen = algorithm or moe_parallel.choose(place, rows=(R + padding) // ways, choices=C, platform=platform)
        rows, stacks = PartitionSpec(place.rows), PartitionSpec(place.experts)
        island = jax.shard_map(
            partial(moe_parallel.run, chosen, ops.moe, place, platform),
            mesh=mesh,
            in_specs=(rows, rows, rows, stacks, stacks, stacks),
            out_specs=rows,
            check_vma=False,
        )
        return island(x, weights, experts, gate_proj, up_proj, down_proj)[:R]

    def each(function: Callable[..., Any], batch: int, ins: Any, outs: Any) -> Callable[..., Any]:
        """Run a function of one device's rows and heads on every device, by logical axes.

        Rows that do not divide evenly stay whole on every device: right for any batch, wasteful for an uneven one.
        """
        even = batch % place.ways(rules["batch"]) == 0
        table = rules if even else {**rules, "batch": ()}
        in_specs, out_specs = jax.tree.map(lambda axes: spec(axes, table), (ins, outs))
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    queries, keys = "batch length heads head_dim", "batch length kv_heads head_dim"

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float) -> jax.Array:
        if segment_ids is None:
            local = each(lambda q, k, v: ops.attend(q, k, v, None, scale), len(q), (queries, keys, keys), queries)
            return local(q, k, v)
        ins = (queries, keys, keys, "batch length")
        return each(lambda *args: ops.attend(*args, scale), len(q), ins, queries)(q, k, v, segment_ids)

    def update_cache(cache: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array) -> LayerCache:
        ins = (ops.cache_axes, keys, keys, "batch")
        return each(ops.update_cache, len(k), ins, ops.cache_axes)(cache, k, v, start)

    def attend_cache(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
        ins = (queries, ops.cache_axes, "batch length")
        return each(lambda *args: ops.attend_cache(*args, scale), len(q), ins, queries)(q, cache, positions)

    return ops._replace(
        constrain=constrain, attend=attend, update_cache=update_cache, attend_cache=attend_cache, moe=moe
    )

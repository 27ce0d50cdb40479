"""The same operations on a device mesh: layout hints for the compiler, and the experts as an island of our own.

`on_mesh(ops, mesh, rules)` wraps a formulation. What the compiler partitions well by itself (linear layers, attention
split by head) stays as it is and gets layout constraints; the experts run under `jax.shard_map`, because which device
holds a row's expert is known only at run time.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.ops import Ops
from qwen3_jax.sharding import Rules, spec


def on_mesh(ops: Ops, mesh: Mesh, rules: Rules) -> Ops:
    """Return a formulation whose activations, cache and experts are laid out over the mesh by the rules."""

    def constrain(x: jax.Array, axes: str) -> jax.Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, rules)))

    def moe(
        x: jax.Array,
        weights: jax.Array,
        experts: jax.Array,
        gate_proj: jax.Array,
        up_proj: jax.Array,
        down_proj: jax.Array,
    ) -> jax.Array:
        ways = math.prod(mesh.shape[axis] for axis in rules["batch"])
        R = x.shape[0]
        padding = -R % ways  # shard_map wants even shards; padded rows choose no expert
        x, weights = (jnp.pad(a, ((0, padding), (0, 0))) for a in (x, weights))
        experts = jnp.pad(experts, ((0, padding), (0, 0)), constant_values=gate_proj.shape[0])
        rows, stacks = PartitionSpec(rules["batch"]), PartitionSpec(rules["experts"])
        island = jax.shard_map(
            lambda *shards: _gathered_experts(ops, mesh, rules, *shards),
            mesh=mesh,
            in_specs=(rows, rows, rows, stacks, stacks, stacks),
            out_specs=rows,
            check_vma=False,
        )
        return island(x, weights, experts, gate_proj, up_proj, down_proj)[:R]

    return ops._replace(constrain=constrain, moe=moe)


def _gathered_experts(
    ops: Ops,
    mesh: Mesh,
    rules: Rules,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
) -> jax.Array:
    """Apply the local experts to every row of the expert group, then sum over the group; runs on each device.

    The axes that split both rows and experts gather the rows and scatter the sums; the axes that split only the experts
    hold the rows already and reduce the sums.
    """
    shared = tuple(axis for axis in rules["experts"] if axis in rules["batch"])
    others = tuple(axis for axis in rules["experts"] if axis not in rules["batch"])
    x, weights, experts = (lax.all_gather(a, shared, axis=0, tiled=True) for a in (x, weights, experts))
    local = gate_proj.shape[0]
    mine = experts - lax.axis_index(rules["experts"]) * local
    mine = jnp.where((mine >= 0) & (mine < local), mine, local)
    out = ops.moe(x, weights, mine, gate_proj, up_proj, down_proj)
    out = lax.psum_scatter(out, shared, scatter_dimension=0, tiled=True)
    return lax.psum(out, others)

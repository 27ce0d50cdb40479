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

from qwen3_jax.ops import Blocks, LayerCache, Ops, first_of, moe_parallel, ring
from qwen3_jax.sharding import Rules, spec

ROW_PARALLEL = ("BTNH,DNH->BTD", "BTF,DF->BTD")
"""The linear layers whose contracted axis is split: their results are summed over devices."""


def on_mesh(ops: Ops, mesh: Mesh, rules: Rules, *, experts: str | None = None) -> Ops:
    """Return a formulation whose activations, cache and experts are laid out over the mesh by the rules.

    Args:
        ops: what runs on each device.
        mesh: the devices.
        rules: which mesh axes split which logical axis.
        experts: the algorithm of the MoE layers, one of `moe_parallel.ALGORITHMS`; None leaves it to
            `moe_parallel.choose`, layer by layer.
    """
    place = moe_parallel.island(mesh.shape, {**rules, "length": rules["stream"]})
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
        rows = PartitionSpec(place.rows)
        wide, tall = PartitionSpec(place.experts, place.slices), PartitionSpec(place.experts, None, place.slices)
        island = jax.shard_map(
            partial(moe_parallel.run, chosen, ops.moe, place, platform),
            mesh=mesh,
            in_specs=(rows, rows, rows, wide, wide, tall),
            out_specs=rows,
            check_vma=False,
        )
        return island(x, weights, experts, gate_proj, up_proj, down_proj)[:R]

    def each(function: Callable[..., Any], shape: tuple[int, ...], ins: Any, outs: Any) -> Callable[..., Any]:
        """Run a function of one device's rows and heads on every device, by logical axes.

        Args:
            shape: begins with batch and length. What of the two does not divide evenly stays whole on every device:
                right for any size, wasteful for an uneven one.
        """
        table = {
            **rules,
            **{axis: () for axis, size in zip(("batch", "length"), shape, strict=False) if odd(axis, size)},
        }
        in_specs, out_specs = jax.tree.map(lambda axes: spec(axes, table), (ins, outs))
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def odd(axis: str, size: int) -> bool:
        return size % place.ways(rules[axis]) != 0

    ops = ops._replace(
        einsum=ops.einsum_on_mesh or ops.einsum, constrain=constrain, head_groups=place.ways(rules["head_batch"])
    )
    queries, keys = "batch length heads head_dim", "batch slots kv_heads head_dim"

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float) -> jax.Array:
        split = place.ways(rules["length"]) > 1 and not odd("length", q.shape[1])

        def local(q: jax.Array, k: jax.Array, v: jax.Array, *segment_ids: jax.Array) -> jax.Array:
            segments = segment_ids[0] if segment_ids else None
            if not split:
                return ops.attend(q, k, v, segments, scale)
            return ops.attend(q, k, v, segments, scale, lax.axis_index(rules["length"]) * q.shape[1])

        more = () if segment_ids is None else (segment_ids,)
        ins = (queries, keys, keys, *["batch slots"] * len(more))
        return each(local, q.shape[:2], ins, queries)(q, k, v, *more)

    def update_cache(cache: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array) -> LayerCache:
        ins = (ops.cache_axes, keys, keys, "batch")
        return each(ops.update_cache, k.shape[:1], ins, ops.cache_axes)(cache, k, v, start)

    def attend_cache(q: jax.Array, cache: LayerCache, positions: jax.Array, scale: float) -> jax.Array:
        ins = (queries, ops.cache_axes, "batch length")
        return each(lambda *args: ops.attend_cache(*args, scale), q.shape[:2], ins, queries)(q, cache, positions)

    def top(x: jax.Array, k: int, count: int | None = None) -> tuple[jax.Array, jax.Array]:
        vocab = rules["vocab"]
        rows = () if x.shape[0] % place.ways(rules["head_batch"]) else rules["head_batch"]
        if place.ways(vocab) == 1 or x.shape[1] % place.ways(vocab):
            return ops.top(x, k, count)
        x = first_of(x, count)

        def local(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            values, ids = ops.top(x, min(k, x.shape[1]))
            ids = ids + lax.axis_index(vocab) * x.shape[1]
            values, ids = (lax.all_gather(a, vocab, axis=1, tiled=True) for a in (values, ids))
            # In the order of the devices, and so of the ids: the first of equals is still the first.
            values, at = ops.top(values, k)
            return values, jnp.take_along_axis(ids, at, axis=1)

        spread_out, together = PartitionSpec(rows, vocab), PartitionSpec(rows)
        return jax.shard_map(local, mesh=mesh, in_specs=spread_out, out_specs=(together, together), check_vma=False)(x)

    def pick(x: jax.Array, ids: jax.Array) -> jax.Array:
        if place.ways(rules["vocab"]) == 1:
            return ops.pick(x, ids)
        # The largest of one and not a gather: every device says what it holds of the vocabulary.
        return jnp.max(jnp.where(jnp.arange(x.shape[1]) == ids[:, None], x, -jnp.inf), axis=1, keepdims=True)

    # Linear layers of a prefill: see `ring`. One axis splits the stream and not the length: the one of the heads.
    around = tuple(axis for axis in rules["stream"] if axis not in rules["length"] and mesh.shape[axis] > 1)
    if not around:
        return ops._replace(
            attend=attend, update_cache=update_cache, attend_cache=attend_cache, moe=moe, top=top, pick=pick
        )
    (axis,) = around
    stream = PartitionSpec(rules["batch"], rules["stream"])
    columns = PartitionSpec(rules["batch"], rules["length"] or None, axis)

    def long(axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if mesh.shape[axis] > 1)

    def on_ring(shape: tuple[int, ...]) -> bool:
        return not odd("batch", shape[0]) and shape[1] % (2 * place.ways(rules["stream"])) == 0

    def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
        vocab = rules["vocab"]
        if long(vocab) != long(rules["stream"]) or not on_ring(tokens.shape):
            return ops.embed(table, tokens)

        def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
            """Look up what is here; of the sum over devices each keeps its part of the stream."""
            first = lax.axis_index(vocab) * table.shape[0]

            def found(begin: jax.Array, rows: int) -> jax.Array:
                at = lax.dynamic_slice_in_dim(tokens, begin, rows, axis=1) - first
                here = (at >= 0) & (at < table.shape[0])
                return jnp.where(here[:, :, None], ops.embed(table, jnp.clip(at, 0, table.shape[0] - 1)), 0)

            # As reductions the compiler would send every sum to all, twice as much.
            share, length = found, tokens.shape[1]
            for axis in vocab:
                if mesh.shape[axis] > 1:
                    part = ring.row(share, length, axis)
                    share, length = partial(lax.dynamic_slice_in_dim, part, axis=1), part.shape[1]
            return share(jnp.int32(0), length)

        ins = PartitionSpec(vocab), PartitionSpec(rules["batch"])
        return jax.shard_map(local, mesh=mesh, in_specs=ins, out_specs=stream, check_vma=False)(table, tokens)

    def spread(x: jax.Array) -> jax.Array | ring.Pieces:
        if not on_ring(x.shape):
            return x
        sent = jax.shard_map(
            partial(ring.gather, axis=axis), mesh=mesh, in_specs=stream, out_specs=stream, check_vma=False
        )
        return sent(x)

    def attend_later(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float
    ) -> jax.Array | ring.Context:
        if segment_ids is not None or not on_ring(q.shape):
            return attend(q, k, v, segment_ids, scale)
        return ring.Context(q, k, v, scale, blocks=False)

    def blocks(batch: int, length: int) -> Blocks | None:
        n = place.ways(rules["length"])
        if n == 1 or length % (2 * n) or not on_ring((batch, length)):
            return None
        return Blocks(tuple(block for i in range(n) for block in (i, 2 * n - 1 - i)))

    def attend_blocks(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> ring.Context:
        return ring.Context(q, k, v, scale, blocks=True)

    def o_proj(context: ring.Context, w: jax.Array, product: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        def local(q: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
            length, half, me = q.shape[1], q.shape[1] // 2, lax.axis_index(rules["length"])
            last = k.shape[1] - (me + 1) * half  # where the later of this device's two blocks begins

            def share(first: jax.Array, rows: int) -> jax.Array:
                part = lax.dynamic_slice_in_dim(q, first, rows, axis=1)
                if not context.blocks:
                    return ops.attend(part, k, v, None, context.scale, me * length + first, span=length)
                start = jnp.where(first < half, me * half + first, last + first - half)
                return ops.attend(part, k, v, None, context.scale, start, span=k.shape[1])

            return ring.row(share, length, axis, lambda part: product(part, w))

        ins = (spec(queries, rules), spec(keys, rules), spec(keys, rules), PartitionSpec(None, axis))
        island = jax.shard_map(local, mesh=mesh, in_specs=ins, out_specs=stream, check_vma=False)
        return island(context.q, context.k, context.v, w)

    def einsum(
        spec_: str, x: jax.Array | ring.Pieces | ring.Context, w: jax.Array, out_dtype: jnp.dtype | None = None
    ) -> jax.Array:
        def product(x: jax.Array, w: jax.Array) -> jax.Array:
            return ops.einsum(spec_, x, w, out_dtype)

        if isinstance(x, ring.Context):
            return o_proj(x, w, product)
        if isinstance(x, ring.Pieces):
            return jax.shard_map(
                lambda x, w: ring.column(x, lambda part: product(part, w), axis),
                mesh=mesh,
                in_specs=(stream, PartitionSpec(axis)),
                out_specs=columns,
                check_vma=False,
            )(x, w)
        if spec_ in ROW_PARALLEL and on_ring(x.shape):

            def local(x: jax.Array, w: jax.Array) -> jax.Array:
                def share(first: jax.Array, rows: int) -> jax.Array:
                    return product(lax.dynamic_slice_in_dim(x, first, rows, axis=1), w)

                return ring.row(share, x.shape[1], axis)

            return jax.shard_map(
                local, mesh=mesh, in_specs=(columns, PartitionSpec(None, axis)), out_specs=stream, check_vma=False
            )(x, w)
        return product(x, w)

    return ops._replace(
        embed=embed,
        spread=spread,
        einsum=einsum,
        attend=attend_later,
        blocks=blocks,
        attend_blocks=attend_blocks,
        update_cache=update_cache,
        attend_cache=attend_cache,
        moe=moe,
        top=top,
        pick=pick,
    )

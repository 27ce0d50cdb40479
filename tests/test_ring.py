"""Prefill on a mesh that splits the length: rings against whole products, logits against transformers."""

import math
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from qwen3_jax import sharding
from qwen3_jax.ops import plain, ring, tpu
from qwen3_jax.ops.mesh import on_mesh
from tests import tiny
from tests.run import Network

KINDS: dict[str, dict[str, Any]] = {"dense": {"num_hidden_layers": 2}, "moe": {"moe": True, "num_hidden_layers": 1}}


def mesh_of(text: str) -> jax.sharding.Mesh:
    sizes = sharding.parse_mesh(text)
    return sharding.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


@pytest.mark.parametrize("n", [2, 4, 5, 6])
def test_rings_equal_whole_products(n):
    mesh = jax.make_mesh((n,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    rng = np.random.default_rng(n)
    x = rng.normal(size=(2, 4 * n, 6)).astype(np.float32)
    up, down = (rng.normal(size=shape).astype(np.float32) for shape in ((8 * n, 6), (6, 8 * n)))
    product = partial(jnp.einsum, "BTD,FD->BTF")

    def columns(x: jax.Array, w: jax.Array) -> jax.Array:
        return ring.column(ring.gather(x, "x"), lambda part: product(part, w), "x")

    def rows(h: jax.Array, w: jax.Array) -> jax.Array:
        share = lambda first, rows: product(jax.lax.dynamic_slice_in_dim(h, first, rows, 1), w)  # noqa: E731
        return ring.row(share, h.shape[1], "x")

    parts, split = PartitionSpec(None, "x"), PartitionSpec(None, None, "x")
    wide = jax.jit(jax.shard_map(columns, mesh=mesh, in_specs=(parts, PartitionSpec("x")), out_specs=split))(x, up)
    chex.assert_trees_all_close(wide, product(x, up), atol=1e-5)
    narrow = jax.jit(jax.shard_map(rows, mesh=mesh, in_specs=(split, parts), out_specs=parts))(wide, down)
    chex.assert_trees_all_close(narrow, product(product(x, up), down), rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tmp_path_factory):
    settings = {"num_attention_heads": 8, "num_key_value_heads": 2, **KINDS[request.param]}
    folder, hf = tiny.save(tmp_path_factory.mktemp(request.param), **settings)
    tokens = np.random.default_rng(0).integers(0, 94, (2, 32)).astype(np.int32)
    return folder, tokens, tiny.logits(hf, tokens)


@pytest.mark.parametrize(
    "text",
    [
        "model=4",
        "expert=2",
        "expert=4,model=2",
        "expert=2,model=4",
        "data=2,expert=2,model=2",
        "data=2",
        "fsdp=2,expert=2,model=2",
        "fsdp=4,model=2",
    ],
)
def test_prefill_rules_give_the_same_logits(text, reference):
    folder, tokens, theirs = reference
    network = Network(folder, formulation="xla", mesh=mesh_of(text), purpose="prefill")
    chex.assert_trees_all_close(network.logits(tokens), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("text", ["expert=2,model=4", "expert=4,model=2", "model=4"])
def test_one_place_of_each_row_is_that_of_the_whole(text, reference):
    """Wherever the place lies: on the first device, on the last, in either of a device's blocks."""
    folder, tokens, theirs = reference
    network = Network(folder, formulation="xla", mesh=mesh_of(text), purpose="prefill")
    for places in ([0, 31], [30, 9], [17, 16]):
        logits = network.logits(tokens, only=np.array(places, np.int32))
        chex.assert_trees_all_close(logits, theirs[[0, 1], places][:, None], atol=2e-5, rtol=0)


def test_devices_attend_to_as_much_as_each_other():
    prompts = on_mesh(plain.XLA, mesh_of("expert=4,model=2"), sharding.RULES["prefill"])
    blocks = prompts.blocks(2, 64)
    assert blocks is not None
    positions = np.asarray(blocks.arrange(jnp.arange(64)[None]))[0]
    assert positions[0] == 0
    assert len({part.sum() for part in np.split(positions, 4)}) == 1
    chex.assert_trees_all_equal(blocks.in_order(positions[None])[0], jnp.arange(64))
    chex.assert_trees_all_equal(positions[blocks.place(jnp.arange(64), 64)], jnp.arange(64))
    assert prompts.blocks(2, 63) is None
    assert on_mesh(plain.XLA, mesh_of("model=4"), sharding.RULES["prefill"]).blocks(2, 64) is None


@pytest.mark.parametrize("length", [1, 7, 12])
def test_lengths_that_do_not_divide_are_right_too(length, reference):
    folder, tokens, theirs = reference
    network = Network(folder, formulation="xla", mesh=mesh_of("expert=2,model=4"), purpose="prefill")
    logits = network.logits(tokens[:, :length])
    chex.assert_trees_all_close(logits, theirs[:, :length], atol=2e-5, rtol=0)


def test_packed_rows_keep_their_segments(reference):
    folder, tokens, _ = reference
    segments = np.repeat([[1, 2]], [13, 19], axis=1).astype(np.int32).repeat(2, axis=0)
    alone = Network(folder, formulation="xla").logits(tokens, segment_ids=segments)
    split = Network(folder, formulation="xla", mesh=mesh_of("expert=2,model=4"), purpose="prefill")
    chex.assert_trees_all_close(split.logits(tokens, segment_ids=segments), alone, atol=1e-5, rtol=0)


def test_the_prefill_of_a_mesh_fills_the_cache_that_decoding_reads(reference):
    folder, tokens, theirs = reference
    network = Network(folder, formulation="xla", mesh=mesh_of("expert=2,model=4"), purpose="prefill")
    logits = network.logits_in_pieces(tokens, [24, 1, 7], capacity=32)
    chex.assert_trees_all_close(logits, theirs, atol=2e-5, rtol=0)


# The TPU's kernels, emulated


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


@jax.jit
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return plain.attend(q, k, v, None, 0.2)


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 2, 256), (4, 4, 128), (8, 1, 384)])
def test_flash_attention_equals_the_oracle(heads, kv_heads, length):
    q, k, v = draw(2, length, heads, 32), draw(2, length, kv_heads, 32), draw(2, length, kv_heads, 32)
    out = jax.jit(lambda: tpu.INTERPRETED.attend(q, k, v, None, 0.2))()
    chex.assert_trees_all_close(out, attend(q, k, v), atol=2e-6)


def test_flash_attention_of_some_of_the_queries():
    q, k, v = draw(1, 384, 4, 32), draw(1, 384, 2, 32), draw(1, 384, 2, 32)
    part = jax.jit(lambda at: tpu.INTERPRETED.attend(jax.lax.dynamic_slice_in_dim(q, at, 128, 1), k, v, None, 0.2, at))
    whole = np.asarray(attend(q, k, v))
    for start in (0, 128, 256):
        chex.assert_trees_all_close(part(jnp.int32(start)), whole[:, start : start + 128], atol=2e-6)


@pytest.mark.parametrize(("dtype", "kv_heads"), [(jnp.float32, 2), (jnp.bfloat16, 1)])
def test_the_cache_is_updated_in_place_where_each_row_stands(dtype, kv_heads):
    rng = np.random.default_rng(0)
    start = jnp.asarray([0, 15, 16, 47], jnp.int32)
    oracle = plain.init_cache(4, 48, kv_heads, 32, dtype)
    ours = tpu.init_cache(4, 48, kv_heads, 32, dtype)
    updates = jax.jit(plain.update_cache), jax.jit(tpu.INTERPRETED.update_cache)
    for step in range(3):
        k, v = (jnp.asarray(rng.normal(size=(4, 1, kv_heads, 32)), dtype) for _ in "kv")
        at = jnp.minimum(start + step, 47)
        oracle, ours = (update(cache, k, v, at) for update, cache in zip(updates, (oracle, ours), strict=True))
    for name in "kv":
        chex.assert_trees_all_equal(jnp.swapaxes(ours[name], 1, 2), oracle[name])


@pytest.mark.parametrize("length", [1, 5])
def test_attention_to_the_cache_equals_the_oracle(length):
    k, v, q = draw(3, 20, 2, 32), draw(3, 20, 2, 32), draw(3, length, 4, 32)
    start = jnp.asarray([0, 3, 14], jnp.int32)
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)

    @partial(jax.jit, static_argnums=0)
    def attended(ops):
        cache = ops.update_cache(ops.init_cache(3, 24, 2, 32, jnp.float32), k, v, jnp.zeros(3, jnp.int32))
        return ops.attend_cache(q, cache, positions, 0.2)

    chex.assert_trees_all_close(attended(tpu), attended(plain), atol=2e-6)

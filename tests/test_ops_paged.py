"""The paged cache against the dense one and against its definition, over random tables; what the steps copy."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.ops import paged, plain
from qwen3_jax.sharding import RULES, make_mesh, spec

N, K, H, PAGE = 4, 2, 16, 4
update = jax.jit(plain.update_cache)


def draw(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tables(seed: int, rows: int, columns: int, spare: int = 3) -> tuple[jax.Array, int]:
    """Hand out pages at random; returns the table and their number. Some columns name the scratch page."""
    rng = np.random.default_rng(seed)
    pages = rows * columns + spare
    table = rng.permutation(pages)[: rows * columns].reshape(rows, columns)
    return jnp.asarray(table, jnp.int32), pages


@functools.cache
def jitted(attend):
    return jax.jit(functools.partial(attend, scale=0.3))


def narrow(x, kept):
    """Round to what pages of a dtype can hold: uint16 stands for bfloat16."""
    return x.astype(jnp.bfloat16).astype(jnp.float32) if kept == jnp.uint16 else x


def filled(seed: int, rows: int, columns: int, kept=jnp.float32):
    """A paged and a dense cache of the same random keys and values, all slots written; the dense one in float32."""
    table, pages = tables(seed, rows, columns)
    k, v = (narrow(draw(seed + i, rows, columns * PAGE, K, H), kept) for i in (1, 2))
    empty = paged.init(pages, PAGE, K, H, jnp.dtype(kept))
    cache = jax.jit(paged.update)(empty | {"table": table}, k, v, jnp.zeros(rows, jnp.int32))
    dense = plain.init_cache(rows, columns * PAGE, K, H, jnp.dtype(jnp.float32))
    dense = update(dense, k, v, jnp.zeros(rows, jnp.int32))
    return cache, dense


@pytest.mark.parametrize("kept", [jnp.float32, jnp.uint16])
@pytest.mark.parametrize("seed", range(4))
def test_decoding_equals_the_dense_cache(seed, kept):
    rows = 3
    rng = np.random.default_rng(seed)
    cache, dense = filled(seed, rows, 7, kept)
    start = jnp.asarray(rng.integers(0, 7 * PAGE, rows), jnp.int32)
    k, v, q = (narrow(draw(seed + 5 + i, rows, 1, heads, H), kept) for i, heads in enumerate((K, K, N)))
    cache, dense = jax.jit(paged.update)(cache, k, v, start), update(dense, k, v, start)
    expected = jitted(plain.attend_cache)(q, dense, start[:, None])
    for attend in (paged.attend_gathered, paged.attend_blocks):
        actual = jitted(attend)(q, cache, start[:, None])
        chex.assert_trees_all_close(actual, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kept", [jnp.float32, jnp.uint16])
@pytest.mark.parametrize("T", [PAGE, 5 * PAGE - 1])
def test_a_chunk_equals_the_dense_cache(T, kept):
    """A chunk from a page's beginning on; a last page that it does not fill, and what lies above stays unread."""
    cache, dense = filled(T, 2, 9, kept)
    start = jnp.asarray([0, 3 * PAGE], jnp.int32)
    k, v, q = (narrow(draw(50 + i, 2, T, heads, H), kept) for i, heads in enumerate((K, K, N)))
    cache, dense = jax.jit(paged.update)(cache, k, v, start), update(dense, k, v, start)
    positions = start[:, None] + jnp.arange(T)
    expected = jitted(plain.attend_cache)(q, dense, positions)
    for attend in (paged.attend_gathered, paged.attend_blocks):
        actual = jitted(attend)(q, cache, positions)
        chex.assert_trees_all_close(actual, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("start", [0, 120, 124, 504, 508, 632, 1012, 1016, 1192])
def test_a_long_row_is_walked_to_its_end_in_blocks_of_two_widths(start):
    """Ends before, at and behind the end of a narrow and of a wide block; what lies above is NaN."""
    cache, dense = filled(3, 1, 300)
    T = 2 * PAGE
    q = draw(9, 1, T, N, H)
    positions = start + jnp.arange(T)[None]
    expected = jitted(plain.attend_cache)(q, dense, positions)
    above = cache["table"][0, -(-(start + T) // PAGE) :]
    poisoned = cache | {name: cache[name].at[:, above].set(jnp.nan).at[:, -1].set(jnp.nan) for name in "kv"}
    chex.assert_trees_all_close(jitted(paged.attend_blocks)(q, poisoned, positions), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("page", [1, 48, 100, 128, 600])
def test_blocks_of_a_walk_end_within_the_table(page):
    """Narrow blocks behind wide ones, of pages that divide neither, reach no column twice and none too many."""
    columns = -(-1300 // page)
    cache = {name: draw(i, K, columns + 1, page, H) for i, name in enumerate("kv")}
    cache["table"] = jnp.asarray(np.random.default_rng(page).permutation(columns)[None], jnp.int32)
    q = draw(9, 1, 3, N, H)
    for last in (3, 127, 128, 700, 1024, 1100, columns * page):
        positions = jnp.arange(last - 3, last)[None]
        expected = jitted(paged.attend_gathered)(q, cache, positions)
        chex.assert_trees_all_close(jitted(paged.attend_blocks)(q, cache, positions), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("kept", "nan"), [(jnp.float32, jnp.nan), (jnp.uint16, 0x7FC0)])
def test_garbage_above_the_position_is_never_read(kept, nan):
    """Pages that held NaN, the scratch page included, and longer neighbours: not a bit of a row changes."""
    cache, _ = filled(0, 2, 6, kept)
    table = cache["table"]
    poison = lambda x: x.at[:, table[1]].set(nan).at[:, -1].set(nan)  # noqa: E731
    q = draw(9, 2, 1, N, H)
    attend = jitted(paged.attend_blocks)
    alone = attend(q, cache, jnp.asarray([[5], [0]]))
    row = jnp.asarray(table).at[0, 2:].set(cache["k"].shape[1] - 1)
    bad = cache | {"k": poison(cache["k"]), "v": poison(cache["v"]), "table": row}
    beside = attend(q, bad, jnp.asarray([[5], [23]]))
    chex.assert_trees_all_equal(beside[0], alone[0])
    assert np.isnan(np.asarray(beside[1])).all()


@pytest.mark.parametrize(("kept", "name"), [(jnp.float32, "f32"), (jnp.uint16, "u16")])
def test_a_step_writes_in_place(kept, name):
    """No copy of the pages in the compiled update, neither alone nor inside a loop."""
    cache, _ = filled(1, 3, 5, kept)

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(pages, table, k, v, q):
        def step(i, carry):
            pages, total = carry
            (layer,) = paged.opened([pages], table)
            layer = paged.update(layer, k, v, jnp.full(3, i, jnp.int32))
            out = paged.attend_blocks(q, layer, jnp.full((3, 1), i, jnp.int32), 0.3)
            return paged.closed([layer])[0], total + out

        return jax.lax.fori_loop(0, 5, step, (pages, jnp.zeros_like(q)))

    pages = {"k": cache["k"], "v": cache["v"]}
    k, v, q = (draw(i, 3, 1, heads, H) for i, heads in enumerate((K, K, N)))
    program: Any = steps.lower(pages, cache["table"], k, v, q).compile()
    shape = f"{name}[" + ",".join(map(str, cache["k"].shape)) + "]"
    copies = [line for line in program.as_text().splitlines() if " copy(" in line and shape in line.split("=")[1][:40]]
    assert not copies, copies
    assert program.memory_analysis().alias_size_in_bytes >= 2 * cache["k"].nbytes
    assert kept == jnp.float32 or f"f32[{shape[4:]}" not in program.as_text()


@pytest.mark.parametrize("rules", ["serve", "prefill"])
@pytest.mark.parametrize(("rows", "T"), [(1, 16), (1, 6), (4, 8), (3, 1)])
def test_a_mesh_attends_as_one_device(rows, T, rules):
    """Rows or a chunk's tokens over `expert` and heads over `model`; what does not divide stays whole."""
    mesh, table = make_mesh(expert=4, model=2), RULES[rules]
    cache, _ = filled(5, rows, 7)
    q, positions = draw(9, rows, T, N, H), jnp.asarray([[3], [0], [9], [6]])[:rows] + jnp.arange(T)
    expected = jitted(paged.attend_gathered)(q, cache, positions)
    ops = paged.paged(plain.XLA, platform="cpu", mesh=mesh, rules=table)
    heads = jax.sharding.NamedSharding(mesh, spec("kv_heads slots slots head_dim", table))
    spread = cache | {name: jax.device_put(cache[name], heads) for name in "kv"}
    program: Any = jax.jit(functools.partial(ops.attend_cache, scale=0.3)).lower(q, spread, positions).compile()
    chex.assert_trees_all_close(program(q, spread, positions), expected, atol=2e-6, rtol=0)
    assert (rules, rows, T) != ("prefill", 1, 16) or f"f32[1,4,{N // 2},{H}]" in program.as_text()


def test_the_gpus_kernel_reads_the_same_pages():
    """JAX's kernel, interpreted, with a table whose last columns it must not trust."""
    cache, _ = filled(1, 3, 7)
    q, positions = draw(9, 3, 1, N, H), jnp.asarray([[5], [0], [27]])
    expected = jitted(paged.attend_gathered)(q, cache, positions)
    chex.assert_trees_all_close(paged.attend_gpu(q, cache, positions, 0.3, interpret=True), expected, atol=2e-6, rtol=0)


def test_the_tpus_kernel_reads_the_same_pages():
    """JAX's kernel, interpreted; it multiplies in bfloat16 whatever it is given."""
    from jax.experimental.pallas import tpu as pltpu

    cache, _ = filled(1, 3, 7)
    q, positions = draw(9, 3, 1, N, H), jnp.asarray([[5], [0], [27]])
    expected = jitted(paged.attend_gathered)(q, cache, positions)
    with pltpu.force_tpu_interpret_mode():
        actual = paged.attend_tpu(q, cache, positions, 0.3)
    chex.assert_trees_all_close(actual, expected, atol=1e-2, rtol=0)


def test_scrubbed_pages_hold_nothing():
    cache, _ = filled(1, 3, 5)
    bad = {name: jnp.full_like(cache[name], jnp.nan) for name in "kv"}
    (clean,) = paged.scrubbed([bad], cache["table"][1])
    assert not np.asarray(clean["v"][:, cache["table"][1]]).any()
    assert np.isnan(np.asarray(clean["v"][:, cache["table"][0]])).all()


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_decode_step_compiles_for_tpu(topology):
    """A layer's update and attention at the shapes of Qwen3-0.6B, heads over four chips: one kernel, no copy."""
    from jax.sharding import NamedSharding, PartitionSpec

    from qwen3_jax.ops.tpu import TPU
    from tests.tpu_programs import array, mesh_for

    mesh = mesh_for(topology)
    rules = {"batch": (), "length": (), "heads": ("x",), "kv_heads": ("x",), "slots": (), "head_dim": ()}
    ops = paged.paged(TPU, platform="tpu", mesh=mesh, rules=rules)
    at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    B, heads, kv_heads, head_dim, page, pages = 16, 16, 8, 128, 16, 1024

    def step(cache, table, k, v, q, positions):
        (layer,) = paged.opened([cache], table)
        layer = ops.update_cache(layer, k, v, positions[:, 0])
        out = ops.attend_cache(q, layer, positions, 0.1)
        return paged.closed([layer])[0], out

    cache = {name: array((kv_heads, pages + 1, page, head_dim), at=at("x")) for name in "kv"}
    new = array((B, 1, kv_heads, head_dim), at=at(None, None, "x"))
    q = array((B, 1, heads, head_dim), at=at(None, None, "x"))
    numbers = [array(shape, jnp.int32, at()) for shape in ((B, 130), (B, 1))]
    with jax.set_mesh(mesh):
        program: Any = jax.jit(step, donate_argnums=0).lower(cache, numbers[0], new, new, q, numbers[1]).compile()
    assert "tpu_custom_call" in program.as_text()
    local = 2 * kv_heads // 4 * (pages + 1) * page * head_dim * 2
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= local
    assert memory.temp_size_in_bytes < local // 4, memory


def test_the_gpus_kernel_compiles_for_h100():
    """The same, for one H100 that is described and not present."""
    import importlib.util

    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from qwen3_jax.plan.gpu import TARGETS

    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("compiling for GPU needs jax's CUDA plugin: pip install 'qwen3-jax[cuda]'")
    described = topologies.get_topology_desc("x", platform="cuda", topology="1x1x1", target_config=TARGETS["H100"])
    mesh = Mesh(np.array(described.devices), ("x",), axis_types=(AxisType.Auto,))
    at = NamedSharding(mesh, PartitionSpec())
    array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=at)  # noqa: E731
    cache = {"k": array((8, 1025, 16, 128)), "v": array((8, 1025, 16, 128)), "table": array((16, 130), jnp.int32)}
    attend = functools.partial(paged.attend_gpu, scale=0.1)
    program: Any = jax.jit(attend).lower(array((16, 1, 16, 128)), cache, array((16, 1), jnp.int32)).compile()
    assert "paged_attention" in program.as_text()

"""The paged cache against the dense one and against its definition, over random tables; what the steps copy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.ops import paged, plain

N, K, H, PAGE = 4, 2, 16, 4


def draw(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tables(seed: int, rows: int, columns: int, spare: int = 3) -> tuple[jax.Array, int]:
    """Hand out pages at random; returns the table and their number. Some columns name the scratch page."""
    rng = np.random.default_rng(seed)
    pages = rows * columns + spare
    table = rng.permutation(pages)[: rows * columns].reshape(rows, columns)
    return jnp.asarray(table, jnp.int32), pages


def filled(seed: int, rows: int, columns: int):
    """A paged and a dense cache of the same random keys and values, all slots written."""
    table, pages = tables(seed, rows, columns)
    k, v = (draw(seed + i, rows, columns * PAGE, K, H) for i in (1, 2))
    empty = paged.init(pages, PAGE, K, H, jnp.dtype(jnp.float32))
    cache = jax.jit(paged.update)(empty | {"table": table}, k, v, jnp.zeros(rows, jnp.int32))
    dense = plain.update_cache(
        plain.init_cache(rows, columns * PAGE, K, H, jnp.dtype(jnp.float32)), k, v, jnp.zeros(rows, jnp.int32)
    )
    return cache, dense


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_decoding_equals_the_dense_cache(rows, seed):
    rng = np.random.default_rng(seed)
    cache, dense = filled(seed, rows, 7)
    start = jnp.asarray(rng.integers(0, 7 * PAGE, rows), jnp.int32)
    k, v, q = (draw(seed + 5 + i, rows, 1, heads, H) for i, heads in enumerate((K, K, N)))
    cache, dense = jax.jit(paged.update)(cache, k, v, start), plain.update_cache(dense, k, v, start)
    expected = plain.attend_cache(q, dense, start[:, None], 0.3)
    for attend in (paged.attend_gathered, paged.attend_blocks):
        actual = jax.jit(functools.partial(attend, scale=0.3))(q, cache, start[:, None])
        chex.assert_trees_all_close(actual, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("T", [PAGE, 3 * PAGE, 5 * PAGE - 1])
def test_a_chunk_equals_the_dense_cache(T):
    """A chunk from a page's beginning on; a last page that it does not fill, and what lies above stays unread."""
    cache, dense = filled(T, 2, 9)
    start = jnp.asarray([0, 3 * PAGE], jnp.int32)
    k, v, q = (draw(50 + i, 2, T, heads, H) for i, heads in enumerate((K, K, N)))
    cache, dense = jax.jit(paged.update)(cache, k, v, start), plain.update_cache(dense, k, v, start)
    positions = start[:, None] + jnp.arange(T)
    expected = plain.attend_cache(q, dense, positions, 0.3)
    for attend in (paged.attend_gathered, paged.attend_blocks):
        actual = jax.jit(functools.partial(attend, scale=0.3))(q, cache, positions)
        chex.assert_trees_all_close(actual, expected, atol=2e-6, rtol=0)


def test_garbage_above_the_position_is_never_read():
    """Pages that held NaN, the scratch page included, and longer neighbours: not a bit of a row changes."""
    cache, _ = filled(0, 2, 6)
    table = cache["table"]
    poison = lambda x: x.at[:, table[1]].set(jnp.nan).at[:, -1].set(jnp.nan)  # noqa: E731
    q = draw(9, 2, 1, N, H)
    attend = jax.jit(functools.partial(paged.attend_blocks, scale=0.3))
    alone = attend(q, cache, jnp.asarray([[5], [0]]))
    row = jnp.asarray(table).at[0, 2:].set(cache["k"].shape[1] - 1)
    bad = cache | {"k": poison(cache["k"]), "v": poison(cache["v"]), "table": row}
    beside = attend(q, bad, jnp.asarray([[5], [23]]))
    chex.assert_trees_all_equal(beside[0], alone[0])
    assert np.isnan(np.asarray(beside[1])).all()


def test_a_step_writes_in_place():
    """No copy of the pages in the compiled update, neither alone nor inside a loop."""
    cache, _ = filled(1, 3, 5)

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
    program = steps.lower(pages, cache["table"], k, v, q).compile()
    shape = "f32[" + ",".join(map(str, cache["k"].shape)) + "]"
    copies = [line for line in program.as_text().splitlines() if " copy(" in line and shape in line.split("=")[1][:40]]
    assert not copies, copies
    assert program.memory_analysis().alias_size_in_bytes >= 2 * cache["k"].nbytes

"""The CPU formulation against numpy in float64 and against the oracle's gradients, in float32 and bfloat16."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import ops
from qwen3_jax.ops import cpu, plain
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.sharding import RULES, make_mesh

DTYPES = [jnp.float32, jnp.bfloat16]
# Of the largest value: float32 sums in another order; bfloat16 rounds at every step that the model rounds at.
BOUND = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}


def draw(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float32).astype(np.float64) if x.dtype == ml_dtypes.bfloat16 else x.astype(np.float64)


def check(actual, expected, dtype) -> None:
    expected = wide(expected)
    chex.assert_trees_all_close(wide(actual), expected, rtol=0, atol=BOUND[dtype] * max(np.abs(expected).max(), 1e-3))


def gradients(f, *args):
    """Gradients of the sum of squares of f with respect to every argument."""
    loss = lambda *args: jnp.sum(jnp.square(f(*args).astype(jnp.float32)))  # noqa: E731
    return jax.jit(jax.grad(loss, argnums=tuple(range(len(args)))))(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 5), (4, 16), (5, 13)])  # 64 rows are few, 65 are not
@pytest.mark.parametrize(
    ("spec", "shape", "w_shape"),
    [("BTD,NHD->BTNH", (24,), (3, 8, 24)), ("BTNH,DNH->BTD", (3, 8), (20, 3, 8)), ("BTD,VD->BTV", (24,), (97, 24))],
)
def test_einsum(dtype, B, T, spec, shape, w_shape):
    x, w = draw(0, B, T, *shape, dtype=dtype), draw(1, *w_shape, dtype=dtype)
    expected = np.einsum(spec, wide(x), wide(w))
    actual = jax.jit(functools.partial(cpu.einsum, spec))(x, w)
    chex.assert_type(actual, dtype)
    check(actual, expected, dtype)
    logits = jax.jit(functools.partial(cpu.einsum, spec, out_dtype=jnp.float32))(x, w)
    chex.assert_type(logits, jnp.float32)
    check(logits, expected, jnp.float32)
    check_trees(
        gradients(functools.partial(cpu.einsum, spec), x, w), (x, w), functools.partial(plain.einsum, spec), dtype
    )


def test_on_a_mesh_few_rows_are_not_gathered():
    """A column-parallel layer and a row-parallel one: one sum of the results and nothing else is sent."""
    mesh = make_mesh(model=4, devices=jax.devices()[:4])
    linear = on_mesh(cpu.CPU, mesh, RULES["serve"]).einsum
    x, up, down = draw(0, 8, 1, 24), draw(1, 96, 24), draw(2, 24, 96)
    specs = (PartitionSpec(), PartitionSpec("model"), PartitionSpec(None, "model"))
    args = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip((x, up, down), specs, strict=True)]
    mlp = jax.jit(lambda x, up, down: linear("BTF,DF->BTD", jnp.tanh(linear("BTD,FD->BTF", x, up)), down))
    sent = re.findall(r" (all-\w+|reduce-scatter|collective-\w+)\(", mlp.lower(*args).compile().as_text() or "")
    assert sent == ["all-reduce"]
    check(mlp(*args), np.tanh(wide(x) @ wide(up).T) @ wide(down).T, jnp.float32)


def check_trees(actual, args, oracle, dtype):
    for mine, theirs in zip(actual, gradients(oracle, *args), strict=True):
        chex.assert_equal_shape([mine, theirs])
        assert mine.dtype == theirs.dtype
        check(mine, theirs, dtype)


@pytest.mark.parametrize("x_dtype", DTYPES)
def test_einsum_casts_parameters_to_the_compute_dtype(x_dtype):
    w_dtype = jnp.bfloat16 if x_dtype == jnp.float32 else jnp.float32
    x, w = draw(0, 1, 1, 24, dtype=x_dtype), draw(1, 7, 24, dtype=w_dtype)
    check(cpu.einsum("BTD,FD->BTF", x, w), plain.einsum("BTD,FD->BTF", x, w), x_dtype)
    assert gradients(functools.partial(cpu.einsum, "BTD,FD->BTF"), x, w)[1].dtype == w_dtype


@pytest.mark.parametrize("out", [2048, 2100, 2053])  # in two pieces each; a prime has none
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("near", [True, False])
def test_one_row_and_a_large_matrix(near, x_dtype, out, monkeypatch):
    monkeypatch.setattr(cpu, "_caches_are_near", lambda: near)
    x, w = draw(0, 1, 1, 1024, dtype=x_dtype), draw(1, out, 1024, dtype=jnp.bfloat16)
    logits = jax.jit(functools.partial(cpu.einsum, "BTD,VD->BTV", out_dtype=jnp.float32))(x, w)
    check(logits, np.einsum("BTD,VD->BTV", wide(x), wide(w)), jnp.float32)
    linear = functools.partial(cpu.einsum, "BTD,VD->BTV")
    check_trees(gradients(linear, x, w), (x, w), functools.partial(plain.einsum, "BTD,VD->BTV"), jnp.bfloat16)


@pytest.mark.parametrize("spec", ["BTD,DF->BTF", "BTD,FD->BFT", "BTD,FD->F"])
def test_einsum_refuses_what_is_no_linear_layer(spec):
    with pytest.raises(ValueError, match="not a linear layer"):
        cpu.einsum(spec, jnp.ones((2, 3, 4)), jnp.ones((4, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(dtype):
    table, tokens = draw(0, 11, 6, dtype=dtype), jnp.asarray([[3, 3, 10], [0, 7, 3]])
    chex.assert_trees_all_equal(cpu.embed(table, tokens), np.asarray(table)[np.asarray(tokens)])
    ct = gradients(lambda table: cpu.embed(table, tokens), table)[0]
    check(ct, 2 * wide(table) * np.bincount(np.asarray(tokens).ravel(), minlength=11)[:, None], dtype)


def attention(q, k, v, allowed, scale) -> np.ndarray:
    """Softmax attention in float64; allowed [B, T, S]."""
    q, k, v = wide(q), wide(k), wide(v)
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("BTNH,BSNH->BNTS", q, k) * scale
    scores = np.where(allowed[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("BNTS,BSNH->BTNH", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    # One token; odd; two blocks; one block exactly; groups of blocks that are mapped over, with a remainder.
    ("B", "T", "N", "K", "packed"),
    [(1, 1, 2, 2, False), (3, 7, 4, 2, True), (2, 300, 8, 1, True), (1, 256, 4, 4, False), (1, 2100, 2, 1, True)],
)
def test_attend(dtype, B, T, N, K, packed):
    q, k, v = (draw(i, B, T, heads, 8, dtype=dtype) for i, heads in enumerate((N, K, K)))
    segments = None
    allowed = np.tril(np.ones((T, T), bool))[None].repeat(B, 0)
    if packed:
        segments = np.sort(np.random.default_rng(3).integers(0, 4, (B, T)), axis=1).astype(np.int32)
        allowed &= segments[:, :, None] == segments[:, None, :]
        segments = jnp.asarray(segments)
    mine = lambda q, k, v: cpu.attend(q, k, v, segments, 0.3)  # noqa: E731
    actual = jax.jit(mine)(q, k, v)
    chex.assert_type(actual, dtype)
    check(actual, attention(q, k, v, allowed, 0.3), dtype)
    if packed:
        check_trees(gradients(mine, q, k, v), (q, k, v), lambda q, k, v: plain.attend(q, k, v, segments, 0.3), dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_attend_takes_a_part_of_the_queries(packed):
    q, k, v = (draw(i, 2, 50, heads, 8) for i, heads in enumerate((4, 2, 2)))
    segments = jnp.asarray(np.arange(100).reshape(2, 50) // 15 % 3, jnp.int32) if packed else None
    whole = cpu.attend(q, k, v, segments, 0.3)
    part = jax.jit(lambda q, start: cpu.attend(q, k, v, segments, 0.3, start))(q[:, 20:48], jnp.int32(20))
    check(part, whole[:, 20:48], jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    # One token and several; the last two need two and three blocks of slots, the third overlapping the second.
    ("B", "T", "groups", "S", "starts"),
    [
        (1, 1, 1, 19, [6]),
        (3, 1, 2, 19, [6, 2, 13]),
        (2, 1, 8, 19, [0, 18]),
        (2, 5, 2, 19, [6, 2]),
        (2, 5, 1, 640, [600, 3]),
        (1, 7, 8, 1100, [1090]),
    ],
)
def test_cache(dtype, B, T, groups, S, starts):
    """Ragged rows: a padded prefill, then T tokens from a different position in each row."""
    K, H, prompt = 2, 8, 6
    N = K * groups
    start = np.array(starts, np.int32)
    filled = max(prompt, int(start.max()))
    k, v = draw(0, B, filled, K, H, dtype=dtype), draw(1, B, filled, K, H, dtype=dtype)
    new_k, new_v = draw(2, B, T, K, H, dtype=dtype), draw(3, B, T, K, H, dtype=dtype)
    q = draw(4, B, T, N, H, dtype=dtype)

    @jax.jit
    def run(k, v, new_k, new_v, q, start):
        cache = cpu.init_cache(B, S, K, H, dtype)
        cache = cpu.update_cache(cache, k, v, jnp.zeros(B, jnp.int32))
        cache = cpu.update_cache(cache, new_k, new_v, start)
        return cpu.attend_cache(q, cache, start[:, None] + jnp.arange(T, dtype=jnp.int32), 0.3)

    actual = run(k, v, new_k, new_v, q, jnp.asarray(start))
    chex.assert_type(actual, dtype)
    for b in range(B):
        keys = np.concatenate([wide(k)[b, : start[b]], wide(new_k)[b]])[None]
        values = np.concatenate([wide(v)[b, : start[b]], wide(new_v)[b]])[None]
        allowed = np.arange(keys.shape[1])[None, None] <= start[b] + np.arange(T)[None, :, None]
        check(actual[b], attention(q[b][None], keys, values, allowed, 0.3)[0], dtype)


def test_a_gradient_through_a_cache_of_bits_is_refused():
    """It would come out as zero. In float32 it is there."""

    def run(k, dtype):
        k = k.astype(dtype)
        cache = cpu.update_cache(cpu.init_cache(1, 8, 2, 4, dtype), k, k, jnp.zeros(1, jnp.int32))
        return jnp.sum(cpu.attend_cache(k[:, :1], cache, jnp.full((1, 1), 2), 1.0).astype(jnp.float32))

    k = draw(0, 1, 3, 2, 4)
    assert np.abs(np.asarray(jax.grad(run)(k, jnp.float32))[0, 2]).max() > 0
    with pytest.raises(NotImplementedError, match="no gradient goes through a cache of bfloat16"):
        jax.grad(run)(k, jnp.bfloat16)


def routing(kind: str, R: int, E: int, C: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    if kind == "one expert":
        return np.tile(np.arange(C, dtype=np.int32), (R, 1))
    if kind == "empty experts":  # every other expert
        return np.stack([2 * rng.permutation(E // 2)[:C] for _ in range(R)]).astype(np.int32)
    chosen = np.stack([rng.permutation(E)[:C] for _ in range(R)]).astype(np.int32)
    if kind == "some nowhere":
        chosen[rng.random(chosen.shape) < 0.4] = E
        chosen[0] = E + 3
    return chosen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("R", "E", "C", "kind"),
    [
        (1, 8, 3, "spread"),
        (1, 8, 3, "some nowhere"),
        (8, 16, 8, "spread"),
        (8, 16, 8, "empty experts"),
        (37, 6, 2, "some nowhere"),
        (200, 6, 1, "one expert"),
        (200, 6, 3, "spread"),
    ],
)
def test_moe(dtype, R, E, C, kind):
    D, F = 16, 24
    x, stacks = draw(0, R, D, dtype=dtype), (draw(2, E, F, D), draw(3, E, F, D), draw(4, E, D, F))
    stacks = tuple((w / 4).astype(dtype) for w in stacks)
    weights = jax.nn.softmax(draw(1, R, C), axis=-1).astype(dtype)
    experts = routing(kind, R, E, C)
    expected = np.zeros((R, D))
    gate, up, down = (wide(w) for w in stacks)
    for r, c in np.ndindex(R, C):
        e = experts[r, c]
        if e < E:
            h = gate[e] @ wide(x)[r]
            expected[r] += wide(weights)[r, c] * (down[e] @ (h / (1 + np.exp(-h)) * (up[e] @ wide(x)[r])))
    mine = lambda x, w, *s: cpu.moe(x, w, jnp.asarray(experts), *s)  # noqa: E731
    actual = jax.jit(mine)(x, weights, *stacks)
    chex.assert_type(actual, dtype)
    check(actual, expected, dtype)
    oracle = lambda x, w, *s: plain.ORACLE.moe(x, w, jnp.asarray(experts), *s)  # noqa: E731
    check_trees(gradients(mine, x, weights, *stacks), (x, weights, *stacks), oracle, dtype)


def test_decode_copies_neither_weights_nor_cache():
    """In compiled code: several tokens in one loop, bfloat16, need no memory of the weights' or the cache's size."""
    D, K, H, S, E, F, V = 256, 2, 32, 512, 8, 128, 4096
    weights = {
        "embed": jnp.zeros((V, D), jnp.bfloat16),
        "q": jnp.zeros((K, H, D), jnp.bfloat16),
        "stacks": [jnp.zeros(s, jnp.bfloat16) for s in ((E, F, D), (E, F, D), (E, D, F))],
    }

    def decode(weights, cache):
        def step(_, state):
            x, cache, at = state
            q = cpu.einsum("BTD,KHD->BTKH", x, weights["q"])
            cache = cpu.update_cache(cache, q, q, at)
            context = cpu.attend_cache(q, cache, at[:, None], 1.0).reshape(1, -1)
            x = cpu.moe(
                x[0], jnp.ones((1, 2), x.dtype), at.astype(jnp.int32)[:, None] % E + jnp.arange(2), *weights["stacks"]
            )
            logits = cpu.einsum("BTD,VD->BTV", x[None], weights["embed"], jnp.float32)
            x = x + jnp.sum(context) + cpu.embed(weights["embed"], jnp.argmax(logits, axis=-1)[0])
            return x[None], cache, at + 1

        x = jnp.ones((1, 1, D), jnp.bfloat16)
        x, cache, _ = jax.lax.fori_loop(0, 8, step, (x, cache, jnp.zeros(1, jnp.int32)))
        return x, cache

    cache = cpu.init_cache(1, S, K, H, jnp.bfloat16)
    memory = jax.jit(decode, donate_argnums=1).lower(weights, cache).compile().memory_analysis()
    assert memory is not None
    cache_bytes = sum(a.nbytes for a in cache.values())
    assert memory.alias_size_in_bytes >= cache_bytes
    one_expert = 2 * F * D * 3
    assert memory.temp_size_in_bytes < min(cache_bytes, V * D * 2) + 2 * one_expert


def test_chosen_on_cpu():
    assert ops.for_platform("cpu") is cpu.CPU


@pytest.mark.parametrize("k", [1, 20, 64])
@pytest.mark.parametrize(("vocabulary", "beyond"), [(70, 5), (2112, 0), (8192, 300), (8192 + 37, 0), (8192 + 37, 5)])
def test_the_largest_are_those_of_a_stable_sort(vocabulary, beyond, k):
    count = max(vocabulary - beyond, 65)
    top = jax.jit(functools.partial(cpu.top, k=k, count=count))
    for kind in ("apart", "ties", "flat", "masked", "rising", "falling"):
        x = logits_that_are(kind, vocabulary)
        values, ids = top(x)
        known = np.where(np.arange(vocabulary) < count, x, -np.inf)
        order = np.argsort(-known, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(ids, order, err_msg=kind)
        np.testing.assert_array_equal(values, np.take_along_axis(known, order, axis=1), err_msg=kind)
        assert ids.dtype == np.int32


def logits_that_are(kind, vocabulary):
    rng = np.random.default_rng(vocabulary)
    x = rng.standard_normal((5, vocabulary)).astype(np.float32)
    if kind == "ties":
        x = np.round(x) + 0.0  # no -0.0, which XLA takes for less than 0.0
    if kind == "flat":
        x[:] = 2.5
    if kind == "masked":  # a grammar leaves few
        x = np.where(rng.random(x.shape) < 4 / vocabulary, x, -np.inf).astype(np.float32)
    if kind in ("rising", "falling"):
        x = np.sort(x, axis=1)[:, :: 1 if kind == "rising" else -1].copy()
    return x

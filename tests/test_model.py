"""The network against live transformers, through files on disk, over a grid of shapes, switches and batch layouts."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qwen3_jax import cache as kv_cache
from qwen3_jax import model
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops.plain import ORACLE
from tests import tiny
from tests.run import Network

ATOL = 2e-5  # float32, tiny models: what separates two summation orders
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_FULL = YARN | {"attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
YARN_MSCALE = YARN | {"mscale": 1.3, "mscale_all_dim": 0.7}

GRID = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "one kv head for eight": {"num_attention_heads": 8, "num_key_value_heads": 1, "rope_theta": 1e4},
    "theta 5e6": {"rope_theta": 5e6, "rms_norm_eps": 1e-3},
    "yarn": {"rope_scaling": YARN, "rope_theta": 1e4},
    "yarn, every factor given": {"rope_scaling": YARN_FULL},
    "yarn, mscale": {"rope_scaling": YARN_MSCALE},
    "yarn, factor from the lengths": {"rope_scaling": YARN | {"factor": None}},
    "moe": {"moe": True},
    "moe, no renormalisation": {"moe": True, "norm_topk_prob": False, "tie_word_embeddings": True},
    "moe, every second layer": {"moe": True, "decoder_sparse_step": 2},
    "moe, dense first layer": {"moe": True, "mlp_only_layers": [0], "rope_theta": 1e7},
    "moe, every expert, yarn": {"moe": True, "num_experts_per_tok": 8, "rope_scaling": YARN},
    "moe, one expert": {"moe": True, "num_experts_per_tok": 1},
}


def some_tokens(shape: tuple[int, int], vocab_size: int = 94, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder, hf = tiny.save(tmp_path_factory.mktemp("dense"))
    return Network(folder), hf


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder, hf = tiny.save(tmp_path_factory.mktemp("moe"), moe=True, norm_topk_prob=False)
    return Network(folder), hf


@pytest.mark.parametrize("case", GRID)
def test_logits_equal_transformers(case, tmp_path):
    folder, hf = tiny.save(tmp_path, **GRID[case])
    tokens = some_tokens((2, 17))
    expected = tiny.logits(hf, tokens)
    assert np.abs(expected).max() > 1  # a scale at which the tolerance means something
    chex.assert_trees_all_close(Network(folder).logits(tokens), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("formulation", ["oracle", "xla"])
def test_every_formulation_gives_the_same_network(formulation, tmp_path):
    folder, hf = tiny.save(tmp_path, moe=True, decoder_sparse_step=2)
    tokens = some_tokens((2, 9))
    actual = Network(folder, formulation=formulation).logits(tokens)
    chex.assert_trees_all_close(actual, tiny.logits(hf, tokens), atol=ATOL, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_padded_rows(side, kind, request):
    network, hf = request.getfixturevalue(kind)
    lengths, T = np.array([5, 11, 1]), 11
    index = np.arange(T)
    real = index >= T - lengths[:, None] if side == "left" else index < lengths[:, None]
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    tokens = np.where(real, some_tokens((3, T)), 94).astype(np.int32)
    actual = network.logits(tokens, positions=positions, segment_ids=real.astype(np.int32))
    expected = tiny.logits(hf, tokens, attention_mask=real.astype(np.int64), position_ids=positions.astype(np.int64))
    assert np.isfinite(actual).all()
    chex.assert_trees_all_close(actual[real], expected[real], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_packed_rows_equal_each_sequence_alone(kind, request):
    network, hf = request.getfixturevalue(kind)
    lengths = [[4, 7, 2], [1, 9]]
    packed = np.full((2, 14), 94, np.int32)
    segment_ids, positions = np.zeros_like(packed), np.zeros_like(packed)
    expected = []
    for b, row in enumerate(lengths):
        start = 0
        for s, length in enumerate(row):
            piece = some_tokens((1, length), seed=10 * b + s)
            where = (b, slice(start, start + length))
            packed[where], segment_ids[where], positions[where] = piece[0], s + 1, np.arange(length)
            expected.append((where, tiny.logits(hf, piece)[0]))
            start += length
    actual = network.logits(packed, positions=positions, segment_ids=segment_ids)
    for where, logits in expected:
        chex.assert_trees_all_close(actual[where], logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("first", [300, 40_960, 262_000, 1_000_000])
def test_positions_far_out(first, dense):
    network, hf = dense
    tokens = some_tokens((1, 12))
    # Gaps make relative distances large as well, which is where a wrong angle shows.
    positions = (first + np.arange(12) * 977)[None].astype(np.int32)
    # Without a mask transformers takes a gap between positions for the border of a packed sequence.
    expected = tiny.logits(
        hf, tokens, position_ids=positions.astype(np.int64), attention_mask=np.ones((1, 12), np.int64)
    )
    chex.assert_trees_all_close(network.logits(tokens, positions=positions), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_cached_run_equals_full_forward_for_every_split(kind, request):
    network, hf = request.getfixturevalue(kind)
    tokens = some_tokens((2, 6))
    expected = tiny.logits(hf, tokens)
    roomy = [[prefill] + [1] * (6 - prefill) for prefill in range(1, 5)] + [[2, 4], [1, 4, 1]]
    for pieces, capacity in [([5, 1], 6), *((pieces, 11) for pieces in roomy)]:
        actual = network.logits_in_pieces(tokens, pieces, capacity)
        chex.assert_trees_all_close(actual, expected, atol=ATOL, rtol=0)


def test_rows_of_a_cache_advance_on_their_own(dense):
    network, hf = dense
    tokens = some_tokens((3, 10))
    prompt, chosen = np.array([3, 6, 1]), 4
    cache = kv_cache.init(network.config, batch=3, capacity=10, dtype=jnp.float32, ops=network.ops)
    padded = np.where(np.arange(6) < prompt[:, None], tokens[:, :6], 94).astype(np.int32)
    _, cache = network._step(network.params, jnp.asarray(padded), jnp.zeros(3, jnp.int32), cache, True)
    expected = tiny.logits(hf, tokens)
    rows = np.arange(3)
    for step in range(chosen):
        at = prompt + step
        piece = jnp.asarray(tokens[rows, at][:, None])
        logits, cache = network._step(network.params, piece, jnp.asarray(at, jnp.int32), cache, False)
        chex.assert_trees_all_close(np.asarray(logits)[:, 0], expected[rows, at], atol=ATOL, rtol=0)


def test_embeddings_in_place_of_tokens(dense):
    network, hf = dense
    embeds = np.random.default_rng(3).standard_normal((2, 7, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = hf(inputs_embeds=torch.as_tensor(embeds), use_cache=False).logits.numpy()
    chex.assert_trees_all_close(network.taps(inputs_embeds=embeds)[0], expected, atol=ATOL, rtol=0)


def test_taps_equal_transformers_intermediates(moe):
    network, hf = moe
    tokens = some_tokens((2, 6))
    with torch.inference_mode():
        out = hf(
            input_ids=torch.as_tensor(tokens), output_hidden_states=True, output_router_logits=True, use_cache=False
        )
    _, values = network.taps("embed_tokens", "norm", "layers.*.output", "layers.*.mlp.router_*", tokens=tokens)
    hidden = [h.numpy() for h in out.hidden_states]
    chex.assert_trees_all_close(values["embed_tokens"], hidden[0], atol=0, rtol=0)
    # transformers' last hidden state is the normed one
    chex.assert_trees_all_close(values["layers.0.output"], hidden[1], atol=ATOL, rtol=0)
    chex.assert_trees_all_close(values["norm"], hidden[-1], atol=ATOL, rtol=0)
    for i, logits in enumerate(out.router_logits):
        router = logits.numpy().reshape(2, 6, -1)
        chex.assert_trees_all_close(values[f"layers.{i}.mlp.router_logits"], router, atol=ATOL, rtol=0)
        top = np.sort(np.argsort(-router, axis=-1)[..., :3], axis=-1)
        np.testing.assert_array_equal(np.sort(values[f"layers.{i}.mlp.router_experts"], axis=-1), top)


def test_taps_name_every_intermediate_and_only_what_matches(moe):
    network, _ = moe
    _, everything = network.taps("*", tokens=some_tokens((1, 3)))
    per_layer = {
        "input", "output", "self_attn.input", "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.context",
        "self_attn.output", "mlp.input", "mlp.router_logits", "mlp.router_weights", "mlp.router_experts", "mlp.output",
    }  # fmt: skip
    assert set(everything) == {"embed_tokens", "norm"} | {f"layers.{i}.{n}" for i in range(2) for n in per_layer}
    assert network.taps(tokens=some_tokens((1, 3)))[1] == {}


@pytest.mark.parametrize("kind", [{}, {"moe": True}])
def test_bfloat16(kind, tmp_path):
    """Bound: 4% of the largest logit from float32's, and no further from it than 1.5 times torch's own bfloat16."""
    folder, hf = tiny.save(tmp_path, dtype=torch.bfloat16, **kind)
    tokens = some_tokens((4, 32))
    expected = tiny.logits(tiny.cast(hf, torch.float32), tokens)
    theirs = np.abs(tiny.logits(tiny.cast(hf, torch.bfloat16), tokens) - expected)
    actual = Network(folder, dtype=jnp.bfloat16).logits(tokens)
    ours = np.abs(actual - expected)
    bound = 0.04 * np.abs(expected).max()
    if kind:  # a router tie that rounding flips moves a whole token: judge the typical token there
        ours, theirs = np.median(ours.max(-1)), np.median(theirs.max(-1))
        assert ours <= bound
        assert ours <= 1.5 * theirs
        return
    assert ours.max() <= bound
    assert ours.max() <= 1.5 * theirs.max()
    top = np.sort(expected, axis=-1)
    clear = top[..., -1] - top[..., -2] > 2 * bound
    assert clear.sum() > 10
    np.testing.assert_array_equal(actual.argmax(-1)[clear], expected.argmax(-1)[clear])


def test_parameters_may_stay_in_bfloat16_under_float32_compute(tmp_path):
    folder, hf = tiny.save(tmp_path, dtype=torch.bfloat16, moe=True)
    network = Network(folder)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), network.params)
    tokens = some_tokens((2, 8))
    wide = network.logits(tokens)
    network.params = narrow
    chex.assert_trees_all_close(network.logits(tokens), wide, atol=ATOL, rtol=0)
    chex.assert_trees_all_close(wide, tiny.logits(tiny.cast(hf, torch.float32), tokens), atol=ATOL, rtol=0)


def test_wrong_inputs_are_refused(dense):
    network, _ = dense
    tokens, positions = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="got neither"):
        network._forward(network.params, (), {"positions": positions})
    embeds = jnp.zeros((1, 2, 32))
    with pytest.raises(ValueError, match="got both"):
        network._forward(network.params, (), {"positions": positions, "tokens": tokens, "inputs_embeds": embeds})
    cache = kv_cache.init(network.config, batch=1, capacity=4, dtype=jnp.float32, ops=network.ops)
    with pytest.raises(ValueError, match="packed rows have no cache"):
        network._forward(
            network.params, (), {"positions": positions, "tokens": tokens, "segment_ids": tokens, "cache": cache}
        )


def by_shape() -> dict[tuple, list[str]]:
    """Group the released models by everything that gives an array its shape."""
    groups: dict[tuple, list[str]] = {}
    for name in Qwen3Config.names():
        c = Qwen3Config.from_name(name)
        size = (c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_experts, c.tie_word_embeddings)
        groups.setdefault(size, []).append(name)
    return groups


@pytest.mark.parametrize("names", by_shape().values(), ids=lambda names: names[0])
def test_every_released_size_builds_abstractly(names):
    """Each size's parameters, and a cached step of two of its layers, which are all alike, without allocating."""
    for name in names:
        _, abstract = model.declare(Qwen3Config.from_name(name), dtype=jnp.bfloat16, ops=ORACLE)
        counted = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract))
        assert counted == Qwen3Config.from_name(name).num_parameters()
    config = dataclasses.replace(Qwen3Config.from_name(names[0]), num_hidden_layers=2)
    graphdef, abstract = model.declare(config, dtype=jnp.bfloat16, ops=ORACLE)

    def step(params, tokens, positions, cache):
        network = model.nnx.merge(graphdef, params)
        hidden, cache = network(tokens, positions=positions, cache=cache)
        return network.logits(hidden[:, -1:]), cache

    ids = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    cache = jax.eval_shape(lambda: kv_cache.init(config, batch=2, capacity=16, dtype=jnp.bfloat16, ops=ORACLE))
    logits, after = jax.eval_shape(step, abstract, ids, ids, cache)
    chex.assert_shape(logits, (2, 1, config.vocab_size))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, cache)

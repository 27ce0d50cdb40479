"""Stacked layers: exact conversion, the same network as the list, remat that changes memory only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import model
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import for_platform
from qwen3_jax.placement import dotted
from qwen3_jax.train import stacked
from tests import train_reference as reference
from tests.tiny import MOE

FLOAT = jnp.dtype("float32")
OPS = for_platform("cpu")


def config_of(**changes) -> Qwen3Config:
    settings = MOE | {
        "model_type": "qwen3_moe", "rms_norm_eps": 1e-6, "rope_scaling": None, "hidden_act": "silu",
        "initializer_range": 0.1, "dtype": None, "router_aux_loss_coef": 0.001, "output_router_logits": False,
        "mlp_only_layers": (),
    }  # fmt: skip
    return Qwen3Config(**(settings | changes))


MIXED = config_of(num_hidden_layers=5, mlp_only_layers=(0, 3))


def network_of(config, **more):
    return stacked.Network(config, dtype=FLOAT, param_dtype=FLOAT, ops=OPS, **more)


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    """A thousand tokens of one id, gradient 1 each: in bfloat16, where 256 + 1 = 256, as in float32."""
    tokens = jnp.zeros((4, 256), jnp.int32).at[0, 0].set(3)
    for dtype in ("bfloat16", "float32"):
        slope = jax.grad(lambda table: jnp.sum(stacked.embed(OPS, table, tokens).astype(jnp.float32)))(
            jnp.zeros((5, 2), dtype)
        )
        assert slope.dtype == dtype
        expected = np.array([1023, 0, 0, 1, 0], np.float32)[:, None] * np.ones((1, 2))
        np.testing.assert_allclose(slope.astype(jnp.float32), expected, rtol=2**-8)


def test_runs_of_equal_layers():
    assert stacked.runs(MIXED) == {0: 1, 1: 2, 3: 1, 4: 1}
    assert stacked.runs(config_of(num_hidden_layers=4, decoder_sparse_step=2)) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert stacked.runs(Qwen3Config.from_name("Qwen3-8B")) == {0: 36}
    assert stacked.runs(Qwen3Config.from_name("Qwen3-30B-A3B")) == {0: 48}


def test_unstack_undoes_stack():
    _, abstract = model.declare(MIXED, dtype=FLOAT, ops=OPS)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)
    there = stacked.stack(MIXED, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), there) == jax.tree.map(
        lambda x: (x.shape, x.dtype), network_of(MIXED).abstract()
    )
    assert there["layers"][1]["mlp"]["router"].shape == (2, 8, 32)
    back = stacked.unstack(MIXED, there)
    assert dotted(back).keys() == dotted(params).keys()
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_network_is_the_one_that_serves():
    """Dense and MoE layers mixed, packed rows: hidden states and router values equal those of `model.Qwen3`."""
    config = config_of(num_hidden_layers=3, mlp_only_layers=(0,))
    graphdef, abstract = model.declare(config, dtype=FLOAT, ops=OPS)
    params = model.init(abstract, jax.random.key(0), initializer_range=0.1)
    arrays = reference.batch(np.random.default_rng(0), 4, 12)
    inputs = [jnp.asarray(arrays[name]) for name in ("tokens", "positions", "segment_ids")]

    @jax.jit
    def as_list(params):
        taps = model.Taps("layers.*.mlp.router_*")
        tokens, positions, segment_ids = inputs
        found, _ = nnx.merge(graphdef, params)(tokens, positions=positions, segment_ids=segment_ids, taps=taps)
        return found, taps.values

    expected, routers = as_list(params)
    network = network_of(config, groups=2)
    hidden, routing = jax.jit(network.hidden)(stacked.stack(config, params), *inputs)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=2e-6)
    assert routing is not None
    real = arrays["segment_ids"] != 0
    for row, layer in enumerate((1, 2)):
        logits = np.asarray(routers[f"layers.{layer}.mlp.router_logits"], np.float64)
        experts = np.asarray(routers[f"layers.{layer}.mlp.router_experts"])
        z = np.log(np.exp(logits).sum(-1))
        p = np.exp(logits - z[..., None])
        for group, rows in enumerate((slice(0, 2), slice(2, 4))):
            counts = np.bincount(experts[rows][real[rows]].reshape(-1), minlength=8)
            np.testing.assert_array_equal(routing.counts[row, group], counts)
            np.testing.assert_allclose(routing.probabilities[row, group], p[rows][real[rows]].sum(0), rtol=1e-5)
        assert float(routing.squares[row]) == pytest.approx((z**2)[real].sum(), rel=1e-5)
        assert float(routing.entropy[row]) == pytest.approx(-(p * np.log(p)).sum(-1)[real].sum(), rel=1e-5)


def test_random_parameters_are_those_of_the_model():
    config = config_of()
    _, abstract = model.declare(config, dtype=FLOAT, ops=OPS)
    expected = model.init(abstract, jax.random.key(3), initializer_range=config.initializer_range)
    found = stacked.unstack(config, network_of(config).init(jax.random.key(3)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_remat_changes_memory_and_not_gradients():
    small = {name: MIXED.to_dict()[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 8}
    special = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.1}
    config = dataclasses.replace(Qwen3Config.from_name("Qwen3-0.6B"), **small, **heads, **special)
    params = network_of(config).init(jax.random.key(0))
    arrays = reference.batch(np.random.default_rng(0), 4, 64)
    inputs = [jnp.asarray(arrays[name]) for name in ("tokens", "positions", "segment_ids")]
    memory, grads = {}, {}
    for policy in stacked.REMAT:
        network = network_of(config, remat=policy)
        slope = jax.jit(jax.grad(lambda p, n=network: jnp.sum(jnp.square(n.hidden(p, *inputs)[0][..., 0]))))
        compiled = slope.lower(params).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        memory[policy] = analysis.temp_size_in_bytes
        grads[policy] = compiled(params)
    assert memory["full"] < memory["dots"] < memory["none"]
    for policy in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max())),
            grads[policy],
            grads["none"],
        )


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="remat 'all' is no policy: use none, dots, full"):
        network_of(MIXED, remat="all")

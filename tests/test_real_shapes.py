"""One decoder layer of every released size, at its real widths, against transformers' own layer.

The bound is relative to the largest value, 1e-5: at real widths a float32 sum has thousands of terms, and two
summation orders part by about sqrt(terms) units in the last place.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen3Config as HFConfig
from transformers import Qwen3MoeConfig as HFMoeConfig
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

from qwen3_jax import model, ops
from qwen3_jax.config import Qwen3Config

pytestmark = pytest.mark.users_programs
T = 6
SIZES = ["Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B"]
EXPERT_SIZES = ["Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder-480B-A35B-Instruct"]
ALIGNED = 64  # bytes: such memory JAX takes as it is, and a layer of 32B has 2 GB
# A prime length: repeating it fills billions of weights in seconds and no two rows are alike.
BLOCK = np.random.default_rng(0).uniform(-1, 1, 1_048_573).astype(np.float32)


def weight(name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Fill a weight with uniform numbers of variance 1/fan_in, different for each name."""
    fan_in = np.prod(shape[1:]) if name == "o_proj" else shape[-1]
    block = np.roll(BLOCK, sum(map(ord, name)) * 7919 % BLOCK.size)
    block = 1 + 0.2 * block if "norm" in name else block * np.float32((3 / fan_in) ** 0.5)
    block, size = block.astype(dtype), math.prod(shape)
    memory = np.empty(size * block.itemsize + ALIGNED, np.uint8)
    whole = memory[-memory.ctypes.data % ALIGNED :][: size * block.itemsize].view(block.dtype)
    for start in range(0, size, BLOCK.size):
        whole[start : start + BLOCK.size] = block[: size - start]
    return jnp.asarray(whole.reshape(shape))


def layer_parameters(config: Qwen3Config, dtype: jnp.dtype) -> tuple[nnx.GraphDef, dict]:
    layer = model.DecoderLayer(config, 0, dtype=dtype, ops=ops.for_platform("cpu"))
    graphdef, state = nnx.split(layer)
    shapes = nnx.to_pure_dict(state)
    return graphdef, jax.tree_util.tree_map_with_path(lambda p, s: weight(p[-1].key, s.shape, dtype), shapes)


def run_layer(config: Qwen3Config, graphdef: nnx.GraphDef, params: dict, x: np.ndarray, positions: np.ndarray):
    @jax.jit
    def forward(params, x, positions):
        shared = model.Pass.of(config, positions, None)
        layer = nnx.merge(graphdef, params)
        taps = model.Taps("0.mlp.router_*", "0.mlp.input", "0.self_attn.output")
        out, _ = layer(x, shared, None, taps, "0")
        return out, taps.values

    return jax.tree.map(np.asarray, forward(params, jnp.asarray(x), jnp.asarray(positions)))


def hf_config(config: Qwen3Config):
    hf = (HFMoeConfig if config.num_experts else HFConfig)(**config.to_dict())
    hf._attn_implementation = "eager"
    return hf


def load(module: torch.nn.Module, name: str, array: jax.Array) -> None:
    """Give a module its float32 weight, out of the memory that JAX holds it in."""
    weight = torch.from_dlpack(array).float().reshape(module.get_parameter(name).shape)
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(weight, requires_grad=False))


def inputs(config: Qwen3Config) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(1).standard_normal((1, T, config.hidden_size)).astype(np.float32)
    return x, (30_000 + np.arange(T) * 131)[None].astype(np.int32)


def causal_mask() -> torch.Tensor:
    return torch.full((1, 1, T, T), torch.finfo(torch.float32).min).triu(1)


def assert_close_to_the_largest(actual: np.ndarray, expected: np.ndarray) -> None:
    chex.assert_trees_all_close(actual, expected, atol=1e-5 * float(np.abs(expected).max()), rtol=0)


def hf_attention_block(hf, modeling, params, x, positions):
    """Return transformers' attention output and the residual stream after it."""
    with torch.device("meta"):  # random numbers that `load` replaces would take seconds
        attention = modeling.__dict__[hf.__class__.__name__.replace("Config", "Attention")](hf, 0)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        load(attention, f"{name}.weight", params["self_attn"][name])
    norm = modeling.__dict__[hf.__class__.__name__.replace("Config", "RMSNorm")](hf.hidden_size, hf.rms_norm_eps)
    load(norm, "weight", params["input_layernorm"])
    rotary = modeling.__dict__[hf.__class__.__name__.replace("Config", "RotaryEmbedding")](hf)
    stream = torch.from_numpy(x)
    angles = rotary(stream, torch.from_numpy(positions.astype(np.int64)))
    out, _ = attention(norm(stream), position_embeddings=angles, attention_mask=causal_mask())
    load(norm, "weight", params["post_attention_layernorm"])
    return out, stream + out, norm(stream + out)


@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def test_dense_layer(name):
    config = Qwen3Config.from_name(name)
    graphdef, params = layer_parameters(config, jnp.float32)
    x, positions = inputs(config)
    actual, taps = run_layer(config, graphdef, params, x, positions)
    hf = hf_config(config)
    attention, stream, normed = hf_attention_block(hf, modeling_qwen3, params, x, positions)
    with torch.device("meta"):
        mlp = modeling_qwen3.Qwen3MLP(hf)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        load(mlp, f"{projection}.weight", params["mlp"][projection])
    assert_close_to_the_largest(taps["0.self_attn.output"], attention.numpy())
    assert_close_to_the_largest(actual, (stream + mlp(normed)).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERT_SIZES)
@torch.inference_mode()
def test_moe_layer(name):
    """All experts of the layer on our side; on theirs those that a position chose, or it would not fit."""
    config = Qwen3Config.from_name(name)
    graphdef, params = layer_parameters(config, jnp.bfloat16)
    x, positions = inputs(config)
    actual, _ = run_layer(config, graphdef, params, x, positions)
    hf = hf_config(config)
    _, stream, normed = hf_attention_block(hf, modeling_qwen3_moe, params, x, positions)
    router = modeling_qwen3_moe.Qwen3MoeTopKRouter(hf)
    load(router, "weight", params["mlp"]["router"])
    normed = normed.reshape(T, -1)
    _, weights, chosen = router(normed)
    hf.num_experts = config.num_experts_per_tok
    hf._experts_implementation = "eager"
    with torch.device("meta"):
        experts = modeling_qwen3_moe.Qwen3MoeExperts(hf)
    for i, ids in enumerate(chosen):
        stacks = {k: np.asarray(v[np.asarray(ids)]) for k, v in params["mlp"]["experts"].items()}
        gate, up, down = (torch.from_numpy(stacks[f"{k}_proj"].astype(np.float32)) for k in ("gate", "up", "down"))
        experts.gate_up_proj = torch.nn.Parameter(torch.cat([gate, up], dim=1), requires_grad=False)
        experts.down_proj = torch.nn.Parameter(down, requires_grad=False)
        stream[0, i] += experts(normed[i : i + 1], torch.arange(len(ids))[None], weights[i : i + 1])[0]
    assert_close_to_the_largest(actual, stream.numpy())

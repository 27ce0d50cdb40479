"""Numbers that need no PyTorch: weights from a formula, logits computed once in float64 numpy and in float32 torch.

The weights: tensor `name` with elements i = 0, 1, … in C order holds 0.5·sin(0.7i + 0.001i² + s), where s is the sum of
the name's character codes mod 97; norms hold 1 + 0.2·v of that. The expected values agree between the two references to
1.3e-6. They pin the network on a machine where transformers is not installed, and against a transformers that changes.
"""

import json

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen3_jax.config import Qwen3Config
from tests.run import Network

pytestmark = pytest.mark.users_programs
TOKENS = np.array([[1, 5, 9, 2, 7, 3, 11, 0]], np.int32)
BASE = {
    "model_type": "qwen3",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "eos_token_id": 31,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# (settings, logits[0,:3], logits[-1,:6], argmax per position, sum, sum of magnitudes, next-token loss, greedy next 6)
GOLDEN = {
    "dense": (
        {},
        [0.662006, 0.969257, 1.000680],
        [0.387153, 1.686519, 2.063664, 2.268208, 1.822027, -0.731623],
        [31, 11, 21, 25, 21, 21, 31, 31],
        (15.526083, 303.753216, 3.920795),
        [31, 21, 18, 18, 18, 18],
    ),
    "tied": (
        {"tie_word_embeddings": True},
        [0.535696, -0.019833, -0.412540],
        [1.492670, 1.055730, 0.449378, 0.760055, 2.005981, 2.074084],
        [19, 10, 19, 19, 29, 19, 5, 5],
        (15.114462, 248.317607, 4.308224),
        [5, 8, 10, 10, 10, 19],
    ),
    "yarn": (
        {"rope_theta": 1e4, "rope_scaling": YARN},
        [0.662006, 0.969257, 1.000680],
        [0.532452, 1.653712, 1.975655, 2.155859, 1.615561, -0.947338],
        [31, 11, 21, 25, 21, 21, 31, 31],
        (11.958227, 305.573581, 3.959385),
        [31, 21, 18, 18, 18, 18],
    ),
    "moe": (
        EXPERTS,
        [2.136144, 1.319828, 0.836066],
        [2.095412, 1.937817, 1.700494, 2.198131, 2.591234, 0.262074],
        [0, 11, 21, 25, 21, 21, 4, 21],
        (63.922971, 316.398673, 3.479893),
        [21, 25, 0, 3, 0, 21],
    ),
}


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    i = np.arange(np.prod(shape), dtype=np.float64)
    v = 0.5 * np.sin(0.7 * i + 0.001 * i * i + sum(map(ord, name)) % 97)
    return (1 + 0.2 * v if "norm" in name else v).astype(np.float32).reshape(shape)


def write_folder(folder, settings):
    """Write the formula's weights under the on-disk names, spelled out here on purpose."""
    config = BASE | settings
    D, F, H = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], D)
    for i in range(config["num_hidden_layers"]):
        layer, attn, mlp = f"model.layers.{i}", f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        shapes |= {f"{layer}.input_layernorm.weight": (D,), f"{layer}.post_attention_layernorm.weight": (D,)}
        shapes |= {f"{attn}.q_proj.weight": (q, D), f"{attn}.k_proj.weight": (kv, D), f"{attn}.v_proj.weight": (kv, D)}
        shapes |= {f"{attn}.o_proj.weight": (D, q), f"{attn}.q_norm.weight": (H,), f"{attn}.k_norm.weight": (H,)}
        feed_forwards = {mlp: F}
        if "num_experts" in config:
            shapes[f"{mlp}.gate.weight"] = (config["num_experts"], D)
            feed_forwards = {
                f"{mlp}.experts.{e}": config["moe_intermediate_size"] for e in range(config["num_experts"])
            }
        for prefix, width in feed_forwards.items():
            shapes |= {f"{prefix}.gate_proj.weight": (width, D), f"{prefix}.up_proj.weight": (width, D)}
            shapes[f"{prefix}.down_proj.weight"] = (D, width)
    save_file({name: formula(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("formulation", ["oracle", "cpu"])
@pytest.mark.parametrize("variant", GOLDEN)
def test_golden_numbers(variant, formulation, tmp_path):
    settings, first, last, argmax, (total, magnitude, loss), greedy = GOLDEN[variant]
    write_folder(tmp_path, settings)
    network = Network(tmp_path, formulation=formulation)
    assert network.config == Qwen3Config.from_file(tmp_path)
    tokens = np.zeros((1, 14), np.int32)  # the tail is for the greedy tokens; a causal network does not see it
    tokens[:, :8] = TOKENS
    logits = network.logits(tokens)[0, :8]
    chex.assert_trees_all_close(logits[0, :3], np.array(first, np.float32), atol=5e-6, rtol=0)
    chex.assert_trees_all_close(logits[-1, :6], np.array(last, np.float32), atol=5e-6, rtol=0)
    np.testing.assert_array_equal(logits.argmax(-1), argmax)
    assert logits.astype(np.float64).sum() == pytest.approx(total, abs=2e-4)
    assert np.abs(logits.astype(np.float64)).sum() == pytest.approx(magnitude, abs=2e-4)
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    assert -log_probs[np.arange(7), TOKENS[0, 1:]].mean() == pytest.approx(loss, abs=5e-6)
    for i, expected in enumerate(greedy, start=8):
        tokens[0, i] = network.logits(tokens)[0, i - 1].argmax()
        assert tokens[0, i] == expected

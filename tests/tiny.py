"""Tiny random Qwen3 models that transformers itself builds, runs and saves: the outside truth of most tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config as HFConfig
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM
from transformers import Qwen3MoeConfig as HFMoeConfig

DENSE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 95,
    "pad_token_id": 94,
}
MOE: dict[str, Any] = DENSE | {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def build(*, moe: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any):
    """Build a transformers model in eval mode whose weights, norms included, are random at a scale that matters."""
    settings = (MOE if moe else DENSE) | overrides
    rope = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")} | settings.pop("rope_scaling", {})
    config: Any = (HFMoeConfig if moe else HFConfig)(**settings, rope_parameters=rope, dtype=dtype)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = (Qwen3MoeForCausalLM if moe else Qwen3ForCausalLM)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else noise * weight.shape[-1] ** -0.5)
    return cast(model, dtype).eval()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast the weights in place; `model.to` would round the rope frequencies as well."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def save(folder: Path, **options: Any):
    """Build a tiny model, write it as transformers writes it, and return (folder, model)."""
    model = build(**options)
    model.save_pretrained(folder)
    return folder, model


def logits(model: Any, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    """Run transformers on tokens [B, T] and return float32 logits [B, T, V]."""
    tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
    with torch.inference_mode():
        return model(input_ids=torch.as_tensor(tokens), use_cache=False, **tensors).logits.float().numpy()

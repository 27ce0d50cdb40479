"""PyTorch's side: transformers' own layers, built and run one at a time.

config.json through transformers' reader, weights through safetensors' own reader: nothing here shares code with the
loader under test. The stream starts at `embed`, each `layer` call advances it, `norm` and `logits` end it. All results
are float32 numpy arrays (exact for bfloat16).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AttentionInterface, AutoConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

CAPTURE = "qwen3_jax_parity"


def _attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **settings: Any) -> Any:
    """Run transformers' eager attention and keep what went in: [B, heads, T, H] after norm and rope."""
    module.seen = {"q": query, "k": key, "v": value}
    return modeling_qwen3.eager_attention_forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(CAPTURE, _attention)


class Reference:
    """A folder as transformers computes it, in float32 or bfloat16, one layer in memory at a time."""

    def __init__(self, folder: Path, dtype: str):
        self.dtype = getattr(torch, dtype)
        self.config = AutoConfig.from_pretrained(folder)
        self.config._experts_implementation = "eager"
        moe = self.config.model_type == "qwen3_moe"
        self.modeling: Any = modeling_qwen3_moe if moe else modeling_qwen3
        self.prefix = "Qwen3Moe" if moe else "Qwen3"
        index = folder / "model.safetensors.index.json"
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._where = {
            name: shard for shard in shards or ["model.safetensors"] for name in list(self._shard(shard).keys())
        }

    def _shard(self, shard: str) -> Any:
        """Return an open file of the folder; `layer` closes them all, which takes their pages out of memory."""
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / shard, framework="pt")
        return self._open[shard]

    def _name(self, name: str) -> str:
        """Return the file's name for a tensor; a backbone saved by itself has no `model.`."""
        return name if name in self._where else name.removeprefix("model.")

    def _tensor(self, name: str) -> torch.Tensor:
        name = self._name(name)
        return self._shard(self._where[name]).get_tensor(name).to(self.dtype)

    def _rows(self, name: str) -> Any:
        name = self._name(name)
        return self._shard(self._where[name]).get_slice(name)

    def _make(self, kind: str, *args: Any) -> Any:
        """Build one of transformers' modules without allocating its weights."""
        with torch.device("meta"):
            return getattr(self.modeling, self.prefix + kind)(*args).eval()

    @torch.inference_mode()
    def embed(self, tokens: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        """Start the stream: tokens, positions, segment_ids [B, T] (segment 0 is padding) to embeddings [B, T, D]."""
        rows = self._rows("model.embed_tokens.weight")
        table = {token: rows[token : token + 1] for token in np.unique(tokens).tolist()}
        self.stream = torch.cat([table[token] for token in tokens.ravel().tolist()]).to(self.dtype)
        self.stream = self.stream.reshape(*tokens.shape, -1)
        self.config._attn_implementation = "eager"
        self.mask = create_causal_mask(
            config=self.config,
            inputs_embeds=self.stream,
            attention_mask=torch.from_numpy(segment_ids > 0),
            past_key_values=None,
        )
        rotary = getattr(self.modeling, self.prefix + "RotaryEmbedding")(self.config)
        self.angles = rotary(self.stream, torch.from_numpy(positions.astype(np.int64)))
        self.config._attn_implementation = CAPTURE
        return _numpy(self.stream)

    @torch.inference_mode()
    def layer(self, i: int) -> dict[str, np.ndarray]:
        """Run layer `i` on the stream; returns its intermediates under the names of `model.Taps`."""
        layer = self._make("DecoderLayer", self.config, i)
        layer.load_state_dict(dict(self._layer_state(layer, i)), assign=True)
        seen: dict[str, Any] = {}

        def keep(module: Any, name: str) -> None:
            module.register_forward_hook(lambda module, args, out: seen.__setitem__(name, out))

        keep(layer.input_layernorm, "self_attn.input")
        keep(layer.self_attn, "self_attn.output")
        keep(layer.post_attention_layernorm, "mlp.input")
        keep(layer.mlp, "mlp.output")
        if hasattr(layer.mlp, "gate"):
            keep(layer.mlp.gate, "mlp.router")
        self.stream = seen["output"] = layer(
            self.stream, attention_mask=self.mask, position_embeddings=self.angles, use_cache=False
        )
        seen["self_attn.output"] = seen["self_attn.output"][0]
        seen |= {f"self_attn.{name}": x.transpose(1, 2) for name, x in layer.self_attn.seen.items()}
        if "mlp.router" in seen:
            leading = self.stream.shape[:2]
            for name, x in zip(("logits", "weights", "experts"), seen.pop("mlp.router"), strict=True):
                seen[f"mlp.router_{name}"] = x.reshape(*leading, -1)
        self._open.clear()
        return {name: _numpy(x) for name, x in seen.items()}

    def _layer_state(self, layer: Any, i: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Read a layer's weights; in memory transformers stacks the experts, gate above up."""
        for name, parameter in layer.named_parameters():
            path = f"model.layers.{i}.{name}"
            if ".experts." not in name or self._name(path) in self._where:
                yield name, self._tensor(path)
                continue
            path, _, kind = path.rpartition(".")
            stacked = torch.empty(parameter.shape, dtype=self.dtype)
            for e, out in enumerate(stacked):
                parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                for part, target in zip(parts, out.chunk(len(parts)), strict=True):
                    target.copy_(self._tensor(f"{path}.{e}.{part}.weight"))
            yield name, stacked

    @torch.inference_mode()
    def norm(self) -> np.ndarray:
        """Apply the final norm to the stream."""
        norm = self._make("RMSNorm", self.config.hidden_size, self.config.rms_norm_eps)
        norm.load_state_dict({"weight": self._tensor("model.norm.weight")}, assign=True)
        self.stream = norm(self.stream)
        return _numpy(self.stream)

    @torch.inference_mode()
    def logits(self, begin: int, end: int) -> np.ndarray:
        """Return the logits [B, T, end - begin] of a stretch of the vocabulary."""
        rows = self._rows("model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight")
        return _numpy(torch.nn.functional.linear(self.stream, rows[begin:end].to(self.dtype)))


def _numpy(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.is_floating_point() else x).numpy()

"""Write the demo checkpoint that ships in the package: a true Hugging Face folder of a tiny, UNTRAINED Qwen3.

    python scripts/make_demo_folder.py [OUT]        # default: qwen3_jax/demo, about 1 MB

Everything a released folder has is here, small: grouped-query attention with a head_dim that is not hidden/heads, tied
embeddings, bfloat16, Qwen's tokenizer pipeline with its 26 added tokens, padded vocabulary rows, Qwen's chat template
(demo/chat_template.jinja, Apache-2.0, Qwen team), sampling defaults. The bytes are the same on every run: weights come
from numpy's frozen RandomState, merges from demo/corpus.txt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from qwen3_jax.text.tokenizer import SPLIT  # noqa: E402

SOURCE = REPO / "scripts" / "demo"
MERGES = 512
ROWS = 832  # embedding rows; the tokenizer uses 256 + MERGES + 26 = 794 of them, so that masking the rest matters

# Qwen3's added tokens in id order; decoding drops the special ones and keeps the plain ones.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += [f"<|{kind}_{end}|>" for kind in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
PLAIN += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 192, 3, 4, 2, 32


def tokenizer_files() -> tuple[dict[str, Any], dict[str, Any]]:
    """Train the merges; return tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.ByteLevel(**byte_level)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + MERGES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([(SOURCE / "corpus.txt").read_text(encoding="utf-8")], trainer)
    spec = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [
        {"id": 256 + MERGES + i, "content": content, **flags, "special": content in SPECIAL}
        for i, content in enumerate(SPECIAL + PLAIN)
    ]
    spec["added_tokens"] = tokens
    spec["decoder"] = spec["post_processor"]  # these two as the released file spells them
    spec["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens},
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "chat_template": (SOURCE / "chat_template.jinja").read_text(encoding="utf-8"),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return spec, settings


def model_config(endoftext: int, im_end: int) -> dict[str, Any]:
    """Return config.json, spelled as in the released folders (transformers 4.51)."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": endoftext,
        "eos_token_id": im_end,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": FFN,
        "max_position_embeddings": 4096,
        "max_window_layers": LAYERS,
        "model_type": "qwen3",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": ROWS,
    }


def weights() -> dict[str, np.ndarray]:
    """Draw the tensors under their file names: normal with deviation 0.02, norms one."""
    random = np.random.RandomState(0)  # its stream is frozen across numpy versions
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (HIDDEN,),
            layer + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            layer + "self_attn.q_norm.weight": (HEAD_DIM,),
            layer + "self_attn.k_norm.weight": (HEAD_DIM,),
            layer + "post_attention_layernorm.weight": (HIDDEN,),
            layer + "mlp.gate_proj.weight": (FFN, HIDDEN),
            layer + "mlp.up_proj.weight": (FFN, HIDDEN),
            layer + "mlp.down_proj.weight": (HIDDEN, FFN),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    return {
        name: (np.ones(shape) if len(shape) == 1 else 0.02 * random.standard_normal(shape)).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }


def write(folder: Path) -> None:
    """Write the five files."""
    spec, settings = tokenizer_files()
    ids = {t["content"]: t["id"] for t in spec["added_tokens"]}
    endoftext, im_end = ids["<|endoftext|>"], ids["<|im_end|>"]
    generation = {
        "bos_token_id": endoftext,
        "do_sample": True,
        "eos_token_id": [im_end, endoftext],
        "pad_token_id": endoftext,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.51.0",
    }
    files = {
        "config.json": model_config(endoftext, im_end),
        "generation_config.json": generation,
        "tokenizer.json": spec,
        "tokenizer_config.json": settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=1 if name == "tokenizer.json" else 2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(save(weights(), metadata={"format": "pt"}))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else REPO / "qwen3_jax" / "demo")

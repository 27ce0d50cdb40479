"""Write what the demo model needs before it is trained: tokenizer, chat template, config.json, generation_config.json.

    python scripts/demo_tokenizer.py [--kind moe] CORPUS OUT        # CORPUS as scripts/demo_corpus.py writes it

The mixture of experts has the dense model's active size: two of eight experts, each half as wide as its feed-forward.

The tokenizer is Qwen's pipeline (NFC, its split rule with single digits, byte-level BPE) and its 26 added tokens; only
the merges are trained here: on the start of every corpus file, the stop text and demo/corpus.txt.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from qwen3_jax.text.thinking import STOP_TEXT  # noqa: E402
from qwen3_jax.text.tokenizer import SPLIT  # noqa: E402

SOURCE = REPO / "scripts" / "demo"
SAMPLE = 8000  # lines of each corpus file
MERGES = 1750
ROWS = 2048  # embedding rows; the tokenizer uses 256 + MERGES + 26 = 2032, so that masking the rest matters
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": SHAPE["intermediate_size"] // 2,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}

# Qwen3's added tokens in id order; decoding drops the special ones and keeps the plain ones.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += [f"<|{kind}_{end}|>" for kind in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
PLAIN += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def texts(corpus: Path) -> Iterator[str]:
    """Yield what the merges are trained on, role names and soft switches included."""
    for path in sorted(corpus.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in itertools.islice(file, SAMPLE):
                example = json.loads(line)
                if "text" in example:
                    yield example["text"]
                for message in example.get("messages", ()):
                    yield f"{message['role']}\n{message['content']}\n"
                    yield message.get("reasoning_content", "")
    yield from [STOP_TEXT] * 200
    yield (SOURCE / "corpus.txt").read_text(encoding="utf-8")


def tokenizer_files(corpus: Path) -> tuple[dict[str, Any], dict[str, Any]]:
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
    tokenizer.train_from_iterator(texts(corpus), trainer)
    spec = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    first = len(spec["model"]["vocab"])
    if first != 256 + MERGES:
        raise ValueError(f"the corpus gives {first - 256} merges, the tokenizer needs {MERGES}: write a larger corpus")
    tokens = [
        {"id": first + i, "content": content, **flags, "special": content in SPECIAL}
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
        **SHAPE,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "max_window_layers": SHAPE["num_hidden_layers"],
        "model_type": "qwen3",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": ROWS,
    }


def write(corpus: Path, folder: Path, kind: str) -> None:
    """Write the four files."""
    spec, settings = tokenizer_files(corpus)
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
        "config.json": model_config(endoftext, im_end) | (EXPERTS if kind == "moe" else {}),
        "generation_config.json": generation,
        "tokenizer.json": spec,
        "tokenizer_config.json": settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=1 if name == "tokenizer.json" else 2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo model's tokenizer and configuration.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
    arguments = parser.parse_args()
    write(arguments.corpus, arguments.out, arguments.kind)

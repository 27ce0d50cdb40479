"""What keys of a config.json mean that are no fields of `Qwen3Config`, and which fields may be left out.

The names are those of transformers 4 and 5; `rope_scaling` reads those about RoPE.
"""

from typing import Any

MODEL_TYPES = ("qwen3", "qwen3_moe")

INERT: dict[str, str] = {
    "transformers_version": "records who wrote the file",
    "_name_or_path": "records where the file came from",
    "name_or_path": "records where the file came from",
    "_commit_hash": "records where the file came from",
    "unsloth_version": "records who wrote the file",
    "unsloth_fixed": "records who wrote the file",
    "tokenizer_class": "the tokenizer has its own files",
    "use_cache": "whether to keep a cache is the caller's choice here",
    "return_dict": "shape of a Python return value in transformers",
    "use_return_dict": "shape of a Python return value in transformers",
    "output_hidden_states": "intermediates are requested per call here",
    "output_attentions": "intermediates are requested per call here",
    "_attn_implementation": "which kernel transformers runs, same mathematics",
    "attn_implementation": "which kernel transformers runs, same mathematics",
    "_attn_implementation_autoset": "which kernel transformers runs, same mathematics",
    "_experts_implementation": "which kernel transformers runs, same mathematics",
    "experts_implementation": "which kernel transformers runs, same mathematics",
    "chunk_size_feed_forward": "memory trade-off in transformers, same mathematics",
    "torchscript": "PyTorch export option",
    "use_bfloat16": "TensorFlow option; dtype says what the file holds",
    "tf_legacy_loss": "TensorFlow option",
    "id2label": "names of classes; no classification head here",
    "label2id": "names of classes; no classification head here",
    "num_labels": "number of classes; no classification head here",
    "problem_type": "classification loss; no classification head here",
    "task_specific_params": "never read by a causal language model",
    "finetuning_task": "never read by a causal language model",
    "max_window_layers": "where sliding window would start; use_sliding_window true is refused",
}

# Features this network does not have: the values that mean "off" pass, any other value is refused with the reason.
# Leaving one of these keys out means "off" too, which is also the class default of transformers 4 and 5.
OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False,), "biases in attention are not supported; Qwen3 has none"),
    "qkv_bias": ((False,), "biases in attention are not supported; Qwen3 has none"),
    "mlp_bias": ((False,), "biases in the MLP are not supported; Qwen3 has none"),
    "use_qk_norm": ((True,), "Qwen3 always normalises queries and keys"),
    "attention_dropout": ((0.0,), "dropout is not supported; write 0.0"),
    "use_sliding_window": ((False,), "sliding-window attention is not supported; write false"),
    "shared_expert_intermediate_size": ((0, None), "shared experts are not supported; Qwen3-MoE has none"),
    "partial_rotary_factor": ((1.0, None), "RoPE covers the whole head in Qwen3; write 1.0"),
    "quantization_config": ((None,), "quantised checkpoints are not yet supported; use the unquantised one"),
    "compression_config": ((None,), "quantised checkpoints are not yet supported; use the unquantised one"),
    "auto_map": (
        (None,),
        "code shipped with a checkpoint is never executed; remove the key if the model is plain Qwen3",
    ),
    "pruned_heads": (({}, None), "pruned heads are not supported"),
    "per_layer_config": (({}, None), "layers with differing configs are not supported"),
    "dual_chunk_attention_config": (
        (None,),
        "dual chunk attention is not supported; use config.json, not config_1m.json",
    ),
    "sparse_attention_config": ((None,), "sparse prefill is not supported; use config.json, not config_1m.json"),
    "original_max_position_embeddings": ((None,), "move it into rope_scaling, where YaRN reads it"),
    "is_encoder_decoder": ((False,), "Qwen3 is a decoder"),
    "is_decoder": ((False, True), "Qwen3 is a decoder"),
    "add_cross_attention": ((False,), "cross attention is not supported"),
    "cross_attention_hidden_size": ((None,), "cross attention is not supported"),
    "tie_encoder_decoder": ((False,), "Qwen3 is a decoder"),
    "decoder_start_token_id": ((None,), "Qwen3 is a decoder"),
    "sep_token_id": ((None,), "the tokenizer's own files say which tokens are special"),
    "prefix": ((None, ""), "prompts are built from the chat template"),
} | {
    # transformers 4 could keep sampling settings in config.json; neutral values carry no information.
    key: (neutral, "move it to generation_config.json")
    for key, neutral in {
        "max_length": (20, None),
        "min_length": (0, None),
        "do_sample": (False, None),
        "early_stopping": (False, None),
        "num_beams": (1, None),
        "num_beam_groups": (1, None),
        "diversity_penalty": (0.0, None),
        "temperature": (1.0, None),
        "top_k": (50, None),
        "top_p": (1.0, None),
        "typical_p": (1.0, None),
        "repetition_penalty": (1.0, None),
        "length_penalty": (1.0, None),
        "no_repeat_ngram_size": (0, None),
        "encoder_no_repeat_ngram_size": (0, None),
        "bad_words_ids": (None,),
        "num_return_sequences": (1, None),
        "output_scores": (False, None),
        "return_dict_in_generate": (False, None),
        "forced_bos_token_id": (None,),
        "forced_eos_token_id": (None,),
        "remove_invalid_values": (False, None),
        "exponential_decay_length_penalty": (None,),
        "suppress_tokens": (None,),
        "begin_suppress_tokens": (None,),
    }.items()
}

ARCHITECTURES = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Model"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
}

# The only fields that a file may leave out, the value that this means, and why that is safe.
OMITTABLE: dict[str, tuple[Any, str]] = {
    "bos_token_id": (None, "the Coder files omit it; Qwen3 never prepends a bos token"),
    "pad_token_id": (None, "no released config.json has it; padding is masked, its id never matters"),
    "dtype": (None, "every tensor states its own dtype in the safetensors header"),
}

# transformers 5 spelling → the 4.x spelling that the released files use (rope_parameters is unfolded separately).
SPELLINGS = {"num_local_experts": "num_experts", "torch_dtype": "dtype"}

MOE_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "router_aux_loss_coef",
    "output_router_logits",
)

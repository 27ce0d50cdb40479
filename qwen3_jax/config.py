"""`Qwen3Config`: the Hugging Face config.json, read strictly and counted.

config.json → `from_file` (size, JSON, duplicate keys) → `from_dict` (spellings, refusals, omissions) → a frozen
dataclass that validates itself → parameter, FLOP and cache-byte counts. Every key of a file is honoured, listed as
inert with the reason, or refused by name; nothing is defaulted except the omissions that `OMITTABLE` lists. All
problems of a file are reported at once. Field names are Hugging Face's; letters: D hidden, N query heads,
K key/value heads, H head_dim, E experts,
C experts per token, L layers.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_TYPES = ("qwen3", "qwen3_moe")
DTYPES = ("bfloat16", "float16", "float32")
MAX_FILE_BYTES = 4 << 20  # released files are ~1 KB, FP8 ones with their module lists ~30 KB
MAX_DEPTH = 16


class ConfigError(ValueError):
    """An impossible or unsupported config; `problems` holds one line per problem, the message all of them."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


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


# Checks of single values return None if good, else the end of a sentence that starts "<key> is <value>: ".

Check = Callable[[Any], str | None]


def _whole(low: int, high: int) -> Check:
    return lambda v: None if type(v) is int and low <= v <= high else f"expected a whole number in {low}..{high}"


def _real(low: float, high: float, *, closed: bool = False) -> Check:
    """Accept a finite number between `low` (itself allowed only if `closed`) and `high`."""

    def check(v: Any) -> str | None:
        if type(v) in (int, float) and (low < v <= high or (closed and v == low)):  # NaN compares false
            return None
        return f"expected a number {'of at least' if closed else 'above'} {low:g} and at most {high:g}"

    return check


def _flag(v: Any) -> str | None:
    return None if type(v) is bool else "expected true or false"


def _one_of(*values: Any) -> Check:
    return lambda v: None if any(_same(v, w) for w in values) else "expected " + " or ".join(map(json.dumps, values))


def _or_null(check: Check) -> Check:
    return lambda v: None if v is None else (problem := check(v)) and f"{problem}, or null"


def _some(check: Check) -> Check:
    """Accept a list whose every item passes `check`."""

    def check_list(v: Any) -> str | None:
        if type(v) not in (list, tuple):
            return "expected a list"
        return next((f"{problem} for every item" for item in v if (problem := check(item))), None)

    return check_list


def _either(one: Check, many: Check) -> Check:
    return lambda v: many(v) if type(v) in (list, tuple) else one(v)


def _same(value: Any, other: Any) -> bool:
    """Compare JSON values without taking true for 1."""
    return (type(value) is bool) == (type(other) is bool) and value == other


def _show(value: Any) -> str:
    """Render any value on one short line."""
    if type(value) is int and abs(value) >= 10**40:  # str() of a very long int raises
        return "a number of more than 40 digits"
    try:
        text = (
            {True: "true", False: "false"}[value] if type(value) is bool else "null" if value is None else repr(value)
        )
    except ValueError:  # such a number inside a list
        return f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


_TOKEN = _whole(0, 2**31 - 1)

# Upper bounds are far above every released model and far below what overflows an index or a host.
FIELD_CHECKS: dict[str, Check] = {
    "model_type": _one_of(*MODEL_TYPES),
    "vocab_size": _whole(1, 2**24),
    "hidden_size": _whole(1, 2**20),
    "intermediate_size": _whole(1, 2**22),
    "num_hidden_layers": _whole(1, 2**12),
    "num_attention_heads": _whole(1, 2**12),
    "num_key_value_heads": _whole(1, 2**12),
    "head_dim": _whole(1, 2**12),
    "rms_norm_eps": _real(0.0, 1.0),
    "rope_theta": _real(1.0, 1e15),
    "rope_scaling": lambda v: None if v is None or isinstance(v, RopeScaling) else "expected a RopeScaling or null",
    "max_position_embeddings": _whole(1, 2**31 - 1),  # positions are int32
    "tie_word_embeddings": _flag,
    "hidden_act": _one_of("silu"),
    "initializer_range": _real(0.0, 1e3, closed=True),
    "bos_token_id": _or_null(_TOKEN),
    "eos_token_id": _or_null(_either(_TOKEN, _some(_TOKEN))),
    "pad_token_id": _or_null(_TOKEN),
    "dtype": _or_null(_one_of(*DTYPES)),
    "num_experts": _whole(1, 2**16),
    "num_experts_per_tok": _whole(1, 2**16),
    "moe_intermediate_size": _whole(1, 2**22),
    "norm_topk_prob": _flag,
    "decoder_sparse_step": _whole(1, 2**12),
    "mlp_only_layers": _some(_whole(0, 2**12)),
    "router_aux_loss_coef": _real(0.0, 1e3, closed=True),
    "output_router_logits": _flag,
}

ROPE_CHECKS: dict[str, Check] = {
    "rope_type": _one_of("yarn"),
    "factor": _real(1.0, 1e6, closed=True),
    "original_max_position_embeddings": _whole(1, 2**31 - 1),
    "attention_factor": _or_null(_real(0.0, 1e6)),
    "beta_fast": _real(0.0, 1e6),
    "beta_slow": _real(0.0, 1e6),
    "mscale": _or_null(_real(0.0, 1e6, closed=True)),
    "mscale_all_dim": _or_null(_real(0.0, 1e6, closed=True)),
    "truncate": _flag,
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Hold the YaRN parameters of a config.

    `factor` is always the number in effect: a null in the file has been resolved to max_position_embeddings /
    original_max_position_embeddings. `attention_factor` None means the formula of `rope.py`; mscale and
    mscale_all_dim count only when both are given and not 0. The defaults are those of the YaRN paper
    (arXiv 2309.00071) and of transformers.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        problems = _check_fields("rope_scaling.", vars(self), ROPE_CHECKS)
        if not problems and self.beta_fast <= self.beta_slow:
            problems = [f"rope_scaling.beta_fast {self.beta_fast} is not above beta_slow {self.beta_slow}: raise it"]
        if problems:
            raise ConfigError("RopeScaling", problems)
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return the config.json form: the three required keys and whatever differs from its default."""
        return {
            field.name: _short(value)
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or getattr(self, field.name) != field.default
            for value in [getattr(self, field.name)]
        }


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Describe one Qwen3 text model, dense or mixture of experts, in Hugging Face's names.

    Build it with `from_file`, `from_name` or `from_dict`; `dataclasses.replace` works and validates. A dense model has
    num_experts 0 and leaves the other expert fields alone. Raises ConfigError for every value that cannot be honoured.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # unused by a MoE model whose every layer has experts
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    hidden_act: str
    initializer_range: float
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None
    dtype: str | None  # of the file
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 0
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False

    def __post_init__(self):
        if problems := _problems(vars(self)):
            raise ConfigError("Qwen3Config", problems)
        for name in ("rms_norm_eps", "rope_theta", "initializer_range", "router_aux_loss_coef"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("eos_token_id", "mlp_only_layers"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "config.json") -> "Qwen3Config":
        """Read the contents of a config.json in transformers 4 or 5 spelling.

        `source` names the origin in messages. Raises ConfigError with every problem found, one line each.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(source, [f"expected a JSON object, got {type(data).__name__}"])
        if not _shallow(data):
            raise ConfigError(source, [f"nested deeper than {MAX_DEPTH} levels: not a config.json"])
        if data.get("model_type") not in MODEL_TYPES:
            found = f"is {_show(data['model_type'])}" if "model_type" in data else "is missing"
            raise ConfigError(source, [f"model_type {found}: this library reads {' and '.join(MODEL_TYPES)}"])
        values, problems = _read(data)
        problems += _problems(values, partial=True)
        if problems:
            raise ConfigError(source, problems)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "Qwen3Config":
        """Read a config.json, given itself or its folder; raises ConfigError."""
        path = Path(path)
        try:
            file = path / "config.json" if path.is_dir() else path
            if not file.is_file():
                raise ConfigError(str(file), ["no such file: expected a Hugging Face config.json or its folder"])
            if (size := file.stat().st_size) > MAX_FILE_BYTES:
                raise ConfigError(str(file), [f"{size} bytes, more than {MAX_FILE_BYTES}: not a config.json"])
            text = file.read_text(encoding="utf-8")
            data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except ConfigError:
            raise
        except RecursionError:
            raise ConfigError(str(path), [f"nested deeper than {MAX_DEPTH} levels: not a config.json"]) from None
        except OSError as error:
            raise ConfigError(str(path), [f"cannot be read: {error.strerror or error}"]) from None
        except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a NUL in the path, an over-long number
            raise ConfigError(str(path), [f"not valid JSON: {_show(str(error))}"]) from None
        return cls.from_dict(data, source=str(file))

    @classmethod
    def from_name(cls, name: str) -> "Qwen3Config":
        """Return the config of a released model, e.g. "Qwen3-0.6B" or "Qwen/qwen3-0.6b"; raises ConfigError."""
        wanted = name.lower().removeprefix("qwen/")
        for known in cls.names():
            if known.lower() == wanted:
                return cls.from_file(_models_folder() / f"{known}.json")
        raise ConfigError(_show(name), [f"no such model; the names are {', '.join(cls.names())}"])

    @staticmethod
    def names() -> tuple[str, ...]:
        """List the released models whose configs come with the library."""
        return tuple(sorted(path.stem for path in _models_folder().glob("*.json")))

    def to_dict(self) -> dict[str, Any]:
        """Return a config.json in transformers 4 spelling, which 4.x and 5.x both read; keys sorted."""
        data = dataclasses.asdict(self) | {
            "architectures": [ARCHITECTURES[self.model_type][0]],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_window_layers": self.num_hidden_layers,
            "rope_scaling": self.rope_scaling and self.rope_scaling.to_dict(),
            "rope_theta": _short(self.rope_theta),
            "sliding_window": None,
            "torch_dtype": self.dtype,
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
        }
        del data["dtype"]
        for name in OMITTABLE.keys() - {"dtype"} | {"torch_dtype"}:
            if data[name] is None:
                del data[name]
        if not self.num_experts:
            for name in MOE_FIELDS:
                del data[name]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(data.items())}

    def is_moe_layer(self, layer: int) -> bool:
        """Say whether layer `layer` (from 0) has experts (transformers' rule: sparse step, then mlp_only_layers)."""
        return (
            self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0 and layer not in self.mlp_only_layers
        )

    def num_parameters(self, *, embedding: bool = True) -> int:
        """Count all parameters, tied embeddings once; without embed_tokens and lm_head if not `embedding`."""
        return self._count(self.num_experts, embedding)

    def num_active_parameters(self, *, embedding: bool = True) -> int:
        """Count the parameters one token uses: all but the experts it is not routed to; `embedding` as above."""
        return self._count(self.num_experts_per_tok, embedding)

    def flops_per_token(self, context: int) -> int:
        """Count forward FLOPs (2 per multiply-add) for one token that attends to `context` positions, itself included.

        Matrix products only: projections, router, chosen experts, lm_head, and scores and values of attention. A causal
        prompt of T tokens averages context (T + 1) / 2.
        """
        norms = self.num_hidden_layers * 2 * (self.hidden_size + self.head_dim) + self.hidden_size
        weights = self._count(self.num_experts_per_tok, False) - norms + self.vocab_size * self.hidden_size
        attention = 2 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * context
        return 2 * (weights + attention)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Count the bytes one cached position takes over all layers, keys and values of `itemsize` bytes."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize

    def _count(self, experts: int, embedding: bool) -> int:
        """Count parameters with `experts` experts in each MoE layer; the router always has all its rows."""
        D, H, L = self.hidden_size, self.head_dim, self.num_hidden_layers
        attention = 2 * D * H * (self.num_attention_heads + self.num_key_value_heads) + 2 * H
        moe_layers = sum(map(self.is_moe_layer, range(L)))
        moe = D * self.num_experts + experts * 3 * D * self.moe_intermediate_size
        dense = 3 * D * self.intermediate_size
        backbone = L * (attention + 2 * D) + moe_layers * moe + (L - moe_layers) * dense + D
        return backbone + embedding * (1 if self.tie_word_embeddings else 2) * self.vocab_size * D


def _read(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translate the keys of a config.json into fields; returns them with the problems found on the way."""
    moe = data["model_type"] == "qwen3_moe"
    names = [field.name for field in dataclasses.fields(Qwen3Config) if moe or field.name not in MOE_FIELDS]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in data.items():
        name = SPELLINGS.get(key, key)
        if name in names and name not in ("rope_theta", "rope_scaling"):
            # Of two spellings a null gives way; two values must agree.
            if values.get(name) is not None and value is not None and not _same(values[name], value):
                other = next(k for k in data if k != key and SPELLINGS.get(k, k) == name)
                problems.append(f"{key} is {_show(value)} but {other} is {_show(data[other])}: keep one of the two")
            elif values.get(name) is None:
                values[name] = value
        elif key == "architectures":
            known = ARCHITECTURES[data["model_type"]]
            if value is not None and not (isinstance(value, list) and len(value) == 1 and value[0] in known):
                problems.append(f"architectures is {_show(value)}: expected one of {', '.join(known)}")
        elif key == "sliding_window":
            if value is not None and data.get("use_sliding_window") is not False:
                problems.append(f'sliding_window is {_show(value)}: write null, or "use_sliding_window": false')
        elif key == "layer_types":
            if value is not None and value != ["full_attention"] * len(value if isinstance(value, list) else ""):
                odd = next((t for t in value if t != "full_attention"), None) if isinstance(value, list) else value
                problems.append(f"layer_types has {_show(odd)}: every layer must be full_attention")
            elif value is not None and len(value) != data.get("num_hidden_layers"):
                problems.append(
                    f"layer_types has {len(value)} items but num_hidden_layers is "
                    f"{_show(data.get('num_hidden_layers'))}: make them equal"
                )
        elif key in OFF:
            neutral, remedy = OFF[key]
            if not any(_same(value, off) for off in neutral):
                problems.append(f"{key} is {_show(value)}: {remedy}")
        elif key not in INERT and key not in ("rope_theta", "rope_scaling", "rope_parameters"):
            problems.append(
                f"{name} is {_show(value)}: only model_type qwen3_moe has experts"
                if name in MOE_FIELDS
                else f"unknown key {_show(key)}: remove it if it has no meaning"
            )
    if values.get("mlp_only_layers", ()) is None:
        values["mlp_only_layers"] = []  # transformers writes null for "none"
    values |= _read_rope(data, problems)
    for name, (meaning, _) in OMITTABLE.items():
        values.setdefault(name, meaning)
    missing = [name for name in names if name not in values]
    if "head_dim" in missing:
        missing.remove("head_dim")
        problems.append("head_dim is missing: write it out (128 in every released Qwen3; not hidden_size / heads)")
    if "rope_scaling" in missing:
        missing.remove("rope_scaling")
        problems.append("rope_scaling is missing: write null for plain RoPE")
    problems += [f"{name} is missing: write it out; nothing is defaulted" for name in missing]
    return values, problems


def _read_rope(data: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Merge rope_theta, rope_scaling (4.x) and rope_parameters (5.x) into the two fields; appends to `problems`."""
    thetas: dict[str, Any] = {"rope_theta": data["rope_theta"]} if "rope_theta" in data else {}
    scalings: dict[str, RopeScaling | None] = {}
    failed = False
    for key in ("rope_scaling", "rope_parameters"):
        value = data.get(key)
        if value is not None and not isinstance(value, Mapping):
            problems.append(f"{key} is {_show(value)}: expected an object or null")
            failed = True
        elif value is not None:
            if "rope_theta" in value:
                thetas[f"{key}.rope_theta"] = value["rope_theta"]
            before = len(problems)
            scalings[key] = _read_scaling(key, value, data, problems)
            failed |= len(problems) > before
        elif key in data and key == "rope_scaling":
            scalings[key] = None
    fields: dict[str, Any] = {}
    for name, found in (("rope_theta", thetas), ("rope_scaling", scalings)):
        (first, value), *rest = [*found.items()] or [("", None)]
        for key, other in rest:
            if not failed and not _same(value, other):
                shown = [v.to_dict() if isinstance(v, RopeScaling) else v for v in (value, other)]
                problems.append(f"{first} is {_show(shown[0])} but {key} is {_show(shown[1])}: keep one of the two")
        if found:
            fields[name] = value
    if failed:
        fields["rope_scaling"] = None  # reported already; not missing
    return fields


def _read_scaling(
    key: str, value: Mapping[str, Any], data: Mapping[str, Any], problems: list[str]
) -> RopeScaling | None:
    """Read one RoPE dict, None for plain RoPE; appends to `problems`."""
    kinds = {name: value[name] for name in ("rope_type", "type") if name in value}
    if len(kinds) == 2 and not _same(kinds["rope_type"], kinds["type"]):
        problems.append(
            f"{key}.rope_type is {_show(kinds['rope_type'])} but {key}.type is {_show(kinds['type'])}: "
            "keep one of the two"
        )
        return None
    kind = next(iter(kinds.values()), None)
    if kind not in ("default", "yarn"):
        found = f"is {_show(kind)}" if kinds else "is missing"
        problems.append(f"{key}.rope_type {found}: supported are default and yarn")
        return None
    neutral, remedy = OFF["partial_rotary_factor"]
    if not any(_same(value.get("partial_rotary_factor"), off) for off in neutral):
        problems.append(f"{key}.partial_rotary_factor is {_show(value['partial_rotary_factor'])}: {remedy}")
    yarn = {name: value[name] for name in ROPE_CHECKS if name in value} if kind == "yarn" else {}
    for name in value:
        if name not in yarn and name not in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
            problems.append(f"{key}.{name}: unknown key for rope_type {kind}; remove it if it has no meaning")
    if kind == "default":
        return None
    yarn["rope_type"] = "yarn"
    for name in ("beta_fast", "beta_slow"):  # transformers takes null for its default
        if yarn.get(name, 0) is None:
            del yarn[name]
    before = len(problems)
    if yarn.get("original_max_position_embeddings") is None:
        # transformers fills in max_position_embeddings (40,960 in the hybrids), which is not the trained length
        yarn.pop("original_max_position_embeddings", None)
        problems.append(
            f"{key}.original_max_position_embeddings is missing: write the length the model was trained for "
            "(32768 for the hybrid Qwen3 models)"
        )
    problems += _check_fields(f"{key}.", {k: v for k, v in yarn.items() if (k, v) != ("factor", None)}, ROPE_CHECKS)
    if "factor" not in yarn:
        problems.append(f"{key}.factor is missing: write it, or null for the ratio of the two lengths")
    if len(problems) > before:
        return None
    if yarn["factor"] is None:
        longest, trained = data.get("max_position_embeddings"), yarn["original_max_position_embeddings"]
        if FIELD_CHECKS["max_position_embeddings"](longest):
            return None  # reported as a field
        if longest < trained:
            problems.append(
                f"{key}.factor is null and max_position_embeddings {longest} is below "
                f"original_max_position_embeddings {trained}: write the factor"
            )
            return None
        yarn["factor"] = longest / trained
    try:
        return RopeScaling(**yarn)
    except ConfigError as error:
        problems += error.problems
        return None


def _check_fields(prefix: str, values: Mapping[str, Any], checks: Mapping[str, Check]) -> list[str]:
    return [
        f"{prefix}{name} is {_show(value)}: {problem}"
        for name, value in values.items()
        if (problem := checks[name](value))
    ]


def _problems(values: Mapping[str, Any], *, partial: bool = False) -> list[str]:
    """List what is wrong with the fields in `values` by themselves and together; `partial` if some may be missing."""
    moe = values["model_type"] == "qwen3_moe"
    good = {}
    problems = []
    for name, value in values.items():
        if not moe and name in MOE_FIELDS:
            if not _same(value, Qwen3Config.__dataclass_fields__[name].default):
                problems.append(f"{name} is {_show(value)}: only model_type qwen3_moe has experts")
        elif problem := FIELD_CHECKS[name](value):
            problems.append(f"{name} is {_show(value)}: {problem}")
        else:
            good[name] = value
    assert partial or len(values) == len(dataclasses.fields(Qwen3Config))

    def has(*names: str) -> bool:
        return all(name in good for name in names)

    if has("num_attention_heads", "num_key_value_heads"):
        N, K = good["num_attention_heads"], good["num_key_value_heads"]
        if N % K:
            problems.append(f"num_attention_heads {N} is not a multiple of num_key_value_heads {K}: change one of them")
    if has("head_dim") and good["head_dim"] % 2:
        problems.append(f"head_dim is {good['head_dim']}: RoPE turns pairs of channels; write an even number")
    if has("num_experts", "num_experts_per_tok"):
        E, C = good["num_experts"], good["num_experts_per_tok"]
        if C > E:
            problems.append(f"num_experts_per_tok {C} is more than num_experts {E}: lower it")
    if has("num_hidden_layers", "mlp_only_layers"):
        L = good["num_hidden_layers"]
        problems += [
            f"mlp_only_layers has {layer}: num_hidden_layers is {L}, so layers are 0..{L - 1}"
            for layer in sorted(set(good["mlp_only_layers"]))
            if layer >= L
        ]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if has(name, "vocab_size") and good[name] is not None:
            ids = good[name] if isinstance(good[name], list | tuple) else [good[name]]
            problems += [
                f"{name} has {token}: vocab_size is {good['vocab_size']}, so ids are 0..{good['vocab_size'] - 1}"
                for token in ids
                if token >= good["vocab_size"]
            ]
    return problems


def _models_folder() -> Path:
    """Find configs/models: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    for root in (package, package.parent):
        if (root / "configs" / "models").is_dir():
            return root / "configs" / "models"
    raise ConfigError(str(package), ["configs/models is missing: reinstall qwen3-jax"])


def _short(value: Any) -> Any:
    """Return a whole float as an int, as the released files write it (1000000, not 1000000.0)."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) >= 1e5 else value


def _shallow(data: Mapping[str, Any]) -> bool:
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for node in level
            if isinstance(node, Mapping | list | tuple)
            for item in (node.values() if isinstance(node, Mapping) else node)
        ]
    return not any(isinstance(node, Mapping | list | tuple) for node in level)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {_show(twice)} appears twice")
    return data


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")

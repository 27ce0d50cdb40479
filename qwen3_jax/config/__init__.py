"""`Qwen3Config`: the Hugging Face config.json, read strictly and counted.

config.json → `file` (size, JSON, duplicate keys) → `from_dict` (spellings, refusals, omissions) → a frozen dataclass
that validates itself → parameter, FLOP and cache-byte counts. Every key of a file is honoured, listed in `keys` as
inert with the reason, or refused by name; nothing is defaulted except the omissions that `OMITTABLE` lists. All
problems of a file are reported at once. Field names are Hugging Face's; letters: D hidden, N query heads, K key/value
heads, H head_dim, E experts, C experts per token, L layers.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_jax.config.checks import (
    LENGTH,
    Check,
    ConfigError,
    either,
    flag,
    one_of,
    or_null,
    real,
    same,
    short,
    show,
    some,
    whole,
)
from qwen3_jax.config.file import MAX_DEPTH, MAX_FILE_BYTES, read_json, shallow
from qwen3_jax.config.keys import ARCHITECTURES, INERT, MODEL_TYPES, MOE_FIELDS, OFF, OMITTABLE, SPELLINGS
from qwen3_jax.config.rope_scaling import RopeScaling, read_rope

__all__ = ["FIELD_CHECKS", "INERT", "MAX_FILE_BYTES", "OFF", "OMITTABLE", "ConfigError", "Qwen3Config", "RopeScaling"]

DTYPES = ("bfloat16", "float16", "float32")
TOKEN = whole(0, 2**31 - 1)

# Upper bounds are far above every released model and far below what overflows an index or a host.
FIELD_CHECKS: dict[str, Check] = {
    "model_type": one_of(*MODEL_TYPES),
    "vocab_size": whole(1, 2**24),
    "hidden_size": whole(1, 2**20),
    "intermediate_size": whole(1, 2**22),
    "num_hidden_layers": whole(1, 2**12),
    "num_attention_heads": whole(1, 2**12),
    "num_key_value_heads": whole(1, 2**12),
    "head_dim": whole(1, 2**12),
    "rms_norm_eps": real(0.0, 1.0),
    "rope_theta": real(1.0, 1e15),
    "rope_scaling": lambda v: None if v is None or isinstance(v, RopeScaling) else "expected a RopeScaling or null",
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": flag,
    "hidden_act": one_of("silu"),
    "initializer_range": real(0.0, 1e3, closed=True),
    "bos_token_id": or_null(TOKEN),
    "eos_token_id": or_null(either(TOKEN, some(TOKEN))),
    "pad_token_id": or_null(TOKEN),
    "dtype": or_null(one_of(*DTYPES)),
    "num_experts": whole(1, 2**16),
    "num_experts_per_tok": whole(1, 2**16),
    "moe_intermediate_size": whole(1, 2**22),
    "norm_topk_prob": flag,
    "decoder_sparse_step": whole(1, 2**12),
    "mlp_only_layers": some(whole(0, 2**12)),
    "router_aux_loss_coef": real(0.0, 1e3, closed=True),
    "output_router_logits": flag,
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
        if not shallow(data):
            raise ConfigError(source, [f"nested deeper than {MAX_DEPTH} levels: not a config.json"])
        if data.get("model_type") not in MODEL_TYPES:
            found = f"is {show(data['model_type'])}" if "model_type" in data else "is missing"
            raise ConfigError(source, [f"model_type {found}: this library reads {' and '.join(MODEL_TYPES)}"])
        values, problems = _read(data)
        problems += _problems(values, partial=True)
        if problems:
            raise ConfigError(source, problems)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "Qwen3Config":
        """Read a config.json, given itself or its folder; raises ConfigError."""
        data, source = read_json(Path(path))
        return cls.from_dict(data, source=source)

    @classmethod
    def from_name(cls, name: str) -> "Qwen3Config":
        """Return the config of a released model, e.g. "Qwen3-0.6B" or "Qwen/qwen3-0.6b"; raises ConfigError."""
        wanted = name.lower().removeprefix("qwen/")
        for known in cls.names():
            if known.lower() == wanted:
                return cls.from_file(_models_folder() / f"{known}.json")
        raise ConfigError(show(name), [f"no such model; the names are {', '.join(cls.names())}"])

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
            "rope_theta": short(self.rope_theta),
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
            if values.get(name) is not None and value is not None and not same(values[name], value):
                other = next(k for k in data if k != key and SPELLINGS.get(k, k) == name)
                problems.append(f"{key} is {show(value)} but {other} is {show(data[other])}: keep one of the two")
            elif values.get(name) is None:
                values[name] = value
        elif key == "architectures":
            known = ARCHITECTURES[data["model_type"]]
            if value is not None and not (isinstance(value, list) and len(value) == 1 and value[0] in known):
                problems.append(f"architectures is {show(value)}: expected one of {', '.join(known)}")
        elif key == "sliding_window":
            if value is not None and data.get("use_sliding_window") is not False:
                problems.append(f'sliding_window is {show(value)}: write null, or "use_sliding_window": false')
        elif key == "layer_types":
            if value is not None and value != ["full_attention"] * len(value if isinstance(value, list) else ""):
                odd = next((t for t in value if t != "full_attention"), None) if isinstance(value, list) else value
                problems.append(f"layer_types has {show(odd)}: every layer must be full_attention")
            elif value is not None and len(value) != data.get("num_hidden_layers"):
                problems.append(
                    f"layer_types has {len(value)} items but num_hidden_layers is "
                    f"{show(data.get('num_hidden_layers'))}: make them equal"
                )
        elif key in OFF:
            neutral, remedy = OFF[key]
            if not any(same(value, off) for off in neutral):
                problems.append(f"{key} is {show(value)}: {remedy}")
        elif key not in INERT and key not in ("rope_theta", "rope_scaling", "rope_parameters"):
            problems.append(
                f"{name} is {show(value)}: only model_type qwen3_moe has experts"
                if name in MOE_FIELDS
                else f"unknown key {show(key)}: remove it if it has no meaning"
            )
    if values.get("mlp_only_layers", ()) is None:
        values["mlp_only_layers"] = []  # transformers writes null for "none"
    values |= read_rope(data, problems)
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


def _problems(values: Mapping[str, Any], *, partial: bool = False) -> list[str]:
    """List what is wrong with the fields in `values` by themselves and together; `partial` if some may be missing."""
    moe = values["model_type"] == "qwen3_moe"
    good = {}
    problems = []
    for name, value in values.items():
        if not moe and name in MOE_FIELDS:
            if not same(value, Qwen3Config.__dataclass_fields__[name].default):
                problems.append(f"{name} is {show(value)}: only model_type qwen3_moe has experts")
        elif problem := FIELD_CHECKS[name](value):
            problems.append(f"{name} is {show(value)}: {problem}")
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
    for root in Path(__file__).parents[:3]:
        if (root / "configs" / "models").is_dir():
            return root / "configs" / "models"
    raise ConfigError(str(Path(__file__).parent), ["configs/models is missing: reinstall qwen3-jax"])

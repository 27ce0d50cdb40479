"""`RopeScaling`, and the three ways in which a config.json may write it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_jax.config.checks import LENGTH, Check, ConfigError, flag, one_of, or_null, real, same, short, show, wrong
from qwen3_jax.config.keys import OFF

ROPE_CHECKS: dict[str, Check] = {
    "rope_type": one_of("yarn"),
    "factor": real(1.0, 1e6, closed=True),
    "original_max_position_embeddings": LENGTH,
    "attention_factor": or_null(real(0.0, 1e6)),
    "beta_fast": real(0.0, 1e6),
    "beta_slow": real(0.0, 1e6),
    "mscale": or_null(real(0.0, 1e6, closed=True)),
    "mscale_all_dim": or_null(real(0.0, 1e6, closed=True)),
    "truncate": flag,
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
        problems = wrong("rope_scaling.", vars(self), ROPE_CHECKS)
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
            field.name: short(value)
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or getattr(self, field.name) != field.default
            for value in [getattr(self, field.name)]
        }


def read_rope(data: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Merge rope_theta, rope_scaling (4.x) and rope_parameters (5.x) into the two fields; appends to `problems`."""
    thetas: dict[str, Any] = {"rope_theta": data["rope_theta"]} if "rope_theta" in data else {}
    scalings: dict[str, RopeScaling | None] = {}
    failed = False
    for key in ("rope_scaling", "rope_parameters"):
        value = data.get(key)
        if value is not None and not isinstance(value, Mapping):
            problems.append(f"{key} is {show(value)}: expected an object or null")
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
            if not failed and not same(value, other):
                shown = [v.to_dict() if isinstance(v, RopeScaling) else v for v in (value, other)]
                problems.append(f"{first} is {show(shown[0])} but {key} is {show(shown[1])}: keep one of the two")
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
    if len(kinds) == 2 and not same(kinds["rope_type"], kinds["type"]):
        problems.append(
            f"{key}.rope_type is {show(kinds['rope_type'])} but {key}.type is {show(kinds['type'])}: "
            "keep one of the two"
        )
        return None
    kind = next(iter(kinds.values()), None)
    if kind not in ("default", "yarn"):
        found = f"is {show(kind)}" if kinds else "is missing"
        problems.append(f"{key}.rope_type {found}: supported are default and yarn")
        return None
    neutral, remedy = OFF["partial_rotary_factor"]
    if not any(same(value.get("partial_rotary_factor"), off) for off in neutral):
        problems.append(f"{key}.partial_rotary_factor is {show(value['partial_rotary_factor'])}: {remedy}")
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
    problems += wrong(f"{key}.", {k: v for k, v in yarn.items() if (k, v) != ("factor", None)}, ROPE_CHECKS)
    if "factor" not in yarn:
        problems.append(f"{key}.factor is missing: write it, or null for the ratio of the two lengths")
    if len(problems) > before:
        return None
    if yarn["factor"] is None:
        longest, trained = data.get("max_position_embeddings"), yarn["original_max_position_embeddings"]
        if LENGTH(longest):
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

"""`SamplingParams`: how to continue one prompt, checked on construction. Pure Python, no JAX import."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

LOGPROBS = 20  # most alternatives per token, as in the OpenAI API


class SamplingError(ValueError):
    """A sampling parameter out of range, or a generation_config.json that cannot be honoured."""


def _option(default: Any, help: str) -> Any:
    metadata = {"help": help}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt; checked on construction.

    The defaults draw from the model's own distribution. `from_generation_config` gives those of a model folder. The
    `help` in each field's metadata is its documentation, the command line shows the same text.

    Raises:
        SamplingError: a value of the wrong type or out of range; the message names the field, the value and the range.
    """

    temperature: float = _option(1.0, "0 is greedy, 1 the model's own distribution, at most 2")
    top_k: int = _option(0, "draw from the k most probable tokens; 0 or -1 is off")
    top_p: float = _option(1.0, "draw from the most probable tokens whose probabilities reach this sum; 1 is off")
    min_p: float = _option(0.0, "drop tokens below this fraction of the largest probability; 0 is off")
    presence_penalty: float = _option(0.0, "subtract from the logit of every token generated before, -2 to 2")
    frequency_penalty: float = _option(0.0, "subtract per earlier occurrence in the generated text, -2 to 2")
    repetition_penalty: float = _option(1.0, "divide the logits of tokens in prompt and text by this; 1 is off")
    seed: int | None = _option(None, "64-bit seed of this row; a fresh one is drawn without it")
    max_tokens: int | None = _option(None, "generate at most this many tokens; unset is the rest of the context")
    min_tokens: int = _option(0, "do not stop before this many tokens")
    stop: tuple[str, ...] = _option((), "end the text before the first of these strings, at most 4")
    include_stop_str_in_output: bool = _option(False, "leave the matched stop string in the text")
    stop_token_ids: tuple[int, ...] = _option((), "end at these token ids too")
    ignore_eos: bool = _option(False, "go on after the model's end-of-text token")
    logprobs: int | None = _option(None, "return log-probabilities, with this many alternatives per token, 0 to 20")
    logit_bias: Mapping[int, float] = _option(dict, "add to the logits of these token ids, -100 to 100")
    thinking_budget: int | None = _option(
        None, "end the thinking after this many tokens, <think> included; unset or -1 is unlimited"
    )

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for name, low, high in (
            ("temperature", 0, 2),
            ("min_p", 0, 1),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
        ):
            set_(name, _real(name, getattr(self, name), low, high))
        for name, high in (("top_p", 1), ("repetition_penalty", math.inf)):
            set_(name, _real(name, getattr(self, name), 0, high, open_below=True))
        set_("top_k", max(0, _integer("top_k", self.top_k, -1, 2**31 - 1)))
        set_("min_tokens", _integer("min_tokens", self.min_tokens, 0, 2**31 - 1))
        for name, low, high in (
            ("seed", -(2**63), 2**63 - 1),
            ("max_tokens", 1, 2**31 - 1),
            ("logprobs", 0, LOGPROBS),
            ("thinking_budget", -1, 2**31 - 1),
        ):
            if getattr(self, name) is not None:
                set_(name, _integer(name, getattr(self, name), low, high))
        if self.thinking_budget == -1:
            set_("thinking_budget", None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(f"min_tokens is {self.min_tokens}: must not exceed max_tokens, {self.max_tokens}")
        for name in ("include_stop_str_in_output", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(f"{name} is {getattr(self, name)!r}: must be true or false")
        set_("stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop))
        if len(self.stop) > 4:
            raise SamplingError(f"stop has {len(self.stop)} strings: at most 4")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise SamplingError(f"stop is {list(self.stop)!r}: must be strings that are not empty")
        ids = (_integer("stop_token_ids", i, 0, 2**31 - 1) for i in _tuple("stop_token_ids", self.stop_token_ids))
        set_("stop_token_ids", tuple(ids))
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingError(f"logit_bias is {self.logit_bias!r}: must map token ids to numbers")
        bias = {
            _integer("logit_bias token id", i, 0, 2**31 - 1): _real(f"logit_bias of token {i}", value, -100, 100)
            for i, value in self.logit_bias.items()
        }
        set_("logit_bias", bias)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        Raises:
            SamplingError: an unknown field or a value out of range.
        """
        known = {f.name for f in fields(self)}
        if unknown := sorted(set(changes) - known):
            raise SamplingError(
                f"no sampling parameter {', '.join(unknown)}: the fields are {', '.join(sorted(known))}"
            )
        return replace(self, **changes)

    @classmethod
    def from_generation_config(cls, settings: Mapping[str, Any], source: str | Path = "generation_config.json") -> Self:
        """Take the defaults of a model from the contents of its generation_config.json.

        As in transformers, `do_sample` absent or false means greedy, whatever temperature stands beside it.

        Raises:
            SamplingError: a key that would change the text and is not implemented (beams, contrastive search, ...).
        """
        for key, neutral in _GENERATION_NEUTRAL.items():
            if key in settings and settings[key] not in neutral:
                raise SamplingError(f"{source}: {key} is {settings[key]!r}, which is not supported; remove the key")
        values = {ours: settings[key] for key, ours in _GENERATION_KEYS.items() if settings.get(key) is not None}
        if not settings.get("do_sample", False):
            values["temperature"] = 0.0
        try:
            return cls(**values)
        except SamplingError as error:
            raise SamplingError(f"{source}: {error}") from None


_GENERATION_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
# Keys of transformers' GenerationConfig that change the text, with the values that switch them off.
_GENERATION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "max_length": (None, 20),
    "min_length": (None, 0),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "top_h": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None, {}, []),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "stop_strings": (None, []),
    "max_time": (None,),
    "token_healing": (None, False),
}


def _real(name: str, value: Any, low: float, high: float, *, open_below: bool = False) -> float:
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or not low <= number <= high or (open_below and number == low):
        edge = "above" if open_below else "from"
        bounds = f"{edge} {low:g}" + ("" if high == math.inf else f" to {high:g}")
        raise SamplingError(f"{name} is {value!r}: must be a finite number {bounds}")
    return number


def _integer(name: str, value: Any, low: int, high: int) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:
        raise SamplingError(f"{name} is {value!r}: must be an integer from {low} to {high}")
    return int(value)


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise SamplingError(f"{name} is {value!r}: must be a list")
    return tuple(value)

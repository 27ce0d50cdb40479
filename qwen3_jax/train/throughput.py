"""Tokens per second and model FLOPs utilisation: what the model needs, over what the chips could do.

Model FLOPs are three times the forward pass (`Qwen3Config.flops_per_token`); what rematerialisation repeats does not
count (PaLM, arXiv 2204.02311, appendix B). The chips' peaks are those of configs/chips.toml.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax

from qwen3_jax.config import Qwen3Config
from qwen3_jax.plan.chips import Chip, chip, chips


class Meter:
    """Rates between one step and the next, as they come back from the device."""

    def __init__(self, model: Qwen3Config, *, chip: str):
        """Begin; `chip` is a name of configs/chips.toml, or empty for what the device says that it is."""
        self._model, self._chip, self._last = model, find(chip), None

    def pause(self) -> None:
        """Forget the last step: what comes between it and the next one is no step."""
        self._last = None

    def step(self, tokens: float, length: int) -> dict[str, Any]:
        """Return step_s, tokens_per_s and, on a known chip, mfu, since the step before; nothing after a pause."""
        now = time.perf_counter()
        before, self._last = self._last, now
        if before is None:
            return {}
        seconds = max(now - before, 1e-9)
        rates = {"step_s": seconds, "tokens_per_s": tokens / seconds}
        if self._chip is not None:
            flops = 3 * self._model.flops_per_token((length + 1) // 2) * tokens
            rates["mfu"] = flops / seconds / (self._chip.bf16_flops * jax.device_count())
        return rates


def find(name: str) -> Chip | None:
    """Return the chip of a name, or of the first device where its kind says so; None is a CPU or an unknown kind.

    Raises:
        ChipError: a name that configs/chips.toml does not have.
    """
    if name:
        return chip(name)
    kind = jax.devices()[0].device_kind.lower()
    return next(iter(_called(kind)), None)


def _called(kind: str) -> Iterator[Chip]:
    """Yield chips whose name stands in a device kind: "TPU v5p", "TPU v5 lite" (v5e), "NVIDIA H100 80GB HBM3"."""
    words = kind.replace("v5 lite", "v5e").replace("v6 lite", "v6e").split()
    for name, found in chips().items():
        if name.lower().split("-")[0] in words and ("-" not in name or f"{name.split('-')[1]}gb" in kind):
            yield found

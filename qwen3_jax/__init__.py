"""Qwen3 in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3_jax.config import Qwen3Config
    from qwen3_jax.generate import Generator
    from qwen3_jax.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["Generator", "Qwen3Config", "SamplingParams"]

_HOMES = {"Generator": "generate", "Qwen3Config": "config", "SamplingParams": "sampling_params"}


def __getattr__(name: str) -> Any:
    """Import the three public names when they are asked for: the command line's help needs no JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

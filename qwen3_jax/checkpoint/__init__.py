"""Weights on disk: Hugging Face folders and Orbax."""

from qwen3_jax.checkpoint.export import save
from qwen3_jax.checkpoint.hf import Checkpoint, CheckpointError, inspect, load

__all__ = ["Checkpoint", "CheckpointError", "inspect", "load", "save"]

"""Weights on disk: Hugging Face folders and Orbax."""

from qwen3_jax.checkpoint.export import save
from qwen3_jax.checkpoint.folder import convert, load
from qwen3_jax.checkpoint.hf import Checkpoint, CheckpointError, inspect
from qwen3_jax.checkpoint.hub import resolve

__all__ = ["Checkpoint", "CheckpointError", "convert", "inspect", "load", "resolve", "save"]

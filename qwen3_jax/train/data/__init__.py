"""Training data: files → records in a seeded order → examples → packed rows → batches, resumable to the example."""

from qwen3_jax.train.data.config import DataConfig, DataError, Source
from qwen3_jax.train.data.loader import Batch, Loader, merge

__all__ = ["Batch", "DataConfig", "DataError", "Loader", "Source", "merge"]

"""The fleet table: for every released model, the smallest set of each chip that holds it. Arithmetic, no compiler.

Weights are counted on the abstract tree; beside them stand one row of cache and a reserve for temporaries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from qwen3_jax import model as models
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import plain
from qwen3_jax.plan.chips import Chip, chips, topology

DTYPES = ("bfloat16", "int8", "int4")
CONTEXTS = (4096, 32768, 131072)
GROUP = 128
"""Weights that share a bfloat16 scale in int8 and int4."""
RESERVE = 0.08
"""Part of a chip's memory that is left for temporaries, code and the runtime."""


@dataclass(frozen=True)
class Row:
    """One model in one dtype at one context: the least number of each chip, None if no listed slice holds it."""

    model: str
    dtype: str
    context: int
    weights: float
    cache: int
    smallest: dict[str, int | None]


@lru_cache(maxsize=256)
def _sizes(config: Qwen3Config) -> tuple[int, int]:
    """Count the parameters in matrix products of the layers, which quantise, and all others."""
    _, abstract = models.declare(config, dtype=jnp.dtype("bfloat16"), ops=plain.XLA)
    products = sum(leaf.size for leaf in jax.tree.leaves(abstract["layers"]) if leaf.ndim > 1)
    return products, sum(leaf.size for leaf in jax.tree.leaves(abstract)) - products


def weight_bytes(config: Qwen3Config, dtype: str) -> float:
    """Count a model's bytes. int8 and int4 quantise the layers' matrices; embedding and head stay."""
    products, rest = _sizes(config)
    if dtype == "bfloat16":
        return 2.0 * (products + rest)
    bits = {"int8": 8, "int4": 4}[dtype]
    return products * bits / 8 + products / GROUP * 2 + 2.0 * rest


def table(names: Sequence[str] | None = None, *, batch: int = 1) -> list[Row]:
    """Find the smallest slice of every chip for each model, dtype and context.

    Models are left out at contexts beyond their max_position_embeddings. KV heads are never split below one a chip:
    where a slice has more chips than KV heads, each stores its share of heads rounded up.
    """
    rows = []
    for name in names or released():
        config = Qwen3Config.from_name(name)
        for dtype in DTYPES:
            weights = weight_bytes(config, dtype)
            for context in CONTEXTS:
                if context > config.max_position_embeddings:
                    continue
                cache = batch * context * config.kv_bytes_per_token(2)
                smallest = {chip.name: _smallest(config, chip, weights, cache) for chip in chips().values()}
                rows.append(Row(name, dtype, context, weights, cache, smallest))
    return rows


def released() -> list[str]:
    """List one name per architecture: variants with the same shapes and contexts need the same."""
    seen: dict[Any, str] = {}
    for name in sorted(Qwen3Config.names(), key=lambda n: (len(n), n)):
        config = Qwen3Config.from_name(name)
        seen.setdefault((config.num_parameters(), config.max_position_embeddings), name)
    return sorted(seen.values(), key=lambda n: Qwen3Config.from_name(n).num_parameters())


def _smallest(config: Qwen3Config, chip: Chip, weights: float, cache: int) -> int | None:
    for size in chip.topologies if chip.kind == "gpu" else ("1", *chip.topologies):
        devices = 1 if size == "1" else topology(f"{chip.name}:{size}").devices
        ways = min(devices, config.num_key_value_heads)
        if weights / devices + cache / ways <= chip.hbm_bytes * (1 - RESERVE):
            return devices
    return None


def show(rows: Sequence[Row]) -> Any:
    """Lay the fleet out as a rich table."""
    from rich.table import Table

    out = Table(title="least number of devices for weights and the cache of one row; – means none of the listed slices")
    for column in ("model", "dtype", "context", "weights GB", "cache GB"):
        out.add_column(column, justify="left" if column in ("model", "dtype") else "right")
    for name in chips():
        out.add_column(name, justify="right")
    for row in rows:
        counts = (str(n) if n else "–" for n in row.smallest.values())
        out.add_row(
            row.model, row.dtype, f"{row.context:,}", f"{row.weights / 1e9:.1f}", f"{row.cache / 1e9:.1f}", *counts
        )
    return out

"""Run this package's network on a folder, the short way, for tests that compare it with something else."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen3_jax import cache as kv_cache
from qwen3_jax import checkpoint, model, ops, placement, sharding
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.ops.plain import ORACLE, XLA

OPS = {"oracle": lambda: ORACLE, "xla": lambda: XLA, "cpu": lambda: ops.for_platform("cpu")}


class Network:
    """A loaded folder with jitted entry points that take and return numpy arrays."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Any = jnp.float32,
        formulation: str = "cpu",
        mesh: jax.sharding.Mesh | None = None,
        purpose: str = "serve",
    ):
        self.dtype, self.ops = dtype, OPS[formulation]()
        if mesh is None:
            self.config, self.params = checkpoint.load(folder, dtype=dtype, progress=False)
        else:
            rules = sharding.RULES[purpose]
            self.ops = on_mesh(self.ops, mesh, rules)
            self.config, self.params = placement.load_sharded(
                folder, mesh, rules, dtype=dtype, ops=self.ops, progress=False
            )
        self.graphdef, self.abstract = model.declare(self.config, dtype=dtype, ops=self.ops)

    @partial(jax.jit, static_argnums=(0, 2))
    def _forward(self, params: Any, patterns: tuple[str, ...], inputs: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        taps = model.Taps(*patterns)
        network = nnx.merge(self.graphdef, params)
        hidden, _ = network(**inputs, taps=taps)
        return network.logits(hidden), taps.values

    @partial(jax.jit, static_argnums=(0, 5))
    def _step(self, params: Any, tokens: jax.Array, start: jax.Array, cache: Any, fresh: bool) -> tuple[jax.Array, Any]:
        network = nnx.merge(self.graphdef, params)
        positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        hidden, cache = network(tokens, positions=positions, cache=cache, fresh=fresh)
        return network.logits(hidden), cache

    def taps(self, *patterns: str, **inputs: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return logits [B, T, V] and the intermediates that match the patterns."""
        shape = inputs["tokens" if "tokens" in inputs else "inputs_embeds"].shape[:2]
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        arrays = {k: jnp.asarray(v) for k, v in ({"positions": positions} | inputs).items()}
        logits, values = self._forward(self.params, patterns, arrays)
        return np.asarray(logits), {k: np.asarray(v) for k, v in values.items()}

    def logits(self, tokens: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
        """Return logits [B, T, V] of the full forward."""
        return self.taps(tokens=tokens, **inputs)[0]

    def logits_in_pieces(self, tokens: np.ndarray, pieces: list[int], capacity: int) -> np.ndarray:
        """Return logits [B, T, V] from a cached run: a fresh prefill of pieces[0] tokens, then the other pieces."""
        batch = tokens.shape[0]
        cache = kv_cache.init(self.config, batch=batch, capacity=capacity, dtype=self.dtype, ops=self.ops)
        outs, done = [], 0
        for size in pieces:
            start = jnp.full((batch,), done, jnp.int32)
            piece = jnp.asarray(tokens[:, done : done + size])
            logits, cache = self._step(self.params, piece, start, cache, done == 0)
            outs.append(np.asarray(logits))
            done += size
        return np.concatenate(outs, axis=1)

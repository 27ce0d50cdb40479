"""Our side: this package's loader and layers, one layer in memory at a time.

Every call takes and returns float32 numpy arrays (exact for bfloat16) and reads what it needs through the checkpoint's
own sources, so that the loader is proved along with the network.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen3_jax import model, rope
from qwen3_jax.checkpoint import Checkpoint
from qwen3_jax.ops import Ops


class Subject:
    """A checkpoint as this package computes it, in float32 or bfloat16."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, ops: Ops):
        self.checkpoint, self.dtype, self.ops = checkpoint, dtype, ops
        self.config = checkpoint.config
        self.network = model.Qwen3(self.config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), ops=ops)
        self._sources = {entry.dotted: checkpoint.source(entry) for entry in checkpoint.entries}
        self._compiled: dict[bool, Callable[..., Any]] = {}

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Return embeddings [B, T, D] of tokens [B, T]."""
        source = self._sources["embed_tokens"]
        table = {token: source[token : token + 1] for token in np.unique(tokens).tolist()}
        rows = np.concatenate([table[token] for token in tokens.ravel().tolist()])
        return _numpy(jnp.asarray(rows, jnp.dtype(self.dtype))).reshape(*tokens.shape, -1)

    def layer(self, i: int, x: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Run layer `i` on x [B, T, D]; returns its intermediates under the names of `model.Taps`."""
        moe = self.config.is_moe_layer(i)
        if moe not in self._compiled:
            self._compiled[moe] = self._compile(i)
        params = self.checkpoint.load(f"layers.{i}", dtype=self.dtype)
        values = self._compiled[moe](params, jnp.asarray(x, jnp.dtype(self.dtype)), positions, segment_ids)
        return {name.removeprefix("layer."): _numpy(value) for name, value in values.items()}

    def _compile(self, i: int) -> Callable[..., Any]:
        graphdef, _ = nnx.split(self.network.layers[i])

        @jax.jit
        def forward(params: Any, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> dict[str, jax.Array]:
            taps = model.Taps("*")
            cos, sin = rope.angles_of(self.config, positions)
            nnx.merge(graphdef, params)(x, cos, sin, positions, segment_ids, None, False, taps, "layer")
            return taps.values

        return forward

    def norm(self, x: np.ndarray) -> np.ndarray:
        """Apply the final norm."""
        weight = self.checkpoint.load("norm", dtype=self.dtype)
        return _numpy(model.rms_norm(jnp.asarray(x, jnp.dtype(self.dtype)), weight, self.config.rms_norm_eps))

    def logits(self, hidden: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Return the logits [B, T, end - begin] of a stretch of the vocabulary."""
        rows = self._sources["embed_tokens" if self.config.tie_word_embeddings else "lm_head"][begin:end]
        hidden_, rows_ = (jnp.asarray(each, jnp.dtype(self.dtype)) for each in (hidden, rows))
        return _numpy(self.ops.einsum("BTD,VD->BTV", hidden_, rows_, out_dtype=jnp.float32))


def _numpy(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x)

"""Our side: this package's loader and layers, one layer in memory at a time, on one device or spread over a mesh.

Every call takes and returns float32 numpy arrays (exact for bfloat16) and reads what it needs through the checkpoint's
own sources, so that the loader is proved along with the network. On a mesh each layer, the embedding and the head lie
and run as serving lays them out; what comes back is assembled from the devices.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qwen3_jax import model, placement, sharding
from qwen3_jax.checkpoint import Checkpoint
from qwen3_jax.checkpoint.hf import Place, Source, on_default_device
from qwen3_jax.ops import Ops
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.parity.report import ParityError

RULES = sharding.RULES["serve"]
HEADS = ("layer.self_attn.k", "layer.self_attn.v")
"""Intermediates [B, T, K, H], whose heads a mesh may hold several times each."""


class Subject:
    """A checkpoint as this package computes it, in float32 or bfloat16."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, ops: Ops, mesh: Mesh | None = None):
        self.checkpoint, self.dtype, self.mesh = checkpoint, dtype, mesh
        self.config, self.ops, self.repeats = checkpoint.config, ops, 1
        self._place: Place = on_default_device
        if mesh is not None:
            self.config = placement.for_mesh(checkpoint.config, mesh, RULES)
            self.ops = on_mesh(ops, mesh, RULES)
            self.repeats = sharding.replicas_of_kv_heads(checkpoint.config, mesh)
            self._place = placement.placer(checkpoint.config, mesh, RULES, ops=self.ops)
        kind = jnp.dtype(dtype)
        self.network = model.Qwen3(self.config, dtype=kind, param_dtype=kind, ops=self.ops)
        self._sources = {entry.dotted: checkpoint.source(entry) for entry in checkpoint.entries}
        self._compiled: dict[bool, Callable[..., Any]] = {}

    @property
    def vocab_parts(self) -> int:
        """What the length of a stretch of the vocabulary must be a multiple of."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in RULES["vocab"])

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Return embeddings [B, T, D] of tokens [B, T]."""
        if self.mesh is not None:
            return _numpy(jax.jit(self.ops.embed)(self._load("embed_tokens"), tokens))
        source = self._sources["embed_tokens"]
        table = {token: source[token : token + 1] for token in np.unique(tokens).tolist()}
        rows = np.concatenate([table[token] for token in tokens.ravel().tolist()])
        return _numpy(jnp.asarray(rows, jnp.dtype(self.dtype))).reshape(*tokens.shape, -1)

    def layer(self, i: int, x: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Run layer `i` on x [B, T, D]; returns its intermediates under the names of `model.Taps`."""
        moe = self.config.is_moe_layer(i)
        if moe not in self._compiled:
            self._compiled[moe] = self._compile(i)
        params = self._load(f"layers.{i}")
        values = self._compiled[moe](params, jnp.asarray(x, jnp.dtype(self.dtype)), positions, segment_ids)
        for name in HEADS:  # every copy of a head is compared by what attention makes of it
            values[name] = values[name][:, :, :: self.repeats]
        return {name.removeprefix("layer."): _numpy(value) for name, value in values.items()}

    def _load(self, prefix: str) -> Any:
        return self.checkpoint.load(prefix, dtype=self.dtype, place=self._place)

    def _compile(self, i: int) -> Callable[..., Any]:
        graphdef, _ = nnx.split(self.network.layers[i])

        @jax.jit
        def forward(params: Any, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> dict[str, jax.Array]:
            taps = model.Taps("*")
            shared = model.Pass.of(self.config, positions, segment_ids)
            nnx.merge(graphdef, params)(x, shared, None, taps, "layer")
            return taps.values

        return forward

    def norm(self, x: np.ndarray) -> np.ndarray:
        """Apply the final norm."""
        weight = self.checkpoint.load("norm", dtype=self.dtype)
        return _numpy(model.rms_norm(jnp.asarray(x, jnp.dtype(self.dtype)), weight, self.config.rms_norm_eps))

    def logits(self, hidden: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Return the logits [B, T, end - begin] of a stretch of the vocabulary."""
        head = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        if self.mesh is None:
            rows = self._sources[head][begin:end]
            hidden_, rows_ = (jnp.asarray(each, jnp.dtype(self.dtype)) for each in (hidden, rows))
            return _numpy(self.ops.einsum("BTD,VD->BTV", hidden_, rows_, out_dtype=jnp.float32))
        rows = self._place(head, _Stretch(self._sources[head], begin, end))
        return _numpy(self._logits(rows, jnp.asarray(hidden, jnp.dtype(self.dtype))))

    @partial(jax.jit, static_argnums=0)
    def _logits(self, rows: jax.Array, hidden: jax.Array) -> jax.Array:
        """Multiply with a stretch of the head, laid out as `Qwen3.logits` does."""
        hidden = self.ops.constrain(hidden, "head_batch head_length hidden")
        logits = self.ops.einsum("BTD,VD->BTV", hidden, rows, out_dtype=jnp.float32)
        return self.ops.constrain(logits, "head_batch head_length vocab")


class _Stretch:
    """Some rows of a source."""

    def __init__(self, source: Source, begin: int, end: int):
        self.shape, self.dtype = (end - begin, *source.shape[1:]), source.dtype
        self._source, self._begin = source, begin

    def __getitem__(self, index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(self.shape[0])
        return self._source[(slice(self._begin + first, self._begin + last), *index[1:])]


def mesh_of(sizes: Mapping[str, int]) -> Mesh:
    """Make a mesh of the first devices of this process.

    Raises:
        ParityError: it has fewer.
    """
    wanted, devices = math.prod(sizes.values()), jax.local_devices()
    if wanted > len(devices):
        raise ParityError(
            f"the mesh has {wanted} devices, this process {len(devices)}: on CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted} for virtual ones"
        )
    return sharding.make_mesh(**sizes, devices=devices[:wanted])


def _numpy(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x)

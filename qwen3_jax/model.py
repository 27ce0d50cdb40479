"""Qwen3, top to bottom: dense and mixture-of-experts, full sequence, prefill and decode.

Token ids or embeddings → L decoder layers on one residual stream → final norm → `logits`. The classes declare
parameters by their Hugging Face names and compute; they hold shapes until a jitted function merges arrays into them:

    graphdef, abstract = declare(config, dtype=jnp.float32, ops=ops.for_platform("cpu"))

    @jax.jit
    def forward(params, tokens, positions):
        model = nnx.merge(graphdef, params)
        hidden, _ = model(tokens, positions=positions)
        return model.logits(hidden)

Axis letters: B batch, T length, D hidden, N query heads, K kv heads, H head_dim, F ffn width, E experts, C experts per
token, V vocabulary. Each weight's line gives its layout, Hugging Face's [out, in] reshaped and never transposed, and
the logical name of each axis. Numbers: activations in `dtype`; norm statistics, rope angles, router, softmax and logits
in float32.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qwen3_jax import rope
from qwen3_jax.cache import Cache
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import Blocks, LayerCache, Ops

Params = dict[Any, Any]


class Taps:
    """Record intermediates by name, as values that a jitted function can return.

    `Taps("layers.*.output", "layers.3.mlp.*")` keeps what matches any of the patterns (as in `fnmatch`) in `.values`.
    The names: `embed_tokens`, `norm`, and under `layers.{i}.`: `input`, `output` (the residual stream before and after
    the layer), `self_attn.input`, `self_attn.{q,k,v}` (after norm and rope), `self_attn.context` (before o_proj),
    `self_attn.output`, `mlp.input`, `mlp.output`, and on MoE layers `mlp.router_logits`, `mlp.router_weights`,
    `mlp.router_experts`.
    """

    def __init__(self, *patterns: str):
        self.patterns = patterns
        self.values: dict[str, jax.Array] = {}

    def __call__(self, name: str, value: jax.Array) -> None:
        if any(fnmatchcase(name, pattern) for pattern in self.patterns):
            self.values[name] = value


def param(shape: tuple[int, ...], axes: str, dtype: jnp.dtype) -> nnx.Param:
    """Declare a weight: its shape, a logical name per axis, its dtype. Nothing is allocated."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=tuple(axes.split()))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis with float32 statistics; the cast comes before the weight, as in transformers."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return scaled.astype(x.dtype) * weight.astype(x.dtype)


class Pass(NamedTuple):
    """What the layers of one forward pass share: where its tokens [B, T] stand and what they see."""

    cos: jax.Array
    """[B, T, H/2] float32, as `sin` from `rope.angles_of`."""
    sin: jax.Array
    positions: jax.Array
    """[B, T] int32."""
    segment_ids: jax.Array | None
    """[B, T] int32, None for one segment."""
    fresh: bool = False
    """The cache is empty, the tokens attend only to themselves."""
    blocks: Blocks | None = None
    """How the mesh splits the length, where it does."""

    @classmethod
    def of(cls, config: Qwen3Config, positions: jax.Array, segment_ids: jax.Array | None, **others: Any) -> "Pass":
        """Compute the angles of the positions."""
        return cls(*rope.angles_of(config, positions), positions, segment_ids, **others)


class Attention(nnx.Module):
    """Grouped-query attention with RMSNorm on every query and key head, before rope."""

    def __init__(self, config: Qwen3Config, *, dtype: jnp.dtype, ops: Ops):
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = param((N, H, D), "heads head_dim embed", dtype)
        self.k_proj = param((K, H, D), "kv_heads head_dim embed", dtype)
        self.v_proj = param((K, H, D), "kv_heads head_dim embed", dtype)
        self.o_proj = param((D, N, H), "embed heads head_dim", dtype)
        self.q_norm = param((H,), "head_dim", dtype)
        self.k_norm = param((H,), "head_dim", dtype)
        self.eps = config.rms_norm_eps
        self.scale = H**-0.5
        self.ops = ops

    def __call__(
        self, x: jax.Array, shared: Pass, cache: LayerCache | None, taps: Taps, path: str
    ) -> tuple[jax.Array, LayerCache | None]:
        taps(f"{path}.input", x)
        x = self.ops.spread(x)
        q = self.ops.einsum("BTD,NHD->BTNH", x, self.q_proj[...])
        k = self.ops.einsum("BTD,KHD->BTKH", x, self.k_proj[...])
        v = self.ops.einsum("BTD,KHD->BTKH", x, self.v_proj[...])
        q = self.ops.constrain(q, "batch length heads head_dim")
        k = self.ops.constrain(k, "batch length kv_heads head_dim")
        v = self.ops.constrain(v, "batch length kv_heads head_dim")
        q = rope.rotate(rms_norm(q, self.q_norm[...], self.eps), shared.cos, shared.sin)
        k = rope.rotate(rms_norm(k, self.k_norm[...], self.eps), shared.cos, shared.sin)
        if shared.blocks is not None:
            k, v = (shared.blocks.in_order(self.ops.constrain(a, "batch slots kv_heads head_dim")) for a in (k, v))
        taps(f"{path}.q", q)
        taps(f"{path}.k", k)
        taps(f"{path}.v", v)
        if cache is not None:
            cache = self.ops.update_cache(cache, k, v, shared.positions[:, 0])
        if shared.blocks is not None:
            context = self.ops.attend_blocks(q, k, v, self.scale)
        elif cache is None or shared.fresh:
            context = self.ops.attend(q, k, v, shared.segment_ids, self.scale)
        else:
            context = self.ops.attend_cache(q, cache, shared.positions, self.scale)
        taps(f"{path}.context", context)
        out = self.ops.einsum("BTNH,DNH->BTD", context, self.o_proj[...])
        taps(f"{path}.output", out)
        return out, cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config, *, dtype: jnp.dtype, ops: Ops):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = param((F, D), "mlp embed", dtype)
        self.up_proj = param((F, D), "mlp embed", dtype)
        self.down_proj = param((D, F), "embed mlp", dtype)
        self.ops = ops

    def __call__(self, x: jax.Array, taps: Taps, path: str) -> jax.Array:
        taps(f"{path}.input", x)
        x = self.ops.spread(x)
        gate = self.ops.einsum("BTD,FD->BTF", x, self.gate_proj[...])
        up = self.ops.einsum("BTD,FD->BTF", x, self.up_proj[...])
        out = self.ops.einsum("BTF,DF->BTD", jax.nn.silu(gate) * up, self.down_proj[...])
        taps(f"{path}.output", out)
        return out


class Experts(nnx.Module):
    """The stacked weights of a layer's experts."""

    def __init__(self, config: Qwen3Config, *, dtype: jnp.dtype):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = param((E, F, D), "experts expert_mlp embed", dtype)
        self.up_proj = param((E, F, D), "experts expert_mlp embed", dtype)
        self.down_proj = param((E, D, F), "experts embed expert_mlp", dtype)


class MoE(nnx.Module):
    """Send each token to its C best experts of E and sum their outputs, weighted; no capacity, no dropping."""

    def __init__(self, config: Qwen3Config, *, dtype: jnp.dtype, ops: Ops):
        self.router = param((config.num_experts, config.hidden_size), "router embed", dtype)
        self.experts = Experts(config, dtype=dtype)
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.ops = ops

    def __call__(self, x: jax.Array, taps: Taps, path: str) -> jax.Array:
        taps(f"{path}.input", x)
        router_logits = self.ops.einsum("BTD,ED->BTE", x, self.router[...], out_dtype=jnp.float32)
        weights, experts = jax.lax.top_k(jax.nn.softmax(router_logits, axis=-1), self.num_experts_per_tok)
        if self.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        taps(f"{path}.router_logits", router_logits)
        taps(f"{path}.router_weights", weights)
        taps(f"{path}.router_experts", experts)
        B, T, D = x.shape
        C = self.num_experts_per_tok
        out = self.ops.moe(
            x.reshape(B * T, D),
            weights.reshape(B * T, C).astype(x.dtype),
            experts.reshape(B * T, C),
            self.experts.gate_proj[...],
            self.experts.up_proj[...],
            self.experts.down_proj[...],
        ).reshape(B, T, D)
        taps(f"{path}.output", out)
        return out


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: Qwen3Config, index: int, *, dtype: jnp.dtype, ops: Ops):
        self.input_layernorm = param((config.hidden_size,), "embed", dtype)
        self.self_attn = Attention(config, dtype=dtype, ops=ops)
        self.post_attention_layernorm = param((config.hidden_size,), "embed", dtype)
        feed_forward = MoE if config.is_moe_layer(index) else MLP
        self.mlp = feed_forward(config, dtype=dtype, ops=ops)
        self.eps = config.rms_norm_eps
        self.ops = ops

    def __call__(
        self, x: jax.Array, shared: Pass, cache: LayerCache | None, taps: Taps, path: str
    ) -> tuple[jax.Array, LayerCache | None]:
        taps(f"{path}.input", x)
        normed = rms_norm(x, self.input_layernorm[...], self.eps)
        mixed, cache = self.self_attn(normed, shared, cache, taps, f"{path}.self_attn")
        x = self.ops.constrain(x + mixed, "batch stream hidden")
        mixed = self.mlp(rms_norm(x, self.post_attention_layernorm[...], self.eps), taps, f"{path}.mlp")
        x = self.ops.constrain(x + mixed, "batch stream hidden")
        taps(f"{path}.output", x)
        return x, cache


class Qwen3(nnx.Module):
    """The whole network. Build it with `declare`, call it inside a jitted function after `nnx.merge`."""

    def __init__(self, config: Qwen3Config, *, dtype: jnp.dtype, param_dtype: jnp.dtype, ops: Ops):
        V, D = config.vocab_size, config.hidden_size
        self.embed_tokens = param((V, D), "vocab embed", param_dtype)
        self.layers = nnx.List(
            [DecoderLayer(config, i, dtype=param_dtype, ops=ops) for i in range(config.num_hidden_layers)]
        )
        self.norm = param((D,), "embed", param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = param((V, D), "vocab embed", param_dtype)
        self.config = config
        self.dtype = dtype
        self.ops = ops

    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        fresh: bool = False,
        only: jax.Array | None = None,
        taps: Taps | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run the network up to the final norm.

        Args:
            tokens: [B, T] int32 ids; or instead of them
            inputs_embeds: [B, T, D], for a projector that sits in front.
            positions: [B, T] int32, what rope sees; with a cache also the slots that are written.
            segment_ids: [B, T] int32; tokens see earlier tokens of their own segment. Padding is a segment of its own
                (0 by custom). Without a cache only; None means one segment.
            cache: keys and values so far. Each row's tokens are contiguous from positions[b, 0] and right-padded;
                padding writes slots that the row's next tokens overwrite, so positions[b, 0] + T must not exceed the
                capacity.
            fresh: the cache is empty and every row starts at position 0, so the tokens attend only to themselves.
            only: [B] int32, the one place of each row's T whose hidden state is wanted; None means all.
            taps: records intermediates.

        Returns:
            hidden [B, T, D] in the compute dtype, or [B, 1, D], after the final norm, for `logits`; and the cache,
            updated.

        Raises:
            ValueError: both or neither of tokens and inputs_embeds, or segment_ids with a cache.
        """
        taps = Taps() if taps is None else taps
        # On a mesh that splits its length a whole prompt lies in blocks; keys, values and the result are put in order.
        blocks = None
        if tokens is not None and segment_ids is None and (cache is None or fresh) and not taps.patterns:
            blocks = self.ops.blocks(*tokens.shape)
            if blocks is not None:
                tokens, positions = blocks.arrange(tokens), blocks.arrange(positions)
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids with a cache: packed rows have no cache, give each sequence a row of its own")
        if tokens is not None and inputs_embeds is None:
            x = self.embedded(tokens)
        elif inputs_embeds is not None and tokens is None:
            x = self._stream(inputs_embeds)
        else:
            raise ValueError(f"give either tokens or inputs_embeds: got {'neither' if tokens is None else 'both'}")
        taps("embed_tokens", x)
        shared = Pass.of(self.config, positions, segment_ids, fresh=fresh, blocks=blocks)
        layer_caches = []
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[i]
            x, layer_cache = layer(x, shared, layer_cache, taps, f"layers.{i}")
            layer_caches.append(layer_cache)
        if only is not None and blocks is not None:
            only = blocks.place(only, x.shape[1])
        x = self.normed(x, only)
        if only is None and blocks is not None:
            x = blocks.in_order(self.ops.constrain(x, "batch slots hidden"))
        taps("norm", x)
        return x, None if cache is None else layer_caches

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """Look tokens [B, T] up: the residual stream [B, T, D] in front of the first layer."""
        return self._stream(self.ops.embed(self.embed_tokens[...], tokens))

    def normed(self, x: jax.Array, only: jax.Array | None = None) -> jax.Array:
        """Apply the final norm to the residual stream [B, T, D], or to one place [B] of each row: [B, 1, D]."""
        if only is not None:
            x = jnp.take_along_axis(x, only[:, None, None], axis=1)
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps)

    def _stream(self, x: jax.Array) -> jax.Array:
        return self.ops.constrain(x.astype(self.dtype), "batch stream hidden")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden [B, T, D] to vocabulary logits [B, T, V] in float32; give it only the positions you need."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        hidden = self.ops.constrain(hidden, "head_batch head_length hidden")
        logits = self.ops.einsum("BTD,VD->BTV", hidden, head[...], out_dtype=jnp.float32)
        return self.ops.constrain(logits, "head_batch head_length vocab")


def declare(
    config: Qwen3Config, *, dtype: jnp.dtype, ops: Ops, param_dtype: jnp.dtype | None = None
) -> tuple[nnx.GraphDef, Params]:
    """Declare the network: the static half for `nnx.merge`, and the parameters as a nested dict of shapes.

    Args:
        config: the model.
        dtype: the compute dtype, float32 or bfloat16.
        ops: the formulation, see `qwen3_jax.ops`.
        param_dtype: the parameters' dtype; None means the compute dtype.
    """
    model = Qwen3(config, dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype, ops=ops)
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def parameter_axes(config: Qwen3Config, *, ops: Ops) -> Params:
    """Return the parameters' logical axis names ("heads head_dim embed"), as nested as the parameters."""
    _, state = nnx.split(Qwen3(config, dtype=jnp.float32, param_dtype=jnp.float32, ops=ops))
    return nnx.to_pure_dict(nnx.map_state(lambda _, leaf: " ".join(leaf.get_metadata("axes")), state))


def init(abstract: Mapping[Any, Any], key: jax.Array, *, initializer_range: float) -> Params:
    """Draw random parameters for an abstract tree: norm weights are one, all else normal(0, initializer_range)."""
    leaves, tree = jax.tree.flatten_with_path(dict(abstract))
    keys = jax.random.split(key, len(leaves))
    values = [
        jnp.ones(leaf.shape, leaf.dtype)
        if "norm" in str(path[-1])
        else (initializer_range * jax.random.normal(k, leaf.shape, jnp.float32)).astype(leaf.dtype)
        for k, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, values)

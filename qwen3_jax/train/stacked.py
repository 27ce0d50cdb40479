"""The same network for training: equal layers stacked on a leading axis and scanned, so that one layer is compiled.

`Network.hidden` embeds tokens, scans `model.DecoderLayer` over the stacked weights with the remat policy, and applies
the final norm; `Network.head` is the output matrix for `losses`. Parameters are the dict of `model.declare` with
`layers` regrouped: {first layer of a run of equal layers: its subtree, every leaf [run, ...]}. A model whose layers are
all dense or all MoE is one run; `mlp_only_layers` and `decoder_sparse_step` make several, scanned one after another.
`stack` and `unstack` convert exactly.

Router statistics leave each layer as sums, never as [B, T, E] per layer; see `Routing`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax import model
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model import DecoderLayer, Params, Pass, Taps, rms_norm
from qwen3_jax.ops import Ops
from qwen3_jax.sharding import Rules, spec

REMAT: dict[str, Any] = {
    "none": None,  # keep every intermediate
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the results of linear layers
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the residual stream between layers
}


class Routing(NamedTuple):
    """What the routers of the MoE layers did, summed over tokens; M MoE layers, g groups of rows, E experts."""

    counts: jax.Array
    """[M, g, E] float32: how often each expert was chosen. No gradient."""
    probabilities: jax.Array
    """[M, g, E] float32: the sum of the router's softmax."""
    squares: jax.Array
    """[M] float32: the sum of logsumexp(logits)^2, for the router z-loss."""
    entropy: jax.Array
    """[M] float32: the sum of the softmax's entropy in nats. No gradient."""
    tokens: jax.Array
    """[M, g] float32: the tokens, without padding."""


class Network:
    """A declared network and its static choices; pure functions of parameters."""

    def __init__(
        self,
        config: Qwen3Config,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        ops: Ops,
        remat: str = "none",
        unroll: int = 1,
        groups: int = 1,
        resolve: Callable[[Params], Params] = lambda tree: tree,
    ):
        """Declare the network.

        Args:
            config: the model.
            dtype: of activations.
            param_dtype: of parameters.
            ops: the formulation, see `qwen3_jax.ops`.
            remat: a name in `REMAT`.
            unroll: layers per step of the scan.
            groups: into how many groups of consecutive rows `Routing` divides the batch.
            resolve: maps a layer's subtree, and the subtree of everything that is no layer, to plain arrays just before
                they are used: where adapters are added and quantised weights widened.

        Raises:
            ValueError: `remat` is no name of a policy.
        """
        if remat not in REMAT:
            raise ValueError(f"remat {remat!r} is no policy: use {', '.join(REMAT)}")
        self.config, self.dtype, self.param_dtype, self.ops = config, jnp.dtype(dtype), jnp.dtype(param_dtype), ops
        self.remat, self.unroll, self.groups, self.resolve = remat, unroll, groups, resolve
        self.runs = runs(config)
        self._layers = {
            first: nnx.graphdef(DecoderLayer(config, first, dtype=self.param_dtype, ops=ops)) for first in self.runs
        }

    def abstract(self) -> Params:
        """Return the stacked parameters as shapes."""
        _, tree = model.declare(self.config, dtype=self.dtype, param_dtype=self.param_dtype, ops=self.ops)
        return jax.eval_shape(lambda tree: stack(self.config, tree), tree)

    def shardings(self, mesh: Mesh, rules: Rules) -> Params:
        """Return the sharding of every stacked parameter: the layers' axis stays whole."""
        axes = model.parameter_axes(self.config, ops=self.ops)
        layers = axes["layers"]
        whole = jax.tree.map(lambda names: NamedSharding(mesh, spec(names, rules)), axes | {"layers": {}})
        stacked = {
            first: jax.tree.map(
                lambda names: NamedSharding(mesh, PartitionSpec(None, *spec(names, rules))), layers[first]
            )
            for first in self.runs
        }
        return whole | {"layers": stacked}

    def init(self, key: jax.Array) -> Params:
        """Draw random stacked parameters; the same values, layer by layer, as `model.init` with the same key."""
        _, tree = model.declare(self.config, dtype=self.dtype, param_dtype=self.param_dtype, ops=self.ops)
        drawn = model.init(tree, key, initializer_range=self.config.initializer_range)
        return stack(self.config, drawn)

    def hidden(
        self, params: Params, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, Routing | None]:
        """Run the network up to the final norm.

        Args:
            params: stacked.
            tokens, positions: [B, T] int32.
            segment_ids: [B, T] int32, 0 is padding; None means one segment without padding.

        Returns:
            [B, T, D] in the compute dtype, and the routers' statistics over all that is no padding (None if dense).
        """
        outer = self.resolve({name: leaf for name, leaf in params.items() if name != "layers"})
        x = embed(self.ops, outer["embed_tokens"], tokens).astype(self.dtype)
        x = self.ops.constrain(x, "batch stream hidden")
        shared = Pass.of(self.config, positions, segment_ids)
        real = jnp.ones(tokens.shape, jnp.float32) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
        statistics = []
        for first in self.runs:

            def body(x: jax.Array, weights: Params, graphdef: Any = self._layers[first]) -> tuple[jax.Array, Any]:
                layer = nnx.merge(graphdef, self.resolve(weights))
                taps = Taps("layer.mlp.router_logits", "layer.mlp.router_experts")
                x, _ = layer(x, shared, None, taps, "layer")
                if not taps.values:
                    return x, None
                logits, experts = (taps.values[name] for name in taps.patterns)
                return x, routing(logits, experts, real, self.groups)

            if self.remat != "none":
                body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
            x, found = lax.scan(body, x, params["layers"][first], unroll=self.unroll)
            statistics += [] if found is None else [found]
        x = rms_norm(x, outer["norm"], self.config.rms_norm_eps)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *statistics) if statistics else None

    def head(self, params: Params) -> jax.Array:
        """Return the output matrix [V, D]."""
        outer = self.resolve({name: leaf for name, leaf in params.items() if name != "layers"})
        return outer["embed_tokens" if self.config.tie_word_embeddings else "lm_head"]


def embed(ops: Ops, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Look tokens up, see `Ops.embed`; the gradient of a row is summed over its tokens in float32.

    In bfloat16 the sum of many stands still: 256 + 1 = 256.
    """
    found: Any = _embed(ops, table, tokens)
    return found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(ops: Ops, table: jax.Array, tokens: jax.Array) -> jax.Array:
    return ops.embed(table, tokens)


def _embed_forward(ops: Ops, table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
    return ops.embed(table, tokens), (table[:, :0], tokens)  # its length and dtype


def _embed_backward(ops: Ops, saved: Any, slope: jax.Array) -> tuple[jax.Array, None]:
    like, tokens = saved
    anywhere = jnp.zeros((like.shape[0], slope.shape[-1]), jnp.float32)  # never made: the lookup is linear
    _, transposed = jax.vjp(lambda table: ops.embed(table, tokens), anywhere)
    return transposed(slope.astype(jnp.float32))[0].astype(like.dtype), None


_embed.defvjp(_embed_forward, _embed_backward)


def routing(logits: jax.Array, experts: jax.Array, real: jax.Array, groups: int) -> Routing:
    """Sum one layer's router values over the tokens of each group of rows; the fields are without M.

    Args:
        logits: [B, T, E] float32.
        experts: [B, T, C] int32, the chosen ones.
        real: [B, T] float32, 0 for padding.
        groups: must divide B.
    """
    B, T, E = logits.shape
    by_group = (groups, B // groups * T)
    real = real.reshape(by_group)
    largest = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.exp(logits - largest[..., None])
    chosen = jnp.sum(jax.nn.one_hot(experts, E, dtype=jnp.float32), axis=2)
    entropy = lax.stop_gradient(largest - jnp.sum(p * logits, axis=-1))
    return Routing(
        lax.stop_gradient(jnp.einsum("gt,gtE->gE", real, chosen.reshape(*by_group, E))),
        jnp.einsum("gt,gtE->gE", real, p.reshape(*by_group, E)),
        jnp.sum(jnp.square(largest).reshape(by_group) * real),
        jnp.sum(entropy.reshape(by_group) * real),
        jnp.sum(real, axis=1),
    )


def runs(config: Qwen3Config) -> dict[int, int]:
    """Return {first layer: number of layers} of each run of consecutive layers of one kind."""
    found: dict[int, int] = {}
    for i in range(config.num_hidden_layers):
        if i and config.is_moe_layer(i) == config.is_moe_layer(i - 1):
            found[max(found)] += 1
        else:
            found[i] = 1
    return found


def stack(config: Qwen3Config, params: Params) -> Params:
    """Regroup the layers of a model's parameters: {i: subtree} → {first of run: subtree of [run, ...]}."""
    layers = params["layers"]
    stacked = {
        first: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[first + i] for i in range(count)))
        for first, count in runs(config).items()
    }
    return {**params, "layers": stacked}


def unstack(config: Qwen3Config, params: Params) -> Params:
    """Undo `stack`."""
    layers = {
        first + i: jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"][first])
        for first, count in runs(config).items()
        for i in range(count)
    }
    return {**params, "layers": layers}

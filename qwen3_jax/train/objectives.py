"""What a run minimises, by name: a function of parameters and micro-batch to a loss and sums to report.

An `Objective` sees the whole step once (`prepare`, without gradient), then every micro-batch (`__call__`), and turns
the summed reports into means (`finish`). Because `prepare` knows the step's total weight, the losses of its
micro-batches simply add up, and so do their gradients: accumulation changes memory, never the result.

    pretrain, sft    next-token cross-entropy with the weights of the data, plus the routers' losses

Another objective (distillation, GRPO) is another class with these three methods, registered in `OBJECTIVES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_jax.model import Params
from qwen3_jax.train import losses
from qwen3_jax.train.stacked import Network

Arrays = Mapping[str, jax.Array]
BALANCES = ("global", "micro")


class ObjectiveError(ValueError):
    """An objective that does not exist, or settings that it cannot honour."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss."""

    name: str = "pretrain"
    chunk: int = 512
    """Positions of each row whose logits exist at one time."""
    z_loss: float = 0.0
    """Coefficient of logsumexp(logits)^2."""
    balance: str = "global"
    """Over what the load-balancing loss takes each expert's share of the tokens: all tokens of the step (global), or
    each group of each micro-batch by itself (micro). With accumulation, global counts in a forward pass of its own."""
    balance_loss: float = 0.0
    """Coefficient of the load-balancing loss; 0.001 in the released configs."""
    balance_groups: int = 1
    """micro only: groups of consecutive rows in a micro-batch."""
    router_z_loss: float = 0.0
    """Coefficient of the router's mean logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, uses 1e-3)."""


class Objective(Protocol):
    """See the module."""

    def prepare(self, params: Params, batches: Arrays) -> Any:
        """Return what every micro-batch must know of the whole step; arrays are [A, B, T]."""
        ...

    def __call__(self, params: Params, batch: Arrays, whole: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Return this micro-batch's part of the step's loss, and sums to report."""
        ...

    def finish(self, sums: dict[str, Any], whole: Any) -> dict[str, jax.Array]:
        """Turn the sums over all micro-batches into what is reported."""
        ...


class NextToken:
    """Weighted next-token cross-entropy with z-loss, load balancing and router z-loss."""

    def __init__(self, network: Network, config: ObjectiveConfig):
        if config.balance not in BALANCES:
            raise ObjectiveError(f"objective.balance {config.balance!r} is unknown: use {' or '.join(BALANCES)}")
        self.network, self.config = network, config
        self.routed = any(map(network.config.is_moe_layer, range(network.config.num_hidden_layers)))
        if not self.routed and (config.balance_loss or config.router_z_loss):
            raise ObjectiveError("objective.balance_loss and router_z_loss are for routers: set 0, the model has none")
        if config.balance == "global" and network.groups != 1:
            raise ObjectiveError(
                f"objective.balance_groups {network.groups} with balance global: set 1, all tokens are one group"
            )

    def prepare(self, params: Params, batches: Arrays) -> Any:
        whole = {
            "weight": jnp.maximum(jnp.sum(batches["weights"]), jnp.float32(1e-30)),
            "tokens": jnp.maximum(jnp.sum(batches["segment_ids"] != 0, dtype=jnp.float32), jnp.float32(1)),
            "counts": None,
        }
        micro_batches = batches["tokens"].shape[0]
        if self.routed and self.config.balance == "global" and self.config.balance_loss and micro_batches > 1:

            def count(total: jax.Array, batch: Arrays) -> tuple[jax.Array, None]:
                return total + self._hidden(params, batch)[1].counts, None

            like = jax.eval_shape(lambda b: self._hidden(params, b)[1].counts, jax.tree.map(lambda x: x[0], batches))
            whole["counts"], _ = lax.scan(count, jnp.zeros(like.shape, like.dtype), batches)
        return whole

    def __call__(self, params: Params, batch: Arrays, whole: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        hidden, routing = self._hidden(params, batch)
        total, sums = losses.cross_entropy(
            self.network.ops,
            hidden,
            self.network.head(params),
            batch["targets"],
            batch["weights"],
            chunk=self.config.chunk,
            z_loss=self.config.z_loss,
        )
        loss = total / whole["weight"]
        report: dict[str, Any] = {"tokens": sums}
        if routing is not None:
            balance = losses.load_balance(routing, whole["tokens"], counts=whole["counts"])
            router_z = jnp.mean(routing.squares) / whole["tokens"]
            loss += self.config.balance_loss * balance + self.config.router_z_loss * router_z
            report |= {
                "balance": balance,
                "router_z": router_z,
                "counts": jnp.sum(routing.counts, axis=1),
                "entropy": jnp.mean(routing.entropy) / whole["tokens"],
            }
        return loss, report

    def finish(self, sums: dict[str, Any], whole: Any) -> dict[str, jax.Array]:
        weight = whole["weight"]
        tokens = sums["tokens"]
        metrics = {
            "cross_entropy": tokens.cross_entropy / weight,
            "z": tokens.z / weight,
            "accuracy": tokens.correct / weight,
            "weight": weight,
            "tokens": whole["tokens"],
        }
        if "counts" in sums:
            load = losses.expert_load(sums["counts"])
            metrics |= {
                "balance": sums["balance"],
                "router_z": sums["router_z"],
                "router_entropy": sums["entropy"],
                "expert_load": load,
                "expert_load_max": jnp.max(load),
                "expert_load_min": jnp.min(load),
            }
        return metrics

    def _hidden(self, params: Params, batch: Arrays) -> tuple[jax.Array, Any]:
        return self.network.hidden(params, batch["tokens"], batch["positions"], batch["segment_ids"])


OBJECTIVES = {"pretrain": NextToken, "sft": NextToken}


def make(network: Network, config: ObjectiveConfig) -> Objective:
    """Return the objective of a name; raises ObjectiveError."""
    if config.name not in OBJECTIVES:
        raise ObjectiveError(f"objective.name {config.name!r} is unknown: use {', '.join(OBJECTIVES)}")
    return OBJECTIVES[config.name](network, config)

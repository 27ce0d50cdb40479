"""One training step as a pure function: (state, frozen, batch) → (state, metrics), jitted with the state donated.

The state is one tree: params, opt, step (updates applied), rng, and with spike_sigma recent, the losses of the last
accepted steps. `frozen` is a tree that the objective reads and nothing changes: the base weights under adapters, or
nothing. A batch holds micro-batches: every array is [A, B, T]; they are scanned and their gradients summed. A step
whose loss or gradient is not finite, or whose loss is a spike, is refused inside the program: the state comes back bit
for bit as it was, and metrics["refused"] says why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.model import Params
from qwen3_jax.sharding import Rules, spec
from qwen3_jax.train.objectives import Objective
from qwen3_jax.train.optim import Optimizer

State = dict[str, Any]
Arrays = Mapping[str, Any]
BATCH = {"tokens": np.int32, "positions": np.int32, "segment_ids": np.int32, "targets": np.int32, "weights": np.float32}
ACCEPTED, NOT_FINITE, SPIKE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class RefusalConfig:
    """Which steps are refused."""

    spike_sigma: float = 0.0
    """Refuse a loss more than this many standard deviations above the mean of the window; 0 does not look."""
    window: int = 128
    """Accepted steps that the mean is over; before there are that many, nothing is a spike."""
    stop_after: int = 5
    """Refused steps in a row that end the run."""


class TrainStep:
    """The step, its state, and where both lie. Calling it runs one step."""

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        refusal: RefusalConfig,
        *,
        abstract: Params,
        shardings: Params | None = None,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        assemble: Callable[[Params, Params], Params] = lambda params, frozen: params,
    ):
        """Build the jitted function; nothing is compiled or allocated yet.

        Args:
            objective: what is minimised.
            optimizer: of the trained parameters.
            refusal: which steps are refused.
            abstract: the trained parameters as shapes.
            shardings: theirs on the mesh.
            mesh, rules: where to run; None is one device.
            assemble: makes the objective's parameters of the trained and the frozen ones.
        """
        self.objective, self.optimizer, self.refusal, self.assemble = objective, optimizer, refusal, assemble
        self.mesh, self.rules = mesh, rules
        self._abstract = jax.eval_shape(self._new_state, abstract, jax.eval_shape(lambda: jax.random.key(0)))
        self.shardings: State | None = None
        if mesh is not None:
            whole = NamedSharding(mesh, PartitionSpec())
            self.shardings = jax.tree.map(lambda _: whole, self._abstract) | {
                "params": shardings,
                "opt": optimizer.shardings(self._abstract["opt"], shardings, whole),
            }
        placed: dict[str, Any] = {} if self.shardings is None else {"out_shardings": (self.shardings, None)}
        self._jitted = jax.jit(self._step, donate_argnums=0, **placed)
        self._evaluate = jax.jit(self._sums)

    def abstract_state(self) -> State:
        """Return the state as shapes, with shardings on a mesh: for restoring into, and for compiling ahead."""
        if self.shardings is None:
            return self._abstract
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            self._abstract,
            self.shardings,
        )

    def abstract_batch(self, micro_batches: int, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return a batch as shapes: `rows` are those of a micro-batch over the whole mesh."""
        where = self.batch_sharding()
        return {
            name: jax.ShapeDtypeStruct((micro_batches, rows, length), dtype, sharding=where)
            for name, dtype in BATCH.items()
        }

    def batch_sharding(self) -> NamedSharding | None:
        """Return where a batch's arrays [A, B, T] lie."""
        if self.mesh is None or self.rules is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(None, *spec("batch", self.rules)))

    def init(self, params: Params, seed: int) -> State:
        """Make the state around parameters, which are given away."""
        placed: dict[str, Any] = {} if self.shardings is None else {"out_shardings": self.shardings}
        return jax.jit(self._new_state, donate_argnums=0, **placed)(params, jax.random.key(seed))

    def put(self, arrays: Arrays, micro_batches: int) -> dict[str, jax.Array]:
        """Put this process's rows [A*B, T] of a batch onto the devices as [A, B, T]."""
        cut = {name: np.asarray(arrays[name], dtype) for name, dtype in BATCH.items()}
        cut = {name: x.reshape(micro_batches, -1, *x.shape[1:]) for name, x in cut.items()}
        where = self.batch_sharding()
        if where is None:
            return {name: jax.device_put(x) for name, x in cut.items()}
        return {name: jax.make_array_from_process_local_data(where, x) for name, x in cut.items()}

    def lower(self, micro_batches: int, rows: int, length: int, frozen: Params | None = None) -> jax.stages.Lowered:
        """Lower the step for a shape of batch, without any array: what `plan` compiles."""
        return self._jitted.lower(
            self.abstract_state(), {} if frozen is None else frozen, self.abstract_batch(micro_batches, rows, length)
        )

    def compile(self, state: State, frozen: Params, batch: Arrays) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
        """Compile the step for these arguments, none of which is consumed; call the result as the step itself."""
        return self._jitted.lower(state, frozen, batch).compile()

    def __call__(self, state: State, frozen: Params, batch: Arrays) -> tuple[State, dict[str, jax.Array]]:
        """Run a step: the state is consumed; metrics are device scalars (and expert_load [M, E])."""
        return self._jitted(state, frozen, batch)

    def evaluate(self, state: State, frozen: Params, batch: Arrays) -> dict[str, jax.Array]:
        """Return the objective's metrics of a batch, without gradients; the state is only read."""
        return self._evaluate(state["params"], frozen, state["rng"], batch)

    def _new_state(self, params: Params, key: jax.Array) -> State:
        return {
            "params": params,
            "opt": self.optimizer.init(params),
            "step": jnp.zeros((), jnp.int32),
            "rng": jax.random.key_data(key),
        } | self._recent(lambda: jnp.full(self.refusal.window, jnp.inf, jnp.float32))

    def _step(self, state: State, frozen: Params, batch: Arrays) -> tuple[State, dict[str, jax.Array]]:
        params, rng = state["params"], self._rng(state["rng"], state["step"])
        whole = lax.stop_gradient(self.objective.prepare(self.assemble(params, frozen), batch))

        def slope(micro: Arrays, rng: jax.Array) -> tuple[tuple[jax.Array, Any], Params]:
            def loss(params: Params) -> tuple[jax.Array, Any]:
                return self.objective(self.assemble(params, frozen), micro, whole, rng)

            return jax.value_and_grad(loss, has_aux=True)(params)

        count = batch["tokens"].shape[0]
        keys = jax.random.split(rng, count)
        if count == 1:
            (loss, sums), grads = slope(jax.tree.map(lambda x: x[0], batch), keys[0])
        else:

            def add(total: Any, one: Any) -> tuple[Any, None]:
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, slope(*one)), None

            like = jax.eval_shape(slope, jax.tree.map(lambda x: x[0], batch), keys[0])
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
            ((loss, sums), grads), _ = lax.scan(add, zeros, (batch, keys))
        squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
        norm = jnp.sqrt(jnp.sum(jnp.stack(squares)))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        spike = finite & self._spike(loss, state)
        good = finite & ~spike
        updated, opt, rate = self.optimizer.update(grads, state["opt"], params, done=state["step"], norm=norm)
        new = {
            "params": updated,
            "opt": opt,
            "step": state["step"] + 1,
            "rng": state["rng"],
        } | self._recent(lambda: jnp.concatenate([state["recent"][1:], loss[None]]))
        new = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state)
        metrics = self.objective.finish(sums, whole)
        refused = jnp.where(finite, jnp.where(spike, SPIKE, ACCEPTED), NOT_FINITE)
        return new, metrics | {"loss": loss, "grad_norm": norm, "learning_rate": rate, "refused": refused}

    def _sums(self, params: Params, frozen: Params, rng: jax.Array, batch: Arrays) -> dict[str, jax.Array]:
        whole_params = self.assemble(params, frozen)
        whole = self.objective.prepare(whole_params, batch)
        key = self._rng(rng, jnp.zeros((), jnp.int32))

        def add(total: Any, micro: Arrays) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, self.objective(whole_params, micro, whole, key)), None

        like = jax.eval_shape(
            lambda micro: self.objective(whole_params, micro, whole, key), jax.tree.map(lambda x: x[0], batch)
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        (loss, sums), _ = lax.scan(add, zeros, batch)
        return self.objective.finish(sums, whole) | {"loss": loss}

    def _recent(self, make: Callable[[], jax.Array]) -> State:
        return {"recent": make()} if self.refusal.spike_sigma else {}

    def _spike(self, loss: jax.Array, state: State) -> jax.Array:
        """Say whether a loss stands out; a window that is not full holds infinity, above which nothing stands."""
        if not self.refusal.spike_sigma:
            return jnp.zeros((), bool)
        recent = state["recent"]
        full = jnp.all(jnp.isfinite(recent))
        return full & (loss > jnp.mean(recent) + self.refusal.spike_sigma * jnp.std(recent))

    @staticmethod
    def _rng(data: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.wrap_key_data(data), step)

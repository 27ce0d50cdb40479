"""What a plan finds: memory and cost per phase on one mesh, the meshes that lost, and the JSON of it.

Of training there is one phase, train, and a step for each remat policy that was tried; `steps["train"]` is the fastest
of those that fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3_jax.plan.chips import Chip, Topology
from qwen3_jax.plan.cost import Cost


class PlanError(ValueError):
    """A plan that cannot be made; one line with what would be possible."""


@dataclass(frozen=True)
class Memory:
    """Bytes per chip. `code` is the program, `temp` what a step needs beside its arguments and results."""

    weights: int
    cache: int
    temp: int
    code: int
    optimizer: int = 0
    """Of training: the moments, and master weights."""

    @classmethod
    def of(cls, analysis: Any, *, state: int, weights: int, cache: int = 0, optimizer: int = 0) -> "Memory":
        """Read the compiler's account of a program whose arguments hold `state` bytes of weights, cache and moments.

        What else its arguments and results take counts as temporary: rows, and padding to tiles.
        """
        used = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        temp = analysis.temp_size_in_bytes + max(0, used - state)
        return cls(weights, cache, temp, analysis.generated_code_size_in_bytes, optimizer)

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.cache + self.temp + self.code

    def to_json(self) -> dict[str, int]:
        parts = ["weights", *["optimizer"] * bool(self.optimizer), "cache", "temp", "code", "total"]
        return {name: getattr(self, name) for name in parts}


@dataclass(frozen=True)
class Step:
    """One phase, compiled: tokens per execution over all chips, its memory and its cost per chip."""

    tokens: int
    memory: Memory
    cost: Cost
    aliased_bytes: int
    compile_s: float
    floor_s: float = 0.0
    """See `meshes.floor_s`."""
    gradients: int = 0
    """Of training: their bytes per chip, by arithmetic; a part of `memory.temp`."""
    model_flops: float = 0.0
    """Of training: those of a chip, three times the forward pass; what is computed again does not count."""

    def mfu_bound(self, chip: Chip) -> float:
        """Return the model FLOPs utilisation that the schedule leaves room for."""
        return self.model_flops / (self.cost.schedule_s * chip.bf16_flops)


@dataclass(frozen=True)
class Refused:
    """A mesh that was not chosen, and why."""

    mesh: dict[str, int]
    reason: str
    over_bytes: float = math.inf
    """By how much it does not fit a chip, if that is the reason."""


def none_fits(said: str, refused: Sequence[Refused]) -> PlanError:
    """Return an error with the reasons of the two meshes that were nearest to fitting."""
    nearest = sorted(refused, key=lambda r: r.over_bytes)[:2]
    return PlanError(f"{said}: {'; '.join(f'{mesh_name(r.mesh)}: {r.reason}' for r in nearest)}")


@dataclass(frozen=True)
class Plan:
    """What `plan` found for one mesh."""

    model: str
    topology: Topology
    mesh: dict[str, int]
    batch: int
    context: int
    dtype: str
    steps: dict[str, Step]
    refused: list[Refused] = field(default_factory=list)
    error: str | None = None
    """The compiler's message if the program does not fit or does not compile."""
    remat: dict[str, Step | str] = field(default_factory=dict)
    """Of training: the step with each remat policy, or why the compiler refuses it."""

    @property
    def chip(self) -> Chip:
        return self.topology.chip

    @property
    def memory(self) -> Memory | None:
        """The phase that needs most; the cache is that of the whole batch in every phase."""
        return max((s.memory for s in self.steps.values()), key=lambda m: m.total, default=None)

    @property
    def fits(self) -> bool:
        return self.error is None and self.memory is not None and self.memory.total <= self.chip.hbm_bytes

    @property
    def policy(self) -> str | None:
        """The remat policy of `steps["train"]`."""
        return next((name for name, step in self.remat.items() if step is self.steps.get("train")), None)

    def to_json(self) -> dict[str, Any]:
        """Return the stable form: bytes, seconds, per chip and per step."""
        memory = self.memory
        return {
            "model": self.model,
            "topology": str(self.topology),
            "mesh": self.mesh,
            "chips": self.topology.devices,
            "batch": self.batch,
            "context": self.context,
            "dtype": self.dtype,
            "fits": self.fits,
            "error": self.error,
            "hbm_bytes_per_chip": None if memory is None else memory.to_json(),
            "hbm_limit_bytes": int(self.chip.hbm_bytes),
            "step": {phase: self._step_json(step) for phase, step in self.steps.items()},
            "compile_s": round(sum(step.compile_s for step in self.steps.values()), 1),
            "refused": [{"mesh": r.mesh, "reason": r.reason} for r in self.refused],
        } | ({"remat": {name: self._policy_json(step) for name, step in self.remat.items()}} if self.remat else {})

    def _policy_json(self, step: Step | str) -> dict[str, Any]:
        if isinstance(step, str):
            return {"fits": False, "error": step, "hbm_bytes_per_chip": None}
        return {
            "fits": step.memory.total <= self.chip.hbm_bytes,
            "error": None,
            "hbm_bytes_per_chip": step.memory.to_json(),
            "schedule_s": step.cost.schedule_s,
            "mfu_bound": step.mfu_bound(self.chip),
            "compile_s": round(step.compile_s, 1),
        }

    def _step_json(self, step: Step) -> dict[str, Any]:
        cost = step.cost
        training = {
            "remat": self.policy,
            "gradient_bytes": step.gradients,
            "model_flops": step.model_flops,
            "mfu_bound": step.mfu_bound(self.chip),
        }
        return {
            "flops": cost.flops,
            "hbm_bytes": cost.hbm_bytes,
            "ici_bytes": cost.ici_bytes,
            "collectives": {k: {"count": c.count, "bytes": c.bytes} for k, c in sorted(cost.collectives.items())},
            "roofline_s": {"compute": cost.compute_s, "hbm": cost.hbm_s, "ici": cost.ici_s},
            "schedule_s": cost.schedule_s,
            "floor_s": step.floor_s,
            "bound": cost.bound,
            "copied_bytes": cost.copied_bytes,
            "aliased_bytes": step.aliased_bytes,
            "touched": [
                {"what": what, "array": array, "count": count, "bytes": amount}
                for what, array, count, amount in cost.touched()
            ],
            "tokens": step.tokens,
            "tokens_per_s_per_chip": step.tokens / cost.schedule_s / self.topology.devices,
            "unpriced": cost.unpriced,
            "billed_once": cost.billed_once,
            "not_billed": cost.not_billed,
        } | (training if step.model_flops else {})


def mesh_name(sizes: dict[str, int]) -> str:
    """Name a mesh by its axes that are longer than one: "expert=4,model=4"."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def gb(amount: float) -> str:
    return f"{amount / 1e9:.2f} GB"

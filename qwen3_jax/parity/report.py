"""What a comparison finds: differences, tolerances, the verdict, and the table in the terminal.

Arrays → `difference` → `Measure` per place → `Report` → `show`, or `page.render`.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table


class ParityError(ValueError):
    """A comparison cannot start; the message is one line with the remedy."""


@dataclass(frozen=True)
class Tolerances:
    """State how far a place may lie from PyTorch, as a share of the largest value PyTorch has there.

    `isolated` judges every place of every layer, each layer fed with PyTorch's input; `logits` judges the final logits
    after our own stream through all layers, of tokens that met the same experts throughout; `reason` says why these and
    not smaller.
    """

    isolated: float
    logits: float
    reason: str


TOLERANCES: dict[str, Tolerances] = {
    "float32": Tolerances(
        1e-5,
        1e-5,
        "float32 sums of up to 25,600 terms in two orders part by about sqrt(terms) units in the last place (2^-24), "
        "1e-5 of the largest value; a wrong formula is off by 1e-4 at the least",
    ),
    "bfloat16": Tolerances(
        2**-5,
        2**-3,
        "bfloat16 keeps 8 bits: one rounding is up to 2^-9, a layer's dozen roundings in two orders reach a few times "
        "2^-8 of the largest value, and the stream adds them up (random 0.6B weights: 2^-7 per place, 2^-5.6 after 28 "
        "layers); small faults show in float32 only",
    ),
}


@dataclass(frozen=True)
class Difference:
    """Say how far ours lies from PyTorch's at one place, over all compared tokens."""

    max_abs: float
    largest: float  # of PyTorch's absolute values
    cosine: float  # of the worst token

    @property
    def relative(self) -> float:
        """Largest difference as a share of PyTorch's largest value."""
        return self.max_abs / self.largest if self.largest > 0 else (0.0 if self.max_abs == 0 else float("inf"))


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Compare two [n, ...] arrays, one row per token, in float64; anything not finite counts as infinitely far."""
    if ours.shape != theirs.shape:
        raise ParityError(f"shapes {ours.shape} and {theirs.shape} cannot be compared: the folder's config is misread")
    max_abs, largest, cosine = 0.0, 0.0, 1.0
    for a, b in rows_of(*(x.reshape(len(x), math.prod(x.shape[1:])) for x in (ours, theirs))):
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return Difference(float("inf"), float(np.nanmax(np.abs(theirs), initial=0.0)), -1.0)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        products = np.where(np.all(a == b, axis=1), 1.0, np.sum(a * b, axis=1) / np.where(norms == 0, 1.0, norms))
        max_abs = max(max_abs, float(np.abs(a - b).max()))
        largest = max(largest, float(np.abs(b).max()))
        cosine = min(cosine, float(products.min()))
    return Difference(max_abs, largest, cosine)


def rows_of(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield [n, size] arrays as float64, a few rows at a time: all logits at once would be the peak of memory."""
    n, size = arrays[0].shape
    step = max(1, 2**21 // max(size, 1))
    for row in range(0, n, step):
        yield tuple(array[row : row + step].astype(np.float64) for array in arrays)


@dataclass(frozen=True)
class Measure:
    """Hold one place's differences and its verdict.

    For `mlp.router_experts` there is no difference but the share of tokens whose expert set differs: for `ties` of
    them the experts in question score closer to each other than twice the tolerance of the router logits, so rounding
    decides: no fault.
    """

    place: str
    tolerance: float
    ok: bool
    isolated: Difference | None = None
    accumulated: Difference | None = None
    differing: float = 0.0
    ties: float = 0.0
    accumulated_differing: float = 0.0


@dataclass(frozen=True)
class Logits:
    """Hold what a user sees: final logits after our own stream, in nats and shares of tokens.

    A near tie of experts that rounding decides otherwise sends a token on another, equally good way. Such tokens have
    `strayed`; the verdict is on the others, `judged`.
    """

    difference: Difference
    judged: Difference
    strayed: float
    kl_mean: float  # KL(PyTorch || ours)
    kl_max: float
    top1_agreement: float
    tolerance: float
    ok: bool


@dataclass(frozen=True)
class Report:
    """Everything a comparison found."""

    folder: str
    model: str
    dtype: str
    tokens: int
    positions: int  # the largest
    tolerances: Tolerances
    measures: tuple[Measure, ...]
    logits: Logits
    versions: dict[str, str]
    seconds: float

    @property
    def ok(self) -> bool:
        return self.logits.ok and all(measure.ok for measure in self.measures)

    @property
    def first_failure(self) -> str | None:
        """Name the first place out of tolerance, in the order of computation."""
        return next((m.place for m in self.measures if not m.ok), None if self.logits.ok else "logits")

    @property
    def layers(self) -> list[dict[str, Measure]]:
        """The measures of each layer by place."""
        layers: dict[int, dict[str, Measure]] = {}
        for measure in self.measures:
            if measure.place.startswith("layers."):
                _, i, place = measure.place.split(".", 2)
                layers.setdefault(int(i), {})[place] = measure
        return [layers[i] for i in sorted(layers)]

    @property
    def outside_layers(self) -> list[Measure]:
        """The measures of the embedding, the final norm and the logits."""
        return [m for m in self.measures if not m.place.startswith("layers.")]

    @property
    def verdict(self) -> str:
        if self.ok:
            judged = f" (logits judged on {1 - self.logits.strayed:.0%} of the tokens)" if self.logits.strayed else ""
            return f"ok: all {len(self.measures)} places and the logits equal PyTorch's within tolerance{judged}"
        measure = next((m for m in self.measures if not m.ok), None)
        if measure is None:
            far = self.logits.judged.relative
            return (
                f"FAIL: every place agrees by itself, the accumulated logits do not: {_off(far, self.logits.tolerance)}"
            )
        if measure.isolated is None:
            share = measure.differing - measure.ties
            return f"FAIL at {measure.place}: {share:.1%} of the tokens go to other experts without a near tie"
        return f"FAIL at {measure.place}: {_off(measure.isolated.relative, measure.tolerance)}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; what is infinitely far is null."""
        verdict = {"ok": self.ok, "first_failure": self.first_failure, "verdict": self.verdict}
        return _json(dataclasses.asdict(self) | verdict)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _off(found: float, allowed: float) -> str:
    return f"off by {found:.1e} of the largest value, allowed {allowed:.1g}"


def show(report: Report, console: Console) -> None:
    """Print a report as a table, one row per layer, and the verdict."""
    table = Table(title=f"{report.folder}: {report.model}, {report.dtype}", box=box.SIMPLE_HEAD, padding=0)
    moe = any("mlp.router_experts" in layer for layer in report.layers)
    columns = ["place", "attention", "router", "experts≠", "MLP", "residual", "own stream", "cosine"]
    for name in columns if moe else [c for c in columns if c not in ("router", "experts≠")]:
        table.add_column(name, justify="left" if name == "place" else "right", no_wrap=True)

    def cell(measure: Measure | None) -> str:
        if measure is None:
            return "-"
        text = f"{measure.differing:.1%}" if measure.isolated is None else f"{measure.isolated.relative:.1e}"
        return text if measure.ok else f"[bold red]{text}[/]"

    def worst(layer: dict[str, Measure], prefix: str) -> Measure | None:
        """Show a group of places by its first failure, else by its last place."""
        group = [m for place, m in layer.items() if place.startswith(prefix)]
        return next((m for m in group if not m.ok), group[-1] if group else None)

    def outside(measure: Measure) -> None:
        if measure.accumulated is not None:
            table.add_row(measure.place, *[""] * (4 if moe else 2), cell(measure), *_stream(measure.accumulated))

    embedding, *last = report.outside_layers
    outside(embedding)
    for i, layer in enumerate(report.layers):
        out = layer["output"]
        assert out.accumulated is not None
        router = [cell(layer.get("mlp.router_logits")), cell(layer.get("mlp.router_experts"))] if moe else []
        table.add_row(
            f"layer {i}",
            cell(worst(layer, "self_attn")),
            *router,
            cell(layer["mlp.output"]),
            cell(out),
            *_stream(out.accumulated),
        )
    for measure in last:
        outside(measure)
    console.print(table)
    logits = report.logits
    console.print(
        f"{report.tokens} tokens at positions up to {report.positions}; differences are shares of PyTorch's largest "
        f"value, allowed {report.tolerances.isolated:.1g} per place and {report.tolerances.logits:.1g} for the logits",
        highlight=False,
    )
    console.print(
        f"logits: max abs {logits.difference.max_abs:.2e} of {logits.difference.largest:.3g}, "
        f"KL {logits.kl_mean:.1e} nats (worst {logits.kl_max:.1e}), top-1 agreement {logits.top1_agreement:.1%}"
        + (f"; {logits.strayed:.1%} of the tokens met other experts, not judged" if logits.strayed else ""),
        highlight=False,
    )
    console.print(report.verdict, style="green" if report.ok else "bold red", highlight=False)


def _stream(far: Difference) -> tuple[str, str]:
    return f"{far.relative:.1e}", f"{far.cosine:.7f}"

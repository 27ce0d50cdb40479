"""The comparison: tokens → both sides, layer by layer → differences held against tolerances.

`run` drives `reference.Reference` and `subject.Subject` in step and keeps only numbers. Axis letters: B batch,
T length, E experts, C experts per token, V vocabulary.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qwen3_jax import ops as formulations
from qwen3_jax.checkpoint import inspect
from qwen3_jax.ops import Ops
from qwen3_jax.parity import page
from qwen3_jax.parity.report import (
    TOLERANCES,
    Logits,
    Measure,
    ParityError,
    Report,
    Tolerances,
    difference,
    rows_of,
    show,
)
from qwen3_jax.parity.subject import Subject, mesh_of
from qwen3_jax.sharding import parse_mesh

Dtype = Literal["float32", "bfloat16"]

# The places of a layer in the order they are computed: the first one out of tolerance is where the fault lies.
PLACES = (
    "self_attn.input",
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.output",
    "mlp.input",
    "mlp.router_logits",
    "mlp.router_experts",
    "mlp.router_weights",
    "mlp.output",
    "output",
)
VOCAB_STRETCH = 16_384


def sample(
    vocab_size: int, max_position: int, *, length: int, seed: int, padding: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw tokens, positions and segment ids [B, length] that show what short prompts hide.

    Row 0 is a plain prompt; row 1 spreads its positions over the whole context, where wrong frequencies and
    low-precision angles show; row 2, with `padding`, is padded on both sides (segment 0).
    """
    rng = np.random.default_rng(seed)
    plain = np.arange(length)
    spread = np.sort(rng.choice(max_position, length, replace=False)) if length < max_position else plain
    spread[-1] = max_position - 1 if length < max_position else spread[-1]
    rows, segments = [plain, spread], [plain >= 0, plain >= 0]
    if padding:
        left, right = length // 4, length // 8
        rows.append(np.maximum(plain - left, 0))
        segments.append((plain >= left) & (plain < length - right))
    tokens = rng.integers(0, vocab_size, (len(rows), length))
    return tokens.astype(np.int32), np.stack(rows).astype(np.int32), np.stack(segments).astype(np.int32)


def run(
    folder: Path | str,
    *,
    tokens: Sequence[int] | np.ndarray | None = None,
    prompt: str | None = None,
    length: int = 32,
    seed: int = 0,
    padding: bool = True,
    dtype: Dtype = "float32",
    tolerances: Tolerances | None = None,
    ops: Ops | None = None,
    mesh: str | None = None,
    report: Path | str | None = None,
    progress: bool = True,
) -> Report:
    """Compare a Hugging Face folder with transformers, one layer in memory at a time.

    Args:
        folder: config.json and safetensors weights.
        tokens: ids to run, [T] or [B, T]; or
        prompt: a text for the folder's tokenizer; or neither, for tokens drawn as `sample` describes, with
        length: tokens per row,
        seed: of the draw,
        padding: a padded row among them.
        dtype: what both sides compute in.
        tolerances: None for `TOLERANCES[dtype]`.
        ops: the formulation under test; None for this platform's own.
        mesh: spread our side over devices as serving does, "expert=2,model=4"; None for one device.
        report: an HTML file to write.
        progress: show a bar on a terminal.

    Raises:
        CheckpointError: the folder cannot be used.
        ShardingError: a mesh that cannot be read, or that the model does not divide over.
        ParityError: bad tokens, fewer devices than the mesh has, PyTorch or transformers are not installed, or the
            report cannot be written there.
    """
    began = time.perf_counter()
    if dtype not in TOLERANCES:
        raise ParityError(f"dtype {dtype!r} is not compared: give one of {', '.join(TOLERANCES)}")
    if report is not None and not Path(report).absolute().parent.is_dir():
        raise ParityError(f"{report}: no such folder to write the report to; make it first")
    checkpoint = inspect(folder)
    reference_type = _reference_type()
    config = checkpoint.config
    if tokens is None and prompt is None:
        if not 2 <= length <= config.max_position_embeddings:
            raise ParityError(f"length {length} does not fit: give 2..{config.max_position_embeddings}")
        ids, positions, segment_ids = sample(
            config.vocab_size, config.max_position_embeddings, length=length, seed=seed, padding=padding
        )
    else:
        ids = _given(checkpoint.folder, config.vocab_size, tokens, prompt)
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        segment_ids = np.ones_like(ids)

    bounds = TOLERANCES[dtype] if tolerances is None else tolerances
    ops = formulations.for_platform(jax.default_backend()) if ops is None else ops
    spread = None if mesh is None else mesh_of(parse_mesh(mesh))
    ours = Subject(checkpoint, dtype, ops, spread)
    theirs = reference_type(checkpoint.folder, dtype)
    comparison = _Comparison(bounds, segment_ids > 0)
    L = config.num_hidden_layers
    # A float32 product must be one: TPU and GPU round its inputs to fewer bits unless told otherwise.
    precision = jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext()
    with _progress_bar(L + 2, progress) as advance, precision:
        reference_stream = theirs.embed(ids, positions, segment_ids)
        stream = ours.embed(ids)
        comparison.compare("embed_tokens", stream, stream, reference_stream)
        advance("embedding")
        # Both of our runs of a layer share one call, and one read of its weights: isolated rows first.
        twice = [np.concatenate([x, x]) for x in (positions, segment_ids)]
        for i in range(L):
            seen = theirs.layer(i)
            both = ours.layer(i, np.concatenate([reference_stream, stream]), *twice)
            comparison.compare_layer(i, both, seen)
            reference_stream, stream = seen["output"], both["output"][len(ids) :]
            advance(f"layer {i}")
        reference_hidden = theirs.norm()
        isolated, hidden = (ours.norm(x) for x in (reference_stream, stream))
        comparison.compare("norm", isolated, hidden, reference_hidden)
        logits = comparison.compare_logits(ours, theirs, reference_hidden, hidden, config.vocab_size)
        advance("logits")

    found = Report(
        folder=str(folder),
        model=f"{config.model_type}, {L} layers, hidden {config.hidden_size}"
        + (f", {config.num_experts} experts" if config.num_experts else "")
        + (f", on mesh {mesh}" if mesh else ""),
        dtype=dtype,
        tokens=int((segment_ids > 0).sum()),
        positions=int(positions.max()),
        tolerances=bounds,
        measures=tuple(comparison.measures),
        logits=logits,
        versions={name: metadata.version(name) for name in ("jax", "torch", "transformers")},
        seconds=time.perf_counter() - began,
    )
    if report is not None:
        _write(Path(report), page.render(found))
    return found


def main(
    folder: Path,
    *,
    report: Path | None = None,
    prompt: str | None = None,
    length: int = 32,
    seed: int = 0,
    padding: bool = True,
    dtype: Dtype = "float32",
    mesh: str | None = None,
    as_json: bool = False,
) -> int:
    """Compare a folder with PyTorch, print the table (or JSON), and return the exit code: 0 equal, 1 not.

    Arguments and errors as for `run`; errors are ValueErrors of one line. With a mesh, a CPU becomes as many devices as
    the mesh needs, if no device was touched before.
    """
    if mesh is not None and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # devices are in use: those at hand must do
            jax.config.update("jax_num_cpu_devices", math.prod(parse_mesh(mesh).values()))
    found = run(
        folder,
        prompt=prompt,
        length=length,
        seed=seed,
        padding=padding,
        dtype=dtype,
        mesh=mesh,
        report=report,
        progress=True,
    )
    if as_json:
        json.dump(found.to_dict(), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        show(found, Console())
        if report is not None:
            print(f"report: {report}")
    return 0 if found.ok else 1


def _reference_type() -> Callable[..., Any]:
    """Import PyTorch's side."""
    try:
        from qwen3_jax.parity.reference import Reference
    except ImportError as error:
        raise ParityError(f"parity needs PyTorch and transformers: pip install 'qwen3-jax[test]' ({error})") from None
    return Reference


def _given(folder: Path, vocab_size: int, tokens: Any, prompt: str | None) -> np.ndarray:
    """Return the caller's tokens as int32 [B, T]."""
    if tokens is not None and prompt is not None:
        raise ParityError("both tokens and a prompt are given: give one of them")
    if prompt is not None:
        from qwen3_jax.text.tokenizer import Tokenizer

        tokens = Tokenizer.from_folder(folder).encode(prompt)
    ids = np.atleast_2d(np.asarray(tokens))
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise ParityError(f"tokens of shape {list(ids.shape)} and dtype {ids.dtype}: give whole numbers, [T] or [B, T]")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ParityError(
            f"tokens lie in {ids.min()}..{ids.max()}: vocab_size is {vocab_size}, give 0..{vocab_size - 1}"
        )
    return ids.astype(np.int32)


class _Comparison:
    """Collects measures. Arrays come as [B, T, ...]; only tokens where `kept` [B, T] is true count."""

    def __init__(self, tolerances: Tolerances, kept: np.ndarray):
        self.tolerances, self.kept = tolerances, kept
        self.strayed = np.zeros_like(kept)  # tokens that met other experts somewhere in our own stream
        self.measures: list[Measure] = []

    def compare(
        self, place: str, isolated: np.ndarray, accumulated: np.ndarray, theirs: np.ndarray, without: Any = False
    ) -> None:
        """Measure one place; tokens in `without` [B, T] are left out of the isolated difference."""
        chosen = self.kept & ~np.asarray(without)
        alone = difference(isolated[chosen], theirs[chosen])
        self.measures.append(
            Measure(
                place,
                self.tolerances.isolated,
                alone.relative <= self.tolerances.isolated,
                alone,
                difference(accumulated[self.kept], theirs[self.kept]),
            )
        )

    def compare_layer(self, i: int, both: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
        """Measure all places of layer `i`; `both` holds the isolated rows, then the accumulated ones."""
        B = len(self.kept)
        ties = differing = np.zeros_like(self.kept)
        for place in (place for place in PLACES if place in theirs):
            isolated, accumulated, reference = both[place][:B], both[place][B:], theirs[place]
            path = f"layers.{i}.{place}"
            if place == "mlp.router_experts":
                differing = ~_same_set(isolated, reference) & self.kept
                ties = differing & self._explained_by_rounding(isolated, reference, theirs["mlp.router_logits"])
                elsewhere = ~_same_set(accumulated, reference) & self.kept
                self.strayed = self.strayed | elsewhere
                count = self.kept.sum()
                self.measures.append(
                    Measure(
                        path,
                        0.0,
                        bool((ties == differing).all()),
                        differing=float(differing.sum() / count),
                        ties=float(ties.sum() / count),
                        accumulated_differing=float(elsewhere.sum() / count),
                    )
                )
            elif place == "mlp.router_weights":
                E = theirs["mlp.router_logits"].shape[-1]
                spread = [
                    _by_expert(weights, source["mlp.router_experts"][rows], E)
                    for weights, source, rows in (
                        (isolated, both, slice(0, B)),
                        (accumulated, both, slice(B, None)),
                        (reference, theirs, slice(None)),
                    )
                ]
                self.compare(path, *spread, without=differing)
            else:
                self.compare(path, isolated, accumulated, reference, without=ties)

    def _explained_by_rounding(self, ours: np.ndarray, theirs: np.ndarray, router_logits: np.ndarray) -> np.ndarray:
        """Say for which tokens [B, T] every expert that only one side chose lies so close to the line between PyTorch's
        last chosen and first rejected one that logits within tolerance can fall on either side of it."""
        if ours.shape != theirs.shape:
            return np.zeros_like(self.kept)
        band = 2 * self.tolerances.isolated * np.abs(router_logits[self.kept]).max()
        chosen = [_by_expert(np.ones(x.shape), x, router_logits.shape[-1]) > 0 for x in (ours, theirs)]
        worst_chosen = np.min(router_logits, axis=-1, keepdims=True, where=chosen[1], initial=np.inf)
        best_rejected = np.max(router_logits, axis=-1, keepdims=True, where=~chosen[1], initial=-np.inf)
        added, dropped = chosen[0] & ~chosen[1], chosen[1] & ~chosen[0]
        far = (added & (router_logits < worst_chosen - band)) | (dropped & (router_logits > best_rejected + band))
        return np.asarray(~far.any(axis=-1))

    def compare_logits(
        self, ours: Subject, theirs: Any, reference_hidden: np.ndarray, hidden: np.ndarray, vocab_size: int
    ) -> Logits:
        """Measure the logits, a stretch of the vocabulary in memory at a time on each side."""
        stretch = VOCAB_STRETCH // ours.vocab_parts * ours.vocab_parts
        edges = [*range(0, vocab_size, stretch), vocab_size]
        columns = list(itertools.pairwise(edges))
        reference = np.concatenate([theirs.logits(*edge)[self.kept] for edge in columns], axis=-1)
        isolated, accumulated = (
            np.concatenate([ours.logits(x, *edge)[self.kept] for edge in columns], axis=-1)
            for x in (reference_hidden, hidden)
        )
        alone, overall = (difference(x, reference) for x in (isolated, accumulated))
        strayed = self.strayed[self.kept]
        judged = difference(accumulated[~strayed], reference[~strayed])
        bound = self.tolerances.isolated
        self.measures.append(Measure("logits", bound, alone.relative <= bound, alone, overall))
        kl = np.concatenate([_kl(*rows) for rows in rows_of(reference, accumulated)])
        return Logits(
            difference=overall,
            judged=judged,
            strayed=float(strayed.mean()),
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            top1_agreement=float((reference.argmax(-1) == accumulated.argmax(-1)).mean()),
            tolerance=self.tolerances.logits,
            ok=judged.relative <= self.tolerances.logits,
        )


def _same_set(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape != b.shape:
        return np.zeros(b.shape[:-1], bool)
    return (np.sort(a, axis=-1) == np.sort(b, axis=-1)).all(axis=-1)


def _by_expert(weights: np.ndarray, experts: np.ndarray, count: int) -> np.ndarray:
    """Spread weights [B, T, C] of chosen experts over all of them [B, T, E], so that their order does not matter."""
    out = np.zeros((*weights.shape[:-1], count), np.float32)
    np.put_along_axis(out, experts.astype(np.int64), weights, axis=-1)
    return out


def _kl(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Return KL(theirs || ours) [n] in nats of logits [n, V]; infinite if they are not finite."""
    with np.errstate(invalid="ignore"):
        p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (theirs, ours))
        kl = np.sum(np.exp(p) * (p - q), axis=-1)
    return np.maximum(np.where(np.isfinite(kl), kl, np.inf), 0.0)  # below 0 by rounding only


@contextlib.contextmanager
def _progress_bar(steps: int, enabled: bool) -> Iterator[Callable[[str], None]]:
    """Show a bar of layers on a terminal's stderr and yield the function that advances it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task("comparing", total=steps)
        yield lambda what: bar.update(task, advance=1, description=what)


def _write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.absolute().parent, delete=False) as partial:
            partial.write(text)
        Path(partial.name).chmod(0o644)
        os.replace(partial.name, path)
    except OSError as error:
        raise ParityError(f"{path}: the report cannot be written: {error.strerror or error}") from None

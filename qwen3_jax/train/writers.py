"""Where metrics go: metrics.jsonl always, TensorBoard, Weights & Biases and MLflow when a run asks for them.

A writer takes a step and a flat dict of numbers (lists of numbers only in JSON lines). The three services are optional
packages, imported when named; Weights & Biases stays offline unless WANDB_MODE says otherwise. A run keeps its name
there, a file in its folder, so that a resumed run goes on with the same curves. A service that fails later is given up
with a warning: training does not end by it, and metrics.jsonl has every number.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

METRICS = "metrics.jsonl"

log = logging.getLogger(__name__)


class WriterError(ValueError):
    """A writer whose package is missing, or that cannot be opened."""


class Writer(Protocol):
    """One place that metrics go to."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the values of a step."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class JsonLines:
    """One JSON object per line, with the step first; lines after the step that a run resumes from are dropped."""

    def __init__(self, path: Path, *, resume_from: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step(line) <= resume_from]
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(kept))
            partial.replace(path)
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(as_json({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def as_json(values: Any) -> str:
    """Return a line of JSON that every reader takes: what is no number, or infinite, is null."""
    try:
        return json.dumps(values, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(values))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> float:
    """Return the step of a line; one that was cut off by a kill is after every step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, folder: Path, resume_from: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_from + 1 if resume_from else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in scalars(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run in the run's folder `wandb`, offline unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        name = folder / "wandb.id"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "qwen3_jax"), name=folder.name, id=_kept(name), resume="allow",
            dir=str(folder), mode=mode, config=dict(config),
        )  # fmt: skip
        name.write_text(self._run.id)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(scalars(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run; where, is MLFLOW_TRACKING_URI's to say (by default mlflow.db in the working directory)."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow, name = mlflow, folder / "mlflow.id"
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "qwen3_jax"))
        before = _kept(name)
        run = mlflow.start_run(run_id=before, run_name=None if before else folder.name)
        if before is None:  # a run's parameters are written once
            mlflow.log_params(_flat(config))
        name.write_text(run.info.run_id)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._mlflow.log_metrics(scalars(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Service:
    """A service behind a writer that never raises; after a failure it is not asked again."""

    def __init__(self, name: str, writer: Writer):
        self._name, self._writer = name, writer
        self._failed = False

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._try(lambda: self._writer.write(step, values), f"from step {step} on")

    def close(self) -> None:
        self._try(self._writer.close, "at the end")

    def _try(self, action: Callable[[], None], when: str) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # services raise what they like
            self._failed = True
            log.warning("%s records nothing %s, %s has it: %s", self._name, when, METRICS, _line(error))


def _kept(path: Path) -> str | None:
    """Return the name that a service gave this run at an earlier start."""
    return path.read_text().strip() or None if path.is_file() else None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a configuration's values by dotted name, as on the command line."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(i): one for i, one in enumerate(value)}
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among the values."""
    return {name: value for name, value in values.items() if type(value) in (int, float)}


def open_all(folder: Path, names: Sequence[str], config: Mapping[str, Any], *, resume_from: int) -> list[Writer]:
    """Open metrics.jsonl and the named services.

    Raises:
        WriterError: a named service's package is not installed, or it cannot be opened.
    """
    make: dict[str, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoard(folder, resume_from),
        "wandb": lambda: WandB(folder, config),
        "mlflow": lambda: MLflow(folder, config),
    }
    writers: list[Writer] = []
    for name in names:
        try:
            writers.append(Service(name, make[name]()))
        except ImportError as error:
            package = {"tensorboard": "tensorboardX"}.get(name, name)
            raise WriterError(
                f"run.writers names {name}, whose package cannot be imported ({error}): pip install {package}"
            ) from None
        except Exception as error:
            raise WriterError(
                f"run.writers names {name}, which cannot be opened: {_line(error)}: see to it, or leave it out"
            ) from error
    return [JsonLines(folder / METRICS, resume_from=resume_from), *writers]

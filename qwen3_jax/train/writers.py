"""Where metrics go: metrics.jsonl always, TensorBoard, Weights & Biases and MLflow when a run asks for them.

A writer takes a step and a flat dict of numbers (lists of numbers only in JSON lines). The three services are optional
packages, imported when named; Weights & Biases stays offline unless WANDB_MODE says otherwise.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

METRICS = "metrics.jsonl"


class WriterError(ValueError):
    """A writer whose package is missing."""


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
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


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
        self._run = wandb.init(
            project="qwen3_jax", name=folder.name, id=folder.name, resume="allow", dir=str(folder), mode=mode,
            config=dict(config),
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(scalars(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run; where, is MLFLOW_TRACKING_URI's to say."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow = mlflow
        mlflow.set_experiment("qwen3_jax")
        mlflow.start_run(run_name=folder.name)
        mlflow.log_dict(dict(config), "config.json")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._mlflow.log_metrics(scalars(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among the values."""
    return {name: value for name, value in values.items() if type(value) in (int, float)}


def open_all(folder: Path, names: Sequence[str], config: Mapping[str, Any], *, resume_from: int) -> list[Writer]:
    """Open metrics.jsonl and the named services.

    Raises:
        WriterError: a named service's package is not installed.
    """
    make = {
        "tensorboard": lambda: TensorBoard(folder, resume_from),
        "wandb": lambda: WandB(folder, config),
        "mlflow": lambda: MLflow(folder, config),
    }
    writers: list[Writer] = []
    for name in names:
        try:
            writers.append(make[name]())
        except ImportError as error:
            package = {"tensorboard": "tensorboardX"}.get(name, name)
            raise WriterError(
                f"run.writers names {name}, whose package cannot be imported ({error}): pip install {package}"
            ) from None
    return [JsonLines(folder / METRICS, resume_from=resume_from), *writers]

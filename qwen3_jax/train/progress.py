"""What a run says on stderr: a bar with the latest numbers on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from qwen3_jax.train.build import ADAPTER
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.loop import EXIT_DONE, MODEL, Outcome

EVERY_S = 10.0


@contextmanager
def show(config: TrainConfig, *, quiet: bool = False) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Yield what to call with a step and its metrics."""
    if quiet:
        yield lambda step, metrics: None
        return
    total = sum(stage.steps for stage in config.stages)
    if not sys.stderr.isatty():
        last = -EVERY_S

        def say(step: int, metrics: dict[str, Any]) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY_S or "eval_cross_entropy" in metrics or step == total:
                last = time.monotonic()
                print(f"step {step}/{total} {line(metrics)}", file=sys.stderr, flush=True)

        yield say
        return
    with _Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:  # fmt: skip
        task = bar.add_task("train", total=total)

        def move(step: int, metrics: dict[str, Any]) -> None:
            if "eval_cross_entropy" in metrics:
                bar.print(f"step {step} {line(metrics)}")
            else:
                if not bar.numbers:  # a resumed run did not make its earlier steps just now
                    bar.reset(task, completed=step - 1)
                bar.numbers = line(metrics)
                bar.update(task, completed=step, description=metrics["stage"])

        yield move


class _Bar(Progress):
    """A bar, and below it, so that both fit into a narrow terminal, the numbers."""

    numbers = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.numbers, style="dim", no_wrap=True, overflow="ellipsis")


def ending(config: TrainConfig, outcome: Outcome) -> str:
    """Say how a run ended and where what it made lies."""
    if outcome.exit_code != EXIT_DONE:
        return f"stopped after step {outcome.step}, which is saved: the same command goes on"
    made = f", the model is in {Path(config.run.folder) / MODEL}" if config.run.export else ""
    if made and config.lora is not None:
        made += f", its adapters by themselves in {Path(config.run.folder) / ADAPTER}"
    return f"done after step {outcome.step}{made}"


def line(metrics: dict[str, Any]) -> str:
    """Render the numbers that are worth watching."""
    shapes = {
        "loss": "loss {:.4f}",
        "eval_cross_entropy": "held-out loss {:.4f}",
        "eval_accuracy": "accuracy {:.3f}",
        "grad_norm": "norm {:.2f}",
        "learning_rate": "rate {:.2e}",
        "tokens_per_s": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "expert_load_max": "busiest expert ×{:.2f}",
    }
    parts = [shape.format(metrics[name]) for name, shape in shapes.items() if name in metrics]
    if metrics.get("refused_total"):
        parts.insert(1, f"{metrics['refused_total']} refused")
    return " · ".join(parts)

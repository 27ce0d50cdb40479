"""The subcommands about a trained model's quality: `eval`, and `merge` for adapters. See `cli` for the rest."""

import dataclasses
import sys
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclasses.dataclass(frozen=True)
class Eval:
    """Ask a chat model held-out problems, thinking and not, and report how many it answers right.

    Writes results.json, results.md and, with budgets, budget.png.
    """

    model: Positional[Annotated[str, arg(metavar="MODEL", help="a model folder or hub id")]]
    output: Annotated[str, arg(metavar="DIR", help="where the files go; it is made")]
    problems: Annotated[int, arg(metavar="N", help="of each task")] = 100
    tasks: Annotated[tuple[str, ...], arg(metavar="TASK ...", help="names", help_behavior_hint="(default: all)")] = ()
    budgets: Annotated[tuple[int, ...], arg(metavar="N ...", help="thinking budgets of the curve, in tokens")] = (
        8, 16, 32, 64, 96, 128, 192, 256,
    )  # fmt: skip
    sampled: Annotated[bool, arg(help="sample too, as generation_config.json says, not only greedy")] = True
    max_tokens: Annotated[int, arg(metavar="N", help="of a reply; a longer one is wrong")] = 512
    through: Annotated[Literal["engine", "generator"], arg(help="what runs the model")] = "engine"
    rows: Annotated[int, arg(metavar="N", help="problems at a time")] = 32
    dtype: Annotated[Literal["float32", "bfloat16"], arg(help="of computation and parameters")] = "float32"
    seed: Annotated[int, arg(metavar="N", help="decides the problems and the samples")] = 0

    def run(self) -> int:
        from qwen3_jax.evaluate import run

        run.run(self, progress=lambda line: print(line, file=sys.stderr, flush=True))
        return 0


@dataclasses.dataclass(frozen=True)
class Merge:
    """Add LoRA adapters, in PEFT's form, to a model folder's weights for good."""

    base: Positional[Annotated[str, arg(metavar="BASE", help="the model folder they were trained on")]]
    adapter: Positional[Annotated[str, arg(metavar="ADAPTER", help="folder with adapter_config.json")]]
    out: Positional[Annotated[str, arg(metavar="OUT", help="model folder to write; it must not exist")]]

    def run(self) -> int:
        from qwen3_jax import checkpoint
        from qwen3_jax.train import lora_peft

        lora_peft.merge_folder(checkpoint.resolve(self.base), self.adapter, self.out)
        return 0

"""Compile the reference workloads for slices that are not here and print their table. Needs the `tpu` extra; an hour.

    python scripts/pods.py [--train] [--only 8B] [--keep DIR] [--hlo DIR]

With --keep every result is written to DIR, and not computed again. A phase is one line, see `plan.show.markdown`; with
--train the training steps instead, a line per remat policy, see `plan.show.train_markdown`.
The GPU workloads need the `cuda` extra (or its compiler alone) and are left out without it.
"""

import argparse
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from qwen3_jax.plan import show
from qwen3_jax.plan.compile import plan
from qwen3_jax.plan.result import PlanError
from qwen3_jax.train import planning


@dataclass(frozen=True)
class Workload:
    model: str
    topology: str
    batch: int
    context: int
    phases: tuple[str, ...]
    mesh: str = "auto"
    remat: str | None = None
    """Of training, whose one phase is train."""

    @property
    def name(self) -> str:
        steps = "+".join(self.phases) if self.remat is None else f"train_{self.remat}"
        return f"{self.model}_{self.topology}_{steps}_{self.batch}x{self.context}".replace(":", "-")


DECODE, PREFILL = ("decode",), ("prefill", "first")
CODER = "Qwen3-Coder-480B-A35B-Instruct"
WORKLOADS = [
    # Those with a figure to reach.
    Workload("Qwen3-8B", "v5e:2x2", 32, 4096, DECODE),
    Workload("Qwen3-8B", "v6e:2x2", 32, 4096, DECODE),
    Workload("Qwen3-8B", "v5e:2x2", 1, 4096, PREFILL),
    Workload("Qwen3-30B-A3B", "v5e:4x4", 64, 4096, DECODE),
    Workload("Qwen3-30B-A3B", "v6e:2x4", 64, 4096, DECODE),
    Workload("Qwen3-30B-A3B", "v5e:4x4", 1, 4096, PREFILL),
    Workload("Qwen3-235B-A22B", "v5p:2x2x4", 128, 8192, DECODE),
    # Every size on every kind of slice that holds it.
    Workload("Qwen3-8B", "v5p:2x2x1", 32, 4096, DECODE),
    Workload("Qwen3-30B-A3B", "v5p:2x2x1", 64, 4096, DECODE),
    Workload(CODER, "v5p:2x2x4", 64, 8192, DECODE),
    Workload("Qwen3-235B-A22B", "v6e:8x8", 64, 8192, DECODE),
    Workload("Qwen3-235B-A22B", "v5e:8x8", 64, 8192, DECODE),
    Workload(CODER, "v6e:8x8", 64, 8192, DECODE),
    Workload(CODER, "v5e:16x16", 256, 4096, DECODE),
    Workload("Qwen3-8B", "H100:8", 64, 8192, DECODE),
    Workload("Qwen3-30B-A3B", "H100:8", 64, 8192, DECODE),
    Workload("Qwen3-235B-A22B", "H100:8", 64, 8192, DECODE),
    Workload(CODER, "H100:8", 32, 8192, DECODE),
]
TRAINING = [
    Workload(model, slice_name, batch, 4096, ("train",), remat=remat)
    for model, slice_name, batch in (("Qwen3-8B", "v5p:2x2x4", 16), ("Qwen3-30B-A3B", "v5p:4x4x4", 64))
    for remat in planning.POLICIES
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="the training steps")
    parser.add_argument("--only", default="", help="workloads whose name contains this, as Qwen3-8B_v5e-2x2_decode_")
    parser.add_argument("--keep", type=Path, help="keep each result here, and do not compute those that are there")
    parser.add_argument("--hlo", type=Path, help="keep the compiled programs here as text")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for w in TRAINING if arguments.train else WORKLOADS:
        if arguments.only not in w.name:
            continue
        kept = arguments.keep / f"{w.name}.md" if arguments.keep else None
        if kept is None or not kept.exists():
            if w.topology.startswith("H100") and not _has_gpu_compiler():
                print(f"{w.name}: left out, needs pip install 'qwen3-jax[cuda]'", file=sys.stderr)
                continue
            text = compiled(w, arguments.hlo, kept)
        else:
            text = kept.read_text()
        head, rule, *rows = text.splitlines()
        for line in [*([] if lines else [head, rule]), *rows]:
            print(line, flush=True)
            lines.append(line)


def compiled(w: Workload, hlo: Path | None, kept: Path | None) -> str:
    """Compile a workload and return its table; `kept` gets a copy, and JSON beside it."""
    print(f"== {w.name}", file=sys.stderr)
    shape = {"batch": w.batch, "context": w.context, "mesh": w.mesh, "hlo_dir": hlo, "progress": _say}
    table = show.markdown if w.remat is None else show.train_markdown
    try:
        if w.remat is None:
            found = plan(w.model, w.topology, phases=w.phases, **shape)
        else:
            found = planning.plan(w.model, w.topology, remat=w.remat, **shape)
    except PlanError as error:
        head, rule = table([]).splitlines()
        return f"{head}\n{rule}\n| {w.model} | {w.topology} | | {error} |" + " |" * (head.count("|") - 5)
    for note in show.notes(found):
        _say(note)
    text = table([found])
    if kept is not None:
        kept.write_text(text + "\n")
        kept.with_suffix(".json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
    return text


def _has_gpu_compiler() -> bool:
    # Looking for a module within a package that is not there either raises.
    packages = ("jax_plugins", "jax_plugins.xla_cuda12")
    return all(importlib.util.find_spec(name) is not None for name in packages)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""Compile the reference workloads for slices that are not here and print their table. Needs the `tpu` extra; hours.

    python scripts/pods.py [--only 8B] [--keep DIR] [--hlo DIR]

With --keep every result is written to DIR, and not computed again. A phase is one line, see `plan.show.markdown`.
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


@dataclass(frozen=True)
class Workload:
    model: str
    topology: str
    batch: int
    context: int
    phases: tuple[str, ...]
    mesh: str = "auto"

    @property
    def name(self) -> str:
        steps = "+".join(self.phases)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="workloads whose name contains this, as Qwen3-8B_v5e-2x2_decode_")
    parser.add_argument("--keep", type=Path, help="keep each result here, and do not compute those that are there")
    parser.add_argument("--hlo", type=Path, help="keep the compiled programs here as text")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for w in WORKLOADS:
        if arguments.only not in w.name:
            continue
        kept = arguments.keep / f"{w.name}.md" if arguments.keep else None
        if kept is None or not kept.exists():
            if w.topology.startswith("H100") and not importlib.util.find_spec("jax_plugins.xla_cuda12"):
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
    try:
        found = plan(
            w.model,
            w.topology,
            batch=w.batch,
            context=w.context,
            mesh=w.mesh,
            phases=w.phases,
            hlo_dir=hlo,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except PlanError as error:
        return f"{show.markdown([])}\n| {w.model} | {w.topology} | | {error} | | | | | | | |"
    text = show.markdown([found])
    if kept is not None:
        kept.write_text(text + "\n")
        kept.with_suffix(".json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
    return text


if __name__ == "__main__":
    main()

"""Compile the reference workloads for TPU slices that are not here and print their table. Needs the `tpu` extra; hours.

    python scripts/pods.py [--only 8B] [--hlo DIR]

The floor of a workload is an even split of its weights and cache (or FLOPs) over all chips at public peak rates.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from qwen3_jax.plan.compile import PlanError, plan


@dataclass(frozen=True)
class Workload:
    model: str
    phase: str
    batch: int
    context: int
    topology: str
    floor_ms: float


WORKLOADS = [
    Workload("Qwen3-8B", "decode", 32, 4096, "v5e:2x2", 10.52),
    Workload("Qwen3-8B", "decode", 32, 4096, "v6e:2x2", 5.25),
    Workload("Qwen3-8B", "prefill", 1, 4096, "v5e:2x2", 78.5),
    Workload("Qwen3-30B-A3B", "decode", 64, 4096, "v5e:4x4", 6.51),
    Workload("Qwen3-30B-A3B", "decode", 64, 4096, "v6e:2x4", 6.50),
    Workload("Qwen3-30B-A3B", "prefill", 1, 4096, "v5e:4x4", 9.19),
    Workload("Qwen3-235B-A22B", "decode", 128, 8192, "v5p:2x2x4", 15.2),
]
PREFILL_MESHES = {"v5e:2x2": "model=4", "v5e:4x4": "expert=4,model=4"}
"""A prefill of one row: `auto` ranks meshes by their decode step, which needs a row per split of the batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="workloads whose model, phase or topology contains this")
    parser.add_argument("--hlo", type=Path, help="keep the compiled programs here as text")
    arguments = parser.parse_args()
    console = Console()
    print("| workload | slice | mesh | hbm / mxu / ici ms | schedule ms | floor ms | ratio | copied |")
    print("|---|---|---|---|---|---|---|---|")
    for w in WORKLOADS:
        if arguments.only not in f"{w.model} {w.phase} {w.topology}":
            continue
        mesh = PREFILL_MESHES[w.topology] if w.phase == "prefill" else "auto"
        # The batch of a prefill's plan is that of the cache beside it: one row for each split of the mesh.
        batch = 4 if w.phase == "prefill" and "expert" in mesh else w.batch
        try:
            found = plan(
                w.model,
                w.topology,
                batch=batch,
                context=w.context,
                mesh=mesh,
                phases=(w.phase,),
                hlo_dir=arguments.hlo,
                progress=lambda line: console.log(line),
            )
        except PlanError as error:
            print(f"| {w.model} {w.phase} | {w.topology} | {error} | | | {w.floor_ms} | | |")
            continue
        if w.phase not in found.steps:
            print(f"| {w.model} {w.phase} | {w.topology} | {found.error} | | | {w.floor_ms} | | |")
            continue
        cost = found.steps[w.phase].cost
        pipes = " / ".join(f"{s * 1e3:.2f}" for s in (cost.hbm_s, cost.compute_s, cost.ici_s))
        used = ",".join(f"{axis}={size}" for axis, size in found.mesh.items() if size > 1)
        ratio = cost.schedule_s * 1e3 / w.floor_ms
        print(
            f"| {w.model} {w.phase}, {w.batch} × {w.context} | {w.topology} | {used} | {pipes} "
            f"| {cost.schedule_s * 1e3:.2f} | {w.floor_ms} | {ratio:.2f} | {cost.copied_bytes / 1e9:.2f} GB |",
            flush=True,
        )


if __name__ == "__main__":
    main()

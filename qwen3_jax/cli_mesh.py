"""The subcommands about meshes and machines: `shardings`, `plan`, `preflight`. See `cli` for the rest."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from qwen3_jax.cli_options import Json

Model = Annotated[str, arg(metavar="MODEL", help="a released name (see `qwen3-jax models`) or a model folder")]
Rules = Annotated[Literal["serve", "train"], arg(help="which table of `sharding.RULES`")]
CacheDtype = Annotated[Literal["float32", "bfloat16"], arg(help="of parameters and cache")]
CacheRows = Annotated[
    int | None, arg(metavar="N", help="rows of the cache", help_behavior_hint="(default: one per part)")
]
CacheSlots = Annotated[int, arg(metavar="N", help="cache slots per row")]
AXES = "axis sizes, as in data=1,expert=4,model=4"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)  # a pipe has no width to respect


@dataclasses.dataclass(frozen=True)
class Shardings:
    """Show where every parameter and cache array would lie on a mesh, of any size, and what does not divide.

    Exit code 1 if something does not divide.
    """

    model: Positional[Model]
    mesh: Annotated[str, arg(metavar="AXES", help=AXES)]
    rules: Rules = "serve"
    dtype: CacheDtype = "bfloat16"
    batch: CacheRows = None
    context: CacheSlots = 4096
    all: Annotated[bool, arg(help="one line per array, equal layers not merged", help_behavior_hint="")] = False
    json: Json = False

    def run(self) -> int:
        from qwen3_jax import shardings

        return shardings.run(
            self.model,
            self.mesh,
            rules=self.rules,
            dtype=self.dtype,
            batch=self.batch,
            context=self.context,
            every=self.all,
            as_json=self.json,
            console=_console(),
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a model's steps for a TPU slice or GPU node that need not exist, and say what they cost.

    Memory is the compiler's; times are a static model of the compiled program, never measured on hardware.
    """

    model: Positional[
        Annotated[
            str | None, arg(metavar="[MODEL]", help="as in `qwen3-jax models`, or a folder", help_behavior_hint="")
        ]
    ] = None
    topology: Annotated[
        str | None, arg(metavar="SLICE", help="v5e:4x4, v6e:2x4, v5p:2x2x4, h100:8, …", help_behavior_hint="")
    ] = None
    batch: Annotated[int, arg(metavar="N", help="rows of a decode or training step")] = 32
    context: Annotated[
        int, arg(metavar="N", help="cache slots per row, tokens of a prefill, positions of a training row")
    ] = 4096
    mesh: Annotated[str, arg(metavar="AXES|auto", help=f"{AXES}; or the best of all")] = "auto"
    phases: Annotated[
        tuple[Literal["prefill", "first", "decode", "train"], ...],
        arg(
            metavar="PHASE ...",
            help="compile these, and choose the mesh by them; train by itself",
            help_behavior_hint="(default: prefill first decode)",
        ),
    ] = ("prefill", "first", "decode")
    remat: Annotated[
        Literal["none", "dots", "full", "all"] | None,
        arg(metavar="none|dots|full|all", help="of train: what is kept", help_behavior_hint="(default: all, compared)"),
    ] = None
    dtype: CacheDtype = "bfloat16"
    report: Annotated[Path | None, arg(metavar="FILE", help="write an HTML page", help_behavior_hint="")] = None
    hlo: Annotated[
        Path | None, arg(metavar="DIR", help="keep each compiled program there as text", help_behavior_hint="")
    ] = None
    fleet: Annotated[
        bool,
        arg(help="instead: the smallest slice of every kind for every model, by arithmetic", help_behavior_hint=""),
    ] = False
    json: Json = False

    def run(self) -> int:
        from qwen3_jax.plan import compile as compiling
        from qwen3_jax.plan import fleet, show

        console = _console()
        if self.fleet:
            rows = fleet.table(None if self.model is None else [self.model])
            if self.json:
                print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
            else:
                console.print(fleet.show(rows))
            return 0
        if self.model is None or self.topology is None:
            missing = "MODEL" if self.model is None else "--topology"
            raise compiling.PlanError(f"{missing} is missing: qwen3-jax plan Qwen3-8B --topology v5e:2x2")
        shape: dict[str, Any] = {"batch": self.batch, "context": self.context, "mesh": self.mesh, "dtype": self.dtype}
        shape |= {"hlo_dir": self.hlo, "progress": lambda line: print(line, file=sys.stderr)}
        if "train" in self.phases:
            if len(self.phases) > 1:
                raise compiling.PlanError("--phases train has meshes of its own: plan it by itself")
            from qwen3_jax.train import planning

            found = planning.plan(self.model, self.topology, remat=self.remat or "all", **shape)
        elif self.remat is not None:
            raise compiling.PlanError(f"--remat {self.remat} is of training: add --phases train")
        else:
            found = compiling.plan(self.model, self.topology, phases=self.phases, **shape)
        if self.report is not None:
            self.report.write_text(show.page([found]))
        if self.json:
            print(json.dumps(found.to_json(), indent=1))
        else:
            console.print(show.table(found))
        return 0 if found.fits else 1


@dataclasses.dataclass(frozen=True)
class Preflight:
    """Check a machine or a cluster before using it: who is there, collectives per axis, code, memory.

    Run it on every process with the same arguments. On Slurm, GKE and Cloud TPU the processes find each other;
    elsewhere set QWEN3_COORDINATOR (host:port), QWEN3_NUM_PROCESSES and QWEN3_PROCESS_ID.
    """

    model: Positional[
        Annotated[str | None, arg(metavar="[MODEL]", help="check that it divides and fits", help_behavior_hint="")]
    ] = None
    mesh: Annotated[
        str | None, arg(metavar="AXES", help=AXES, help_behavior_hint="(default: all devices on model)")
    ] = None
    rules: Rules = "serve"
    dtype: CacheDtype = "bfloat16"
    batch: CacheRows = None
    context: CacheSlots = 4096
    memory_gib: Annotated[
        float | None, arg(metavar="GIB", help="of each device, where the platform does not tell", help_behavior_hint="")
    ] = None
    start_timeout_s: Annotated[float, arg(metavar="S", help="how long to wait for processes to appear")] = 300.0
    stage_timeout_s: Annotated[float, arg(metavar="S", help="how long any stage may take")] = 300.0
    json: Json = False

    def run(self) -> int:
        from qwen3_jax import distributed, preflight

        fields = {f.name for f in dataclasses.fields(preflight.Options)}
        options = {name: value for name, value in dataclasses.asdict(self).items() if name in fields}
        return preflight.run(preflight.Options(**options), distributed.detect(), as_json=self.json, console=_console())

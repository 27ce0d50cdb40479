"""The subcommands about model folders: `convert`, `parity`, `models`. See `cli` for the rest."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from qwen3_jax.cli_options import OK, Folder, Json


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a model folder between Hugging Face and Orbax, byte for byte."""

    source: Positional[Annotated[str, arg(metavar="IN", help="folder to read, or a hub id")]]
    destination: Positional[Annotated[Path, arg(metavar="OUT", help="folder to make; appears complete or not at all")]]
    to: Annotated[Literal["orbax", "hf"], arg(help="the form to write")]

    def run(self) -> int:
        from qwen3_jax import checkpoint

        checkpoint.convert(checkpoint.resolve(self.source), self.destination, self.to)
        print(f"wrote {self.destination}", file=sys.stderr)
        return OK


@dataclasses.dataclass(frozen=True)
class Parity:
    """Prove that a folder's numbers equal PyTorch's, layer by layer. Exit code 1 if they do not."""

    folder: Positional[Folder]
    report: Annotated[Path | None, arg(metavar="FILE", help="write an HTML page", help_behavior_hint="")] = None
    prompt: Annotated[
        str | None, arg(metavar="TEXT", help="run this text", help_behavior_hint="(default: random ids)")
    ] = None
    length: Annotated[int, arg(metavar="N", help="random tokens per row")] = 32
    seed: Annotated[int, arg(metavar="N", help="of the random tokens")] = 0
    dtype: Annotated[Literal["float32", "bfloat16"], arg(help="what both sides compute in")] = "float32"
    mesh: Annotated[
        str | None,
        arg(
            metavar="AXES",
            help="spread our side over devices, virtual ones on a CPU: as in data=1,model=2",
            help_behavior_hint="(default: one device)",
        ),
    ] = None
    json: Json = False

    def run(self) -> int:
        from qwen3_jax import checkpoint, parity

        return parity.main(
            checkpoint.resolve(self.folder),
            report=self.report,
            prompt=self.prompt,
            length=self.length,
            seed=self.seed,
            dtype=self.dtype,
            mesh=self.mesh,
            as_json=self.json,
        )


@dataclasses.dataclass(frozen=True)
class Models:
    """List the released models: parameters, active parameters, layers, context, cache."""

    json: Json = False

    def run(self) -> int:
        from qwen3_jax.config import Qwen3Config

        facts = []
        for name in Qwen3Config.names():
            c = Qwen3Config.from_name(name)
            facts.append(
                {
                    "name": name,
                    "parameters": c.num_parameters(),
                    "active_parameters": c.num_active_parameters(),
                    "layers": c.num_hidden_layers,
                    "hidden_size": c.hidden_size,
                    "experts": c.num_experts,
                    "experts_per_token": c.num_experts_per_tok if c.num_experts else 0,
                    "context": c.max_position_embeddings,
                    "bfloat16_cache_bytes_per_token": c.kv_bytes_per_token(2),
                }
            )
        facts.sort(key=lambda f: (f["experts"] > 0, f["parameters"]))
        if self.json:
            print(json.dumps(facts, indent=1))
            return OK
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("model", "parameters", "active", "layers", "hidden", "experts", "context", "cache B/token"):
            table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
        for f in facts:
            experts = f"{f['experts']} top {f['experts_per_token']}" if f["experts"] else "-"
            counts = (f[key] for key in ("parameters", "active_parameters", "layers", "hidden_size"))
            last = (f[key] for key in ("context", "bfloat16_cache_bytes_per_token"))
            table.add_row(f["name"], *(f"{n:,}" for n in counts), experts, *(f"{n:,}" for n in last))
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        return OK

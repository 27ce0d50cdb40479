"""What the subcommands share: options, each said once, and errors about them. See `cli` for the rest."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from qwen3_jax.engine.options import BUSY_TOKENS, CHUNK_TOKENS, EngineOptions

if TYPE_CHECKING:
    from qwen3_jax.loaded import LoadedModel

OK = 0  # exit code

Folder = Annotated[str, arg(metavar="DIR", help="model folder, Hugging Face or Orbax; or a hub id")]
Json = Annotated[bool, arg(help="print JSON for machines", help_behavior_hint="")]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    arg(
        metavar="{float32,bfloat16}",
        help="compute and keep weights in this dtype",
        help_behavior_hint="(default: the file's)",
    ),
]
Mesh = Annotated[
    str | None,
    arg(
        metavar="AXES",
        help="spread the model over all devices, as in data=1,expert=4,model=4",
        help_behavior_hint="(default: one device)",
    ),
]
CompileCache = Annotated[
    str | None,
    arg(
        metavar="DIR|off",
        help="where compiled programs are kept",
        help_behavior_hint="(default: $QWEN3_JAX_COMPILE_CACHE, else the user's cache folder)",
    ),
]
NoDeterministic = Annotated[
    bool, arg(help="let results depend on what runs beside them, where that is faster", help_behavior_hint="")
]


@dataclasses.dataclass(frozen=True)
class Served:
    """What `serve` and `batch` share: how to load a model, and the sizes of the engine that it runs in.

    A dataclass has the fields of its last base first, on the command line as in its constructor: what else a subcommand
    wants to begin with goes into a base behind this one.
    """

    served_model_name: Annotated[
        tuple[str, ...],
        arg(metavar="NAME [NAME ...]", help="what requests call it", help_behavior_hint="(default: the folder's name)"),
    ] = ()
    dtype: Dtype = None
    mesh: Mesh = None
    compile_cache: CompileCache = None
    rows: Annotated[int, arg(metavar="N", help="requests decoded together")] = EngineOptions.rows
    cache_tokens: Annotated[
        int | None,
        arg(metavar="N", help="tokens of KV cache", help_behavior_hint="(default: rows * min(context, 4096))"),
    ] = None
    page_tokens: Annotated[int, arg(metavar="N", help="tokens per page of it")] = EngineOptions.page_tokens
    chunk_tokens: Annotated[
        int | None,
        arg(
            metavar="N",
            help="prompt tokens per prefill call",
            help_behavior_hint=f"(default: {CHUNK_TOKENS['cpu']} on a CPU, else 512)",
        ),
    ] = None
    decode_tokens: Annotated[int, arg(metavar="N", help="most tokens per decode call when nobody waits")] = (
        EngineOptions.decode_tokens
    )
    busy_tokens: Annotated[
        int | None,
        arg(
            metavar="N",
            help="tokens per decode call beside a long prompt",
            help_behavior_hint=f"(default: {BUSY_TOKENS['cpu']} on a CPU, else 1)",
        ),
    ] = None

    def load(self, folder: str, *, progress: bool = False) -> "LoadedModel":
        """Load a model, of whatever kind, to serve it; "" is the one in the package."""
        from qwen3_jax.loaded import load_model

        return load_model(
            folder or Path(__file__).parent / "demo",
            dtype=self.dtype,
            mesh=self.mesh,
            backbone=None,
            cache=self.compile_cache,
            progress=progress,
        )

    def engine_options_with(self, **others: Any) -> EngineOptions:
        """Return these sizes and the other options; raises EngineOptionError."""
        return EngineOptions(
            rows=self.rows,
            cache_tokens=self.cache_tokens,
            page_tokens=self.page_tokens,
            chunk_tokens=self.chunk_tokens,
            decode_tokens=self.decode_tokens,
            busy_tokens=self.busy_tokens,
            **others,
        )


class UsageError(ValueError):
    """A command line that asks for something impossible."""


def is_ours(error: Exception) -> bool:
    """Tell errors about the input from errors of the program, which keep their traceback."""
    return isinstance(error, OSError) or type(error).__module__.startswith("qwen3_jax.")

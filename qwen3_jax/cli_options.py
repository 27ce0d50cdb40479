"""What the subcommands share: options, each said once, and errors about them. See `cli` for the rest."""

from typing import Annotated, Literal

from tyro.conf import arg

OK = 0  # exit code

Folder = Annotated[str, arg(metavar="DIR", help="model folder, Hugging Face or Orbax; or a hub id")]
Json = Annotated[bool, arg(help="print JSON for machines", help_behavior_hint="")]
ServedNames = Annotated[
    tuple[str, ...],
    arg(metavar="NAME [NAME ...]", help="what requests call it", help_behavior_hint="(default: the folder's name)"),
]
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
Rows = Annotated[int, arg(metavar="N", help="requests decoded together")]
CacheTokens = Annotated[
    int | None,
    arg(metavar="N", help="tokens of KV cache", help_behavior_hint="(default: rows * min(context, 4096))"),
]
PageTokens = Annotated[int, arg(metavar="N", help="tokens per page of it")]
ChunkTokens = Annotated[
    int | None,
    arg(metavar="N", help="prompt tokens per prefill call", help_behavior_hint="(default: 64 on a CPU, else 512)"),
]
DecodeTokens = Annotated[int, arg(metavar="N", help="tokens per decode call when nobody waits")]
NoDeterministic = Annotated[
    bool, arg(help="let results depend on what runs beside them, where that is faster", help_behavior_hint="")
]


class UsageError(ValueError):
    """A command line that asks for something impossible."""


def is_ours(error: Exception) -> bool:
    """Tell errors about the input from errors of the program, which keep their traceback."""
    return isinstance(error, OSError) or type(error).__module__.startswith("qwen3_jax.")

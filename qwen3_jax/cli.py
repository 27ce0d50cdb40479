"""The `qwen3-jax` command: one subcommand per job, thin over the library.

argv → a dataclass (tyro) → its `run()` → exit code: 0 done, 1 parity found a difference, 2 bad input with one line on
stderr, 130 interrupted. Results go to stdout, everything about them to stderr. JAX is imported when a command runs, so
that `--help` is quick.
"""

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Protocol

import tyro
from tyro.conf import FlagCreatePairsOff, subcommand

from qwen3_jax import cli_batch, cli_eval, cli_folder, cli_mesh, cli_serve, cli_text, cli_train
from qwen3_jax.cli_options import OK, UsageError, is_ours

BAD, INTERRUPTED = 2, 130


class Command(Protocol):
    """A parsed subcommand."""

    def run(self) -> int:
        """Do it and return the exit code."""
        ...


Commands = (
    Annotated[cli_text.Generate, subcommand("generate")]
    | Annotated[cli_text.Chat, subcommand("chat")]
    | Annotated[cli_serve.Serve, subcommand("serve")]
    | Annotated[cli_batch.Batch, subcommand("batch")]
    | Annotated[cli_train.Train, subcommand("train")]
    | Annotated[cli_train.Plot, subcommand("plot")]
    | Annotated[cli_eval.Merge, subcommand("merge")]
    | Annotated[cli_eval.Eval, subcommand("eval")]
    | Annotated[cli_folder.Convert, subcommand("convert")]
    | Annotated[cli_folder.Parity, subcommand("parity")]
    | Annotated[cli_folder.Models, subcommand("models")]
    | Annotated[cli_mesh.Shardings, subcommand("shardings")]
    | Annotated[cli_mesh.Plan, subcommand("plan")]
    | Annotated[cli_mesh.Preflight, subcommand("preflight")]
    | Annotated[cli_text.Demo, subcommand("demo")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: this process's) and return its exit code."""
    warnings.showwarning = _show_warning
    try:
        return _parse(list(sys.argv[1:] if argv is None else argv)).run()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head`: nobody reads on; keep the interpreter's last flush from failing too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (ValueError, OSError) as error:
        if not is_ours(error):
            raise
        first, *others = str(error).splitlines() or [type(error).__name__]  # a folder has all its problems at once
        print(f"qwen3-jax: error: {' '.join([first, '; '.join(map(str.strip, others))]).strip()}", file=sys.stderr)
        return BAD


def _parse(argv: list[str]) -> Command:
    """Read a command line; what tyro would say in a box becomes a `UsageError` of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Commands,  # pyright: ignore[reportArgumentType]
                prog="qwen3-jax",
                description="Qwen3 in JAX: Hugging Face checkpoints in, text out, numbers equal to PyTorch's.",
                args=cli_train.set_flags(argv) or ["--help"],
                config=(FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """Reduce tyro's boxed error, drawn in Unicode or ASCII, to its first paragraph and what it suggests."""
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines():
        line = line.strip("│").strip()
        if line and not line.strip("─-"):
            paragraphs.append([])
        elif line and not line.startswith(("╭", "╰")):
            paragraphs[-1].append(line)
    if "╭" not in box:  # the title is a paragraph of its own
        paragraphs = paragraphs[1:] or paragraphs
    text = " ".join(paragraphs[0]).removesuffix(".")
    if unreadable := re.match(r"Error parsing (\S+?):.* from \[(.*?)\]", text):
        text = f"{unreadable[1]} cannot be {unreadable[2]}"
    for more in paragraphs[1:]:
        if more[:1] == ["Perhaps you meant:"] and len(more) > 1:
            text += f"; did you mean {more[1].split()[0]}?"
    return f"{text}; see qwen3-jax --help"


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"qwen3-jax: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

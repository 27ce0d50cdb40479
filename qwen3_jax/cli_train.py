"""The subcommands about training: `train`, `plot`. See `cli` for the rest.

`qwen3-jax train FILE --section.key=value …` takes keys that no parser knows before the file is read, so `set_flags`
turns them into `--set section.key=value` first.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg


def set_flags(argv: Sequence[str]) -> list[str]:
    """Rewrite `--section.key=value` after the subcommand train as `--set section.key=value`."""
    if not argv or argv[0] != "train":
        return list(argv)
    found: list[str] = []
    for word in argv:
        match = re.fullmatch(r"--([A-Za-z_]\w*(?:\.\w+)+=.*)", word, re.DOTALL)
        found += ["--set", match[1]] if match else [word]
    return found


@dataclasses.dataclass(frozen=True)
class Train:
    """Train, or go on training, as a TOML file says; any of its keys can be given here as --section.key=value.

    Exit codes: 0 done, 2 bad input, 3 too many refused steps in a row, 143 stopped by SIGTERM or Ctrl-C after saving
    (the same command goes on), 124 a step or the data hung.
    """

    file: Positional[Annotated[Path, arg(metavar="FILE", help="a run, as those in configs/train")]]
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="SECTION.KEY=VALUE", help="change one key of the file", help_behavior_hint="(repeatable)"),
    ] = ()
    check: Annotated[
        bool, arg(help="read and check everything, print the resolved file, and stop", help_behavior_hint="")
    ] = False
    quiet: Annotated[bool, arg(help="no progress on stderr", help_behavior_hint="")] = False

    def run(self) -> int:
        from qwen3_jax import distributed
        from qwen3_jax.train import config as configs

        config = configs.load(self.file, self.set)
        with distributed.session(distributed.detect()):
            from qwen3_jax.train import build, loop, progress

            if self.check:
                build.Build(config)
                print(configs.to_toml(config), end="")
                return 0
            quiet = self.quiet or not distributed.is_main()
            shown: Any = progress.show(config, quiet=quiet)
            try:
                with shown as observe:
                    outcome = loop.train(config, observe=observe)
            except loop.RefusedError as error:
                print(f"qwen3-jax: error: {error}", file=sys.stderr)
                return loop.EXIT_REFUSED
            if not quiet:
                print(progress.ending(config, outcome), file=sys.stderr)
            return outcome.exit_code


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw a run's loss, learning rate, throughput and experts' load as a PNG or an HTML page."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]", help="folders of runs")]]
    out: Annotated[
        Path | None, arg(metavar="FILE", help=".png or .html", help_behavior_hint="(default: RUN/plot.png)")
    ] = None

    def run(self) -> int:
        from qwen3_jax.train import plot

        print(plot.write(self.runs, self.out))
        return 0

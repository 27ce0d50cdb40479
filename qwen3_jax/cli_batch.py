"""The subcommand `batch`: a file of requests to a file of answers. See `cli` for the rest."""

import asyncio
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from qwen3_jax import cli_options as flags
from qwen3_jax.engine.options import EngineOptions

if TYPE_CHECKING:
    from qwen3_jax.server.batch import Index, Results, Tally

SAY_S = 30.0  # between lines about the progress where there is no terminal for a bar


class BatchUsageError(ValueError):
    """A batch that cannot be started as asked."""


@dataclasses.dataclass(frozen=True)
class Files:
    """What is read, and what is written."""

    requests: Positional[Annotated[Path, arg(metavar="IN", help="JSON lines")]]
    answers: Positional[Annotated[Path, arg(metavar="OUT", help="JSON lines, appended to")]]
    model: Annotated[
        str, arg(metavar="DIR", help="model folder or hub id", help_behavior_hint="(default: the one in the package)")
    ] = ""


@dataclasses.dataclass(frozen=True)
class Batch(flags.Served, Files):
    """Answer a file of requests in OpenAI's batch format.

    Every line of IN is {"custom_id", "method": "POST", "url", "body"} with the url /v1/chat/completions,
    /v1/completions or /v1/embeddings; OUT gets one line for each, as they end. After an interruption of any kind the
    same command goes on where it was. Exit code 1 if a request was refused or failed: OUT says which.
    """

    no_deterministic: flags.NoDeterministic = False

    def run(self) -> int:
        try:
            from qwen3_jax.server.batch import Index, Results, missing, run
            from qwen3_jax.server.options import ServerOptions
        except ImportError as error:
            raise BatchUsageError(f"{error.name} is missing: pip install 'qwen3-jax[serve]'") from None
        engine_options = self.engine_options_with(
            # Every request at work has at most 128 choices, of which the rows take some.
            max_waiting=2 * self.rows * ServerOptions.max_choices,
            deterministic=not self.no_deterministic,
        )
        options = ServerOptions(names=self.served_model_name, max_requests=2 * self.rows + 1)
        index = Index(self.requests, options)
        results = Results(self.answers)
        try:
            with Show() as show:
                if missing(index, results)[1]:
                    tally = self._answer(index, results, options, engine_options, show)
                else:
                    tally = asyncio.run(run(None, index, results, together=1, progress=show.tally))
        finally:
            results.close()
        return 1 if tally.failed else 0

    def _answer(
        self, index: "Index", results: "Results", options: Any, engine_options: EngineOptions, show: "Show"
    ) -> "Tally":
        from qwen3_jax.server.app import create_app
        from qwen3_jax.server.batch import run
        from qwen3_jax.server.engines import engine_for

        engine = engine_for(self.load(self.model), engine_options)
        engine.start(show.note)
        try:
            return asyncio.run(
                run(
                    create_app(engine, options),
                    index,
                    results,
                    together=2 * self.rows,
                    failure=lambda: engine.failure,
                    progress=show.tally,
                )
            )
        finally:
            engine.stop()


class Show:
    """How far a batch is, on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
        columns = progress.BarColumn(), progress.MofNCompleteColumn(), *times, progress.TextColumn("{task.description}")
        self._bar = progress.Progress(*columns, console=console) if console.is_terminal else None
        self._task = None if self._bar is None else self._bar.add_task("", total=None)
        self._said = 0.0
        self._last = ""

    def __enter__(self) -> "Show":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last:
            print(self._last, file=sys.stderr)

    def note(self, line: str) -> None:
        """Say something that is no progress."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def tally(self, tally: "Tally") -> None:
        """Show a new tally."""
        parts = [f"{tally.earlier} by earlier runs"] if tally.earlier else []
        parts += [f"{tally.failed} with an error"] if tally.failed else []
        if self._bar is not None and self._task is not None:
            described = ", ".join(parts)
            self._bar.update(self._task, completed=tally.answered, total=tally.total, description=described)
            return
        self._last = ", ".join([f"{tally.answered} of {tally.total} requests are answered", *parts])
        if time.monotonic() - self._said > SAY_S and tally.answered < tally.total:
            print(self._last, file=sys.stderr, flush=True)
            self._said, self._last = time.monotonic(), ""

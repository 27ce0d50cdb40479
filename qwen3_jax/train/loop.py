"""The loop: batches to steps, stage after stage, with everything that must survive.

A run's folder:

    config.toml      the resolved configuration; another start with it goes on with the run
    metrics.jsonl    a line per step: loss, learning rate, norms, throughput, experts, a hash of the example ids
    events.jsonl     a line per start, refused step, evaluation, end
    goodput.jsonl    where the time went, see `goodput`
    checkpoints/     see `state`
    model/           the trained model as a Hugging Face folder, at the end

A step is a batch that was taken, whether its update was refused or not; checkpoints are named by it. What a checkpoint
holds decides everything that follows, so a resumed run repeats the uninterrupted one bit for bit. Metrics are read one
step late, so that the device never waits for Python.

Exit codes of `qwen3-jax train`: 0 done; 2 bad configuration, data or checkpoint; 3 too many refused steps in a row;
143 stopped by SIGTERM or Ctrl-C after saving (start it again to go on); 124 hung.
"""

import collections
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen3_jax import compile_cache, distributed
from qwen3_jax.train import config as configs
from qwen3_jax.train import signals, throughput, writers
from qwen3_jax.train.build import Build
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.data import Loader, merge
from qwen3_jax.train.goodput import Goodput
from qwen3_jax.train.goodput import summary as goodput_summary
from qwen3_jax.train.state import Checkpoints, gather
from qwen3_jax.train.step import ACCEPTED, NOT_FINITE, State
from qwen3_jax.train.watchdog import Watchdog

EXIT_DONE, EXIT_REFUSED = 0, 3
CONFIG, EVENTS, GOODPUT, CHECKPOINTS, MODEL = "config.toml", "events.jsonl", "goodput.jsonl", "checkpoints", "model"

log = logging.getLogger(__name__)
Observer = Callable[[int, dict[str, Any]], None]


class RefusedError(ValueError):
    """Too many steps in a row were refused; the message names their examples."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    exit_code: int
    metrics: dict[str, Any]
    """Of the last step."""


@dataclass
class Place:
    """Where the run is, beside the state: what a checkpoint's meta holds."""

    step: int = 0
    """Batches taken in the whole run."""
    stage: int = 0
    stage_step: int = 0
    data: dict[str, Any] | None = None
    """The loader's state in this stage; None at its start."""
    refused: int = 0
    refused_in_a_row: list[list[str]] = field(default_factory=list)
    """The example ids of each."""
    tokens: float = 0.0
    """Learned or not, without padding."""


def train(config: TrainConfig, *, observe: Observer = lambda step, metrics: None) -> Outcome:
    """Run, or go on with, a training run to its end or until it is asked to stop.

    Args:
        config: of `config.load`.
        observe: is called with every step's metrics, after they are written.

    Raises:
        RefusedError: `refusal.stop_after` steps in a row were refused; their state is saved.
        ValueError: a subclass that names what cannot be honoured.
    """
    config.check()
    folder = Path(config.run.folder)
    main = distributed.is_main()
    goodput = Goodput(folder / GOODPUT if main else None)
    try:
        with (
            signals.watch() as stop,
            Checkpoints(folder / CHECKPOINTS, keep=config.run.keep) as checkpoints,
            Watchdog(config.run.step_timeout_s, stacks=folder / "stacks.txt" if main else None) as watchdog,
        ):
            checkpoints.claim()
            return Loop(config, folder, goodput, checkpoints, watchdog, stop, observe).run()
    finally:
        goodput.close()


class Loop:
    """One process's part of a run."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        goodput: Goodput,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
        stop: signals.Stop,
        observe: Observer,
    ):
        self.config, self.folder, self.goodput, self.checkpoints = config, folder, goodput, checkpoints
        self.watchdog, self.stop, self.observe = watchdog, stop, observe
        compile_cache.enable(config.run.compile_cache or None)
        self.build = Build(config)
        self.place = Place()
        self.last: dict[str, Any] = {}
        self.pending: tuple[int, dict[str, jax.Array], list[str]] | None = None
        self.meter = throughput.Meter(self.build.model, chip=config.run.chip)
        self.main = distributed.is_main()
        self.writers: list[writers.Writer] = []
        self.evaluated: dict[int, list[Any]] = {}

    def run(self) -> Outcome:
        """See `train`."""
        with self.goodput("restore"):
            state, frozen = self._begin()
        try:
            for stage in range(self.place.stage, len(self.config.stages)):
                if stage != self.place.stage:
                    self.place.stage, self.place.stage_step, self.place.data = stage, 0, None
                state, ended = self._stage(state, frozen, stage)
                if not ended:
                    self._event("stopped", by=self.stop.by)
                    return Outcome(self.place.step, signals.EXIT_STOPPED, self.last)
            if self.config.eval is not None and self.place.step % self.config.eval.every:
                self._evaluate(state, frozen)
            self._save(state)
            self.checkpoints.wait()
            if self.config.run.export:
                with self.goodput("save"):
                    self.build.export(self.folder / MODEL, state, frozen, self.place.stage)
            self.goodput.record(self.place.step, now=True)
            self._event("done", goodput=goodput_summary(self.folder / GOODPUT) if self.main else None)
            return Outcome(self.place.step, EXIT_DONE, self.last)
        finally:
            self.goodput.record(self.place.step, now=True)
            for writer in self.writers:
                writer.close()

    # --- one stage ----------------------------------------------------------------------------------------------------

    def _stage(self, state: State, frozen: Any, index: int) -> tuple[State, bool]:
        """Run a stage; return the state, and False if the run was asked to stop."""
        stage, step = self.config.stages[index], self.build.step(index)
        data = stage.data or self.config.data
        assert data is not None  # checked with the configuration
        with self._loader(data, index) as loader:
            if self.place.data is not None:
                loader.restore(self.place.data)
            compiled = None
            while self.place.stage_step < stage.steps:
                with self.goodput("data"), self.watchdog("data"):
                    taken = next(loader, None)
                if taken is None:
                    log.warning(
                        "stage %s: the data ended after %d of %d steps", stage.name, self.place.stage_step, stage.steps
                    )
                    self.place.stage_step = stage.steps
                    break
                batch = step.put(taken.arrays, stage.accumulation)
                if compiled is None:
                    with self.goodput("compile"), self.watchdog("compile"):
                        compiled = step.compile(state, frozen, batch)
                with self.goodput("step"), self.watchdog("step"):
                    state, metrics = compiled(state, frozen, batch)
                    before, self.pending = self.pending, (self.place.step + 1, metrics, _flat(taken.ids))
                    self._read(before)
                self.place.step += 1
                self.place.stage_step += 1
                every = self.config.run.save_every
                due = self.place.step % every in (0, every // 2)
                look = self.config.eval is not None and self.place.step % self.config.eval.every == 0
                stopping = self.stop.agreed()
                if len(self.place.refused_in_a_row) >= self.config.refusal.stop_after or due or look or stopping:
                    self._drain()
                if look and not stopping:  # whoever asks to stop does not wait for it
                    self._evaluate(state, frozen)
                self.place.data = None
                if due or stopping or self._refused_too_often():
                    self.place.data = merge(gather(loader.state()))
                    self._save(state)
                if self._refused_too_often():
                    self.checkpoints.wait()
                    raise RefusedError(self._refusals())
                if stopping:
                    self.checkpoints.wait()
                    return state, False
                self.goodput.record(self.place.step)
            self._drain()
            if self._refused_too_often():
                raise RefusedError(self._refusals())
        return state, True

    def _loader(self, data: Any, index: int) -> Loader:
        processes = jax.process_count()
        anyone = (lambda more: any(gather(bool(more)))) if processes > 1 else None
        return self.build.loader(
            data, self.config.stages[index], process=jax.process_index(), processes=processes, anyone=anyone
        )

    # --- what comes back ----------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Wait for the step under way and read its metrics."""
        with self.goodput("step"), self.watchdog("step"):
            before, self.pending = self.pending, None
            self._read(before)

    def _read(self, pending: tuple[int, dict[str, jax.Array], list[str]] | None) -> None:
        """Fetch a step's metrics from the device, count a refusal, write a record."""
        if pending is None:
            return
        step, arrays, ids = pending
        values = {name: np.asarray(value).tolist() for name, value in jax.device_get(arrays).items()}
        values["refused"] = int(values["refused"])
        self.place.tokens += values["tokens"]
        if values["refused"] == ACCEPTED:
            self.place.refused_in_a_row.clear()
        else:
            self.place.refused += 1
            self.place.refused_in_a_row.append(ids)
            why = "the loss or a gradient is not finite" if values["refused"] == NOT_FINITE else "the loss is a spike"
            log.warning("step %d refused, %s (loss %g): %s", step, why, values["loss"], " ".join(ids))
            self._event("refused", at=step, why=why, loss=values["loss"], grad_norm=values["grad_norm"], examples=ids)
        stage = self.config.stages[self.place.stage]
        values |= self.meter.step(values["tokens"], stage.length)
        values |= {
            "stage": stage.name,
            "refused_total": self.place.refused,
            "tokens_total": self.place.tokens,
            "examples": hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16],
        }
        self.last = values
        if step % self.config.run.log_every == 0:
            for writer in self.writers:
                writer.write(step, values)
        self.observe(step, values)

    def _refused_too_often(self) -> bool:
        return len(self.place.refused_in_a_row) >= self.config.refusal.stop_after

    def _refusals(self) -> str:
        """Say which batches were refused, and start to count anew for whoever resumes."""
        lists = "; ".join(" ".join(ids) for ids in self.place.refused_in_a_row)
        return (
            f"{len(self.place.refused_in_a_row)} steps in a row were refused, up to step {self.place.step}: look at"
            f" these examples, or raise refusal.stop_after {self.config.refusal.stop_after}: {lists}"
        )

    def _evaluate(self, state: State, frozen: Any) -> None:
        """Write the loss on held-out data."""
        settings = self.config.eval
        if settings is None:
            return
        stage = self.config.stages[self.place.stage]
        step = self.build.step(self.place.stage)
        self.meter.pause()
        with self.goodput("evaluate"), self.watchdog("evaluate"):
            if self.place.stage not in self.evaluated:
                with self._loader(settings.data, self.place.stage) as loader:
                    taken = [batch.arrays for _, batch in zip(range(settings.batches), loader, strict=False)]
                self.evaluated[self.place.stage] = taken
            sums: collections.defaultdict[str, float] = collections.defaultdict(float)
            weight = 0.0
            for arrays in self.evaluated[self.place.stage]:
                metrics = jax.device_get(step.evaluate(state, frozen, step.put(arrays, stage.accumulation)))
                weight += float(metrics["weight"])
                for name in ("cross_entropy", "accuracy"):
                    sums[name] += float(metrics[name]) * float(metrics["weight"])
        values = {f"eval_{name}": value / max(weight, 1e-30) for name, value in sums.items()}
        self.last = self.last | values
        for writer in self.writers:
            writer.write(self.place.step, values)
        self._event("evaluated", **values)
        self.observe(self.place.step, values)

    # --- beginning and saving -----------------------------------------------------------------------------------------

    def _begin(self) -> tuple[State, Any]:
        """Return the state of the last good checkpoint, or a new one; open the writers."""
        step = self.build.step(0)
        latest = self.checkpoints.latest(step.abstract_state())
        if latest is None:
            state = self.build.start()
        else:
            state, meta = self.checkpoints.restore(latest, step.abstract_state())
            self.place = Place(**meta["place"])
            if self._refused_too_often():  # the run ended with these; they are counted anew
                self.place.refused_in_a_row = []
        frozen = self.build.frozen()
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG).write_text(configs.to_toml(self.config))
            self.writers = writers.open_all(
                self.folder, self.config.run.writers, configs.to_dict(self.config), resume_from=self.place.step
            )
        self.goodput.record(self.place.step, now=True)
        self._event("started", resumed=latest is not None, devices=jax.device_count(), platform=jax.default_backend())
        return state, frozen

    def _save(self, state: State) -> None:
        self.meter.pause()
        with self.goodput("save"), self.watchdog("save"):
            self.checkpoints.save(self.place.step, state, {"place": vars(self.place)})
            if self.config.run.save_every == 1:
                self.checkpoints.join()
        self.goodput.record(self.place.step, now=True)  # what a kill repeats is counted from here

    def _event(self, kind: str, **values: Any) -> None:
        if self.main:
            with (self.folder / EVENTS).open("a") as file:
                line = {"event": kind, "time": round(time.time(), 3), "step": self.place.step, **values}
                file.write(writers.as_json(line) + "\n")


def _flat(ids: tuple[tuple[str, ...], ...]) -> list[str]:
    return [id_ for row in ids for id_ in row]


def records(folder: Path | str) -> Iterator[dict[str, Any]]:
    """Read a run's metrics.jsonl."""
    with (Path(folder) / writers.METRICS).open() as file:
        for line in file:
            yield json.loads(line)

"""Training runs in processes of their own, with faults built in: what scripts/soak_train.py and its tests are made of.

A `Lab` is a folder with data and a tiny model; a `Run` starts `qwen3-jax train` there, as often as it takes, forked
from a server that has imported JAX and never started it, and reads what the run wrote.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STEPS, SAVE_EVERY = 40, 4
BETWEEN_SAVES = SAVE_EVERY // 2  # steps
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "rope_theta": 1e4}
CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True, "torch_dtype": "float32",
    "rope_scaling": None, "bos_token_id": None, "eos_token_id": 127, **SIZES, **HEADS,
}  # fmt: skip
TOML = """
[model]
config = "{folder}/model"
[run]
folder = "{folder}/run"
save_every = {save_every}
keep = 3
export = false
compile_cache = "{cache}"
step_timeout_s = 120
[data]
epochs = 1000
[[data.sources]]
name = "a"
path = "{data}"
[optimizer]
[schedule]
kind = "cosine"
peak = 1e-2
warmup = 5
[[stages]]
steps = {steps}
batch = 4
length = 64
"""
SAME = ("loss", "grad_norm", "examples", "tokens_total", "refused_total")  # of metrics.jsonl, in every resumed run


EXIT_HUNG, EXIT_STOPPED, EXIT_REFUSED, EXIT_BAD = 124, 143, 3, 2


_WORK = np.linspace(0, 1, 1 << 16)


class Broken(AssertionError):
    """What must hold does not."""


def require(holds: object, told: str) -> None:
    if not holds:
        raise Broken(told)


# --- runs in processes of their own -----------------------------------------------------------------------------------


def _child(argv: list[str], output: str, fault: str, devices: int, environment: dict[str, str]) -> None:
    """The forked process: `qwen3-jax train`, with a fault built in."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ.update(environment)
    from qwen3_jax import cli

    if fault:
        name, *arguments = fault.split()
        FAULTS[name](*map(float, arguments))
    sys.exit(cli.main(argv))


def _slow_steps(seconds: float) -> None:
    """Make every step last at least so long, as a larger model's would."""
    from qwen3_jax.train import loop

    real = loop.Loop._read

    def read(self: Any, pending: Any) -> None:
        time.sleep(seconds)
        real(self, pending)

    loop.Loop._read = read


def _busy_steps(seconds: float) -> None:
    """Make every step take so much processor time more, as a larger model's would."""
    from qwen3_jax.train import loop

    real = loop.Loop._read

    def read(self: Any, pending: Any) -> None:
        until = time.thread_time() + seconds
        while pending is not None and time.thread_time() < until:
            np.sin(_WORK)  # numpy lets other threads run
        real(self, pending)

    loop.Loop._read = read


def _hang_step(after: float, timeout_s: float) -> None:
    from qwen3_jax.train import loop

    real = loop.Loop._read

    def a_step_that_hangs(self: Any, pending: Any) -> None:
        self.watchdog.timeout_s = timeout_s  # from now on: compiling may take longer
        if self.place.step >= after:
            time.sleep(600)
        real(self, pending)

    loop.Loop._read = a_step_that_hangs


def _hang_loader(after: float, timeout_s: float) -> None:
    from qwen3_jax.train.data import stream

    _hang_step(float("inf"), timeout_s)
    real, rows = stream.Lane.row, iter(range(1 << 60))

    def a_loader_that_hangs(self: Any) -> Any:
        if next(rows) >= after:
            time.sleep(600)
        return real(self)

    stream.Lane.row = a_loader_that_hangs


def _poison(first: float, last: float) -> None:
    """Make the losses of some batches not a number."""
    from qwen3_jax.train.data import Loader

    real = Loader.__next__

    def poisoned(self: Any) -> Any:
        batch = real(self)
        if first <= self.batches <= last:
            batch.arrays["weights"] *= np.float32("nan")
        return batch

    Loader.__next__ = poisoned


def _garble(first: float, last: float) -> None:
    """Give some batches targets that contradict all others."""
    from qwen3_jax.train.data import Loader

    real = Loader.__next__

    def garbled(self: Any) -> Any:
        batch = real(self)
        if first <= self.batches <= last:
            batch.arrays["targets"][:] = (batch.arrays["targets"] + 50) % 126
        return batch

    Loader.__next__ = garbled


def _small_disk(first: float, last: float) -> None:
    """Let no file grow beyond 40 kB during some saves. Orbax spreads 310 kB over few files, differently every time."""
    from qwen3_jax.train.state import Checkpoints

    real, saves = Checkpoints.save, iter(range(1, 1 << 60))
    free = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self: Any, step: int, tree: Any, meta: Any) -> None:
        with contextlib.suppress(ValueError):
            self.join()
        full = first <= next(saves) <= last
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000 if full else free[0], free[1]))
        real(self, step, tree, meta)

    Checkpoints.save = save


FAULTS: dict[str, Callable[..., None]] = {
    "slow": _slow_steps,
    "busy": _busy_steps,
    "hang_step": _hang_step,
    "hang_loader": _hang_loader,
    "poison": _poison,
    "garble": _garble,
    "small_disk": _small_disk,
}


class Lab:
    """A folder with data, a model, and runs."""

    def __init__(self, folder: Path, scale: float = 1.0):
        self.folder, self.scale = folder, scale
        self.data = folder / "data.jsonl"
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
        draw = random.Random(0)
        lines = [json.dumps({"tokens": _sequence(draw)}) for _ in range(300)]
        self.data.write_text("\n".join(lines) + "\n")
        # The server forks processes that have JAX imported and nothing started: a run takes 2 s less.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["qwen3_jax.train.loop", "qwen3_jax.cli", "orbax.checkpoint", __name__])
        self._reference: dict[tuple[Any, ...], Run] = {}

    def trials(self, count: int) -> int:
        return max(1, math.ceil(count * self.scale))

    def run(self, name: str, *, steps: int = STEPS, save_every: int = SAVE_EVERY, more: str = "", **keys: Any) -> Run:
        """Prepare a run; `more` is TOML, `keys` are settings of [run]."""
        return Run(self, name, steps=steps, save_every=save_every, more=more, keys=keys)

    def reference(self, *, steps: int = STEPS, save_every: int = SAVE_EVERY) -> Run:
        """Return the run that nobody disturbed."""
        key = (steps, save_every)
        if key not in self._reference:
            run = self.run(f"straight-{steps}-{save_every}", steps=steps, save_every=save_every)
            require(run.start().wait() == 0, f"the undisturbed run failed: {run.log()}")
            self._reference[key] = run
        return self._reference[key]


def _sequence(draw: random.Random) -> list[int]:
    """Counting in steps: something to learn."""
    start, step, size = draw.randrange(100), draw.randrange(1, 5), draw.randint(3, 50)
    return [(start + i * step) % 126 for i in range(size)]


class Run:
    """One run's folder, and the process that works in it, if any."""

    def __init__(self, lab: Lab, name: str, *, steps: int, save_every: int, more: str, keys: dict[str, Any]):
        self.lab, self.home = lab, lab.folder / name
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        self.folder = self.home / "run"
        self.toml = self.home / "run.toml"
        os.symlink(lab.folder / "model", self.home / "model")
        text = TOML.format(
            folder=self.home, data=lab.data, cache=lab.folder / "cache", steps=steps, save_every=save_every
        )
        self.toml.write_text(text + more)
        self.overrides = [f"--run.{key}={json.dumps(value)}" for key, value in keys.items()]
        self.processes: list[Any] = []
        self.process: Any = None  # the first of them
        self._output = self.home / "output.txt"

    def start(self, *overrides: str, fault: str = "", devices: int = 1, processes: int = 1) -> Run:
        """Start the run's processes, each with so many devices."""
        argv = ["train", str(self.toml), "--quiet", *self.overrides, *overrides]
        several: dict[str, str] = {}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            several = {"QWEN3_COORDINATOR": f"127.0.0.1:{port}", "QWEN3_NUM_PROCESSES": str(processes)}
        self.processes = []
        for index in range(processes):
            environment = several | ({"QWEN3_PROCESS_ID": str(index)} if several else {})
            arguments = (argv, str(self._output), fault, devices, environment)
            self.processes.append(self.lab._context.Process(target=_child, args=arguments))
            self.processes[-1].start()
        self.process = self.processes[0]
        return self

    def wait(self, timeout_s: float = 300) -> int:
        """Return the exit code, of all processes the same; a negative one is the signal that ended them."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            for process in self.processes:
                process.kill()
                process.join()
            raise Broken(f"{self.home.name} did not end within {timeout_s:g} s: {self.log()}")
        require(len(set(codes)) == 1, f"{self.home.name}: exit codes {codes}: {self.log()}")
        return codes[0]

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def until(self, holds: Callable[[], bool], timeout_s: float = 120) -> bool:
        """Poll until something holds; False if the process ended before."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if holds():
                return True
            if self.process.exitcode is not None:
                return False
            time.sleep(0.002)
        raise Broken(f"{self.home.name}: nothing for {timeout_s:g} s: {self.log()}")

    def said(self) -> str:
        """Return all that was printed."""
        return self._output.read_text() if self._output.exists() else ""

    def log(self) -> str:
        return self.said()[-1500:]

    def _lines(self, name: str) -> list[dict[str, Any]]:
        found = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / name).read_text().splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def metrics(self) -> dict[int, dict[str, Any]]:
        return {line["step"]: line for line in self._lines("metrics.jsonl") if "loss" in line}

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self._lines("events.jsonl") if line["event"] == kind]

    def checkpoints(self) -> Any:
        from qwen3_jax.train.state import Checkpoints

        return Checkpoints(self.folder / "checkpoints", keep=3)

    def latest(self) -> int:
        return self.checkpoints().latest() or 0

    def state(self, step: int) -> dict[str, bytes]:
        """Return the bytes of every leaf of a checkpoint, and of its place in the data."""
        from qwen3_jax.train import build, config, leaves

        abstract = build.Build(config.load(self.toml)).step(0).abstract_state()
        tree, meta = self.checkpoints().restore(step, abstract)
        found = {name: np.asarray(leaf).tobytes() for name, leaf in leaves.flat(tree).items()}
        return found | {"place": json.dumps(meta, sort_keys=True).encode()}

    def require_equal(self, other: Run, steps: int, tolerance: float = 0, shared: range = range(0)) -> None:
        """Check that two runs made the same steps of the same examples and came to the same state.

        The steps in `shared` were made by several processes, each of which knows the examples of its own rows only.
        """
        mine, theirs = self.metrics(), other.metrics()
        require(sorted(mine) == list(range(1, steps + 1)), f"steps {sorted(mine)}, expected 1 to {steps}")
        for step in range(1, steps + 1):
            for key in SAME:
                if key == "examples" and step in shared:
                    continue
                a, b = mine[step][key], theirs[step][key]
                equal = a == b if not tolerance or isinstance(a, str) else math.isclose(a, b, rel_tol=tolerance)
                require(equal, f"step {step}: {key} is {a}, undisturbed {b}")
        if not tolerance:
            a, b = self.state(steps), other.state(steps)
            require(a == b, f"the states differ in {[name for name in b if a.get(name) != b[name]]}")

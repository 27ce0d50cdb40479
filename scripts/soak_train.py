"""Break training in every way of the fault table and check what must hold: T1 to T11, each with an exit code.

    python scripts/soak_train.py [--only T5] [--scale 0.1] [--folder DIR]

Runs `qwen3-jax train` on a tiny model, each time in a process of its own, forked from a server that has imported JAX
but never started it. A case prints one line and what it measured; the exit code is 0 when all hold, else 1.
`--scale` multiplies the numbers of trials: 50 kills, 20 signals, 200 flipped bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STEPS, SAVE_EVERY = 40, 4
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
    """Let no file grow beyond 20 kB during some saves; Orbax's arrays are larger, everything else is smaller."""
    from qwen3_jax.train.state import Checkpoints

    real, saves = Checkpoints.save, iter(range(1, 1 << 60))
    free = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self: Any, step: int, tree: Any, meta: Any) -> None:
        with contextlib.suppress(ValueError):
            self._join()
        full = first <= next(saves) <= last
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else free[0], free[1]))
        real(self, step, tree, meta)

    Checkpoints.save = save


FAULTS: dict[str, Callable[..., None]] = {
    "slow": _slow_steps,
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
        modules = ["scripts.soak_train"] if __name__ != "__main__" else []
        self._context.set_forkserver_preload(["qwen3_jax.train.loop", "qwen3_jax.cli", "orbax.checkpoint", *modules])
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


# --- T1 to T11 --------------------------------------------------------------------------------------------------------


def t1(lab: Lab) -> str:
    """SIGTERM at random steps: the current step is saved, exit 143 within 30 s; the run goes on bit-equal."""
    straight, run, draw = lab.reference(steps=200), lab.run("term", steps=200), random.Random(1)
    slowest, stops = 0.0, 0
    for i in range(lab.trials(20)):
        at = max(run.metrics(), default=0) + draw.randint(1, 8)
        run.start(fault="slow 0.01")
        if not run.until(lambda at=at: max(run.metrics(), default=0) >= at):
            break
        run.signal(signal.SIGTERM)
        asked = time.monotonic()
        code = run.wait(60)
        if code == 0:
            break
        slowest = max(slowest, time.monotonic() - asked)
        stops += 1
        require(code == 143, f"trial {i}: exit {code}, expected 143: {run.log()}")
        made, saved = max(run.metrics()), run.latest()
        require(saved == made, f"trial {i}: step {made} was made, {saved} saved")
    require(slowest < 30, f"{slowest:.1f} s from the signal to the end")
    if max(run.metrics()) < 200:
        require(run.start().wait() == 0, run.log())
    run.require_equal(straight, 200)
    return f"{stops} signals, slowest exit {slowest:.2f} s, no step lost, bit-equal at the end"


def t2(lab: Lab) -> str:
    """SIGKILL at random moments, half of them while files are being written: at most the save interval is lost."""
    straight, run, draw = lab.reference(steps=1000), lab.run("kill", steps=1000), random.Random(2)
    folder, kills, writing, lost = run.folder / "checkpoints", 0, 0, []
    for i in range(lab.trials(50)):
        run.start(fault="slow 0.005")
        before = max(run.metrics(), default=0)
        if i % 2:  # while a save is under way, at a random moment of it
            saves = draw.randint(0, 1)
            marks = {path.name for path in folder.glob("*.partial")}

            def saving(marks: set[str] = marks) -> bool:
                return any(path.name not in marks for path in folder.glob("*.partial"))

            for _ in range(saves):
                run.until(saving)
                run.until(lambda: not any(folder.glob("*.partial")))
            run.until(saving)
            time.sleep(draw.random() * 0.15)
        else:
            run.until(lambda before=before: max(run.metrics(), default=0) > before)
            time.sleep(draw.random() * 0.6)
        writing += any(folder.glob("*.partial"))
        run.signal(signal.SIGKILL)
        if run.wait() == 0:
            break
        kills += 1
        made, saved = max(run.metrics(), default=0), run.latest()
        lost.append(made - saved)
        # Saves are asynchronous: the one that the kill interrupts is the interval before it.
        require(lost[-1] <= 2 * SAVE_EVERY, f"kill {i}: step {made} was made, {saved} saved")
    require(run.start().wait() == 0, run.log())
    require(not list(folder.glob("*.partial*")), "partial folders are left")
    run.require_equal(straight, 1000)
    return f"{kills} kills, {writing} during a save, at most {max(lost)} steps lost, bit-equal at the end"


def t3(lab: Lab) -> str:
    """Killed and resumed five times: losses, parameters, optimiser, RNG, data state and examples are bit-equal."""
    straight, run, draw = lab.reference(), lab.run("resume"), random.Random(3)
    for at in sorted(draw.sample(range(3, STEPS - 2), 5)):
        run.start(fault="slow 0.02")
        run.until(lambda at=at: max(run.metrics(), default=0) >= at)
        run.signal(signal.SIGKILL)
        run.wait()
    require(run.start().wait() == 0, run.log())
    run.require_equal(straight, STEPS)
    return f"{len(run.events('started'))} starts, {STEPS} steps bit-equal"


def t4(lab: Lab) -> str:
    """1, 2, 4 devices, 2 processes, again 1 device: the same examples, the loss within 1e-6 after the first change."""
    straight, run = lab.reference(), lab.run("mesh")
    for processes, devices, at in ((1, 1, 8), (1, 2, 16), (1, 4, 24), (2, 2, 32), (1, 1, STEPS)):
        count = processes * devices
        mesh = [f"--run.mesh=fsdp={count}"] if count > 1 else []
        run.start(*mesh, devices=devices, processes=processes, fault="slow 0.05" if at < STEPS else "")
        if at < STEPS:
            run.until(lambda at=at: max(run.metrics(), default=0) >= at)
            os.kill(run.processes[-1].pid, signal.SIGTERM)  # one of them is asked, all stop
        require(run.wait() == (0 if at == STEPS else 143), run.log())
    mine, theirs = run.metrics(), straight.metrics()
    worst = max(abs(mine[s]["loss"] / theirs[s]["loss"] - 1) for s in theirs)
    starts = run.events("started")
    shared = range(starts[3]["step"] + 1, starts[4]["step"] + 1)
    run.require_equal(straight, STEPS, 1e-4, shared)  # rounding of other reductions grows over the steps
    counts = [event["devices"] for event in starts]
    require(counts == [1, 2, 4, 4, 1], f"devices {counts}")
    changed = starts[1]["step"] + 1
    first = abs(mine[changed]["loss"] / theirs[changed]["loss"] - 1)  # before it, both were one device
    require(first <= 1e-6, f"the first loss on another mesh is off by {first:.1e}")
    return f"devices {counts}, the same examples, first loss on a new mesh within {first:.1e}, all within {worst:.1e}"


def t5(lab: Lab) -> str:
    """Flipped bits, removed and cut files: all found and named, the step before is used, training goes on from it."""
    straight, draw = lab.reference(), random.Random(5)
    run = lab.run("damaged")
    shutil.copytree(straight.folder, run.folder)
    step = run.folder / "checkpoints" / f"step_{STEPS:08d}"
    paths = sorted(path for path in step.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in paths]
    flips = lab.trials(200)
    for i in range(flips):
        [path] = draw.choices(paths, sizes if i % 2 else [1 if size else 0 for size in sizes])
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        _require_found(run, path, step)
        path.write_bytes(good)
    for path in paths:
        good = path.read_bytes()
        for cut in (None, 0, len(good) // 2, len(good) - 1):
            if cut is None:
                path.unlink()
            elif good:
                path.write_bytes(good[:cut])
            else:
                continue
            _require_found(run, path, step)
            path.write_bytes(good)
    path = max(paths, key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    require(run.start().wait() == 0, run.log())
    require("checkpoint skipped" in run.said(), f"nothing said of the damage: {run.log()}")
    require(run.events("started")[-1]["step"] == STEPS - SAVE_EVERY, "did not begin at the step before")
    run.require_equal(straight, STEPS)
    return f"{flips} flips and {4 * len(paths)} removals and cuts found, resumed from the step before, bit-equal"


def _require_found(run: Run, path: Path, step: Path) -> None:
    checkpoints = run.checkpoints()
    latest = checkpoints.latest()
    require(latest == STEPS - SAVE_EVERY, f"damage of {path.name} was not found: step {latest} is used")
    name = str(path.relative_to(step))
    require(name in checkpoints.skipped[STEPS] or name == "SHA256SUMS", f"{name} is not named")


def t6(lab: Lab) -> str:
    """No room during two saves: training goes on, bit-equal. No room any more: it stops, the last save is good."""
    straight = lab.reference()
    run = lab.run("full")
    require(run.start(fault="small_disk 3 4").wait() == 0, run.log())
    require(run.said().count("was not saved") == 2, f"expected two failed saves: {run.log()}")
    run.require_equal(straight, STEPS)
    run = lab.run("full-for-ever")
    code = run.start(fault="small_disk 3 1000").wait()
    require(code == 2, f"exit {code}, expected 2: {run.log()}")
    require("saves in a row failed" in run.said(), run.log())
    require(run.latest() == 2 * SAVE_EVERY, f"latest is {run.latest()}")
    require(run.start().wait() == 0, run.log())
    run.require_equal(straight, STEPS)
    return "2 failed saves passed over, bit-equal; with 3 in a row exit 2 and the last good checkpoint used"


def t7(lab: Lab) -> str:
    """A save at every step, and an end right after one: nothing torn, the end waits."""
    straight, run = lab.reference(), lab.run("every-step", save_every=1)
    require(run.start().wait() == 0, run.log())
    checkpoints = run.checkpoints()
    require(checkpoints.steps() == [STEPS, STEPS - 1, STEPS - 2], f"steps {checkpoints.steps()}")
    require(not any(map(checkpoints.verify, checkpoints.steps())), "a torn step")
    run.require_equal(straight, STEPS)
    return f"{STEPS} saves in {STEPS} steps, the last three verify, bit-equal"


def t8(lab: Lab) -> str:
    """A loss that is no number, or a spike: the step is refused, the state stays as it was; k in a row end the run."""
    run = lab.run("poison", steps=12, save_every=1, keep=12)
    require(run.start(fault="poison 6 7").wait() == 0, run.log())
    refused = run.events("refused")
    require([event["at"] for event in refused] == [6, 7], f"refused {refused}")
    before, after = run.state(5), run.state(7)
    trained = [name for name in before if name.startswith(("params", "opt", "step", "rng"))]
    changed = [name for name in trained if before[name] != after[name]]
    require(not changed, f"refused steps changed {changed}")
    require(run.metrics()[12]["refused_total"] == 2, "the counter is wrong")
    run = lab.run("spike", more="[refusal]\nspike_sigma = 6.0\nwindow = 8\n")
    require(run.start(fault="garble 31 31").wait() == 0, run.log())
    spikes = [event["at"] for event in run.events("refused")]
    require(spikes == [31], f"refused {spikes}, the spike is at 31")
    run = lab.run("poisoned", more="[refusal]\nstop_after = 3\n")
    code = run.start(fault="poison 6 1000").wait()
    require(code == 3, f"exit {code}, expected 3: {run.log()}")
    ids = [id_ for event in run.events("refused") for id_ in event["examples"]]
    require(len(run.events("refused")) == 3, "expected three refusals")
    require(ids and all(id_ in run.said() for id_ in ids), "the message does not name the examples")
    return (
        f"2 steps and a spike refused, {len(trained)} leaves as before; 3 in a row: exit 3, {len(ids)} examples named"
    )


def t9(lab: Lab) -> str:
    """Bad records: skipped, counted, named, no other moves; or the run stops. A missing file stops it."""
    from qwen3_jax.train.data import DataConfig, Loader, Source

    bad = [b'{"tokens": [1, 2', b'{"tokens": [1, 2], "x": "\xff"}', b"", b'{"tokens": []}', b'{"tokens": [1, 128]}']
    good, draw = lab.data.read_bytes().splitlines(), random.Random(9)
    path = lab.folder / "faults.jsonl"

    def read(lines: list[bytes]) -> tuple[list[str], int]:
        path.write_bytes(b"\n".join(lines) + b"\n")
        config = DataConfig((Source("a", str(path)),), epochs=2)
        with Loader(config, None, None, batch=1, length=1 << 15, seed=0, vocab_size=128) as loader:
            return [id_ for batch in loader for row in batch.ids for id_ in row], loader.skipped.total()

    expected, none = read(good)
    require(none == 0, "good records were skipped")
    trials, faults = lab.trials(100), 0
    for _ in range(trials):
        places = draw.sample(range(len(good)), draw.randint(1, 20))
        lines = list(good)
        for place in places:
            lines[place] = draw.choice(bad)
        found, skipped = read(lines)
        gone = {f"a:{place}@{epoch}" for place in places for epoch in (0, 1)}
        require(found == [id_ for id_ in expected if id_ not in gone], "another record moved")
        require(skipped == len(gone), f"{skipped} counted, {len(gone)} bad")
        faults += len(places)
    lines = list(good)
    lines[17] = bad[0]
    path.write_bytes(b"\n".join(lines) + b"\n")
    source = f'--data.sources.0.path="{path}"'
    run = lab.run("bad-records")
    require(run.start(source).wait() == 0, run.log())
    require("skipped a:17@0: not JSON" in run.said(), run.log())
    run = lab.run("bad-stops")
    require(run.start(source, "--data.bad_records=stop").wait() == 2, run.log())
    require("a:17@0: not JSON" in run.said(), run.log())
    run = lab.run("no-file")
    require(run.start(f'--data.sources.0.path="{path}x"').wait() == 2, run.log())
    require("no file is named" in run.said(), run.log())
    return f"{faults} bad records in {trials} files: each skipped and counted, no other moved; stop and missing: exit 2"


def t10(lab: Lab) -> str:
    """A step and a loader that hang: stacks are written, the process ends within the timeout and 10 s, with 124."""
    lab.reference()  # programs are in the compile cache
    timeout_s, told = 20.0, []
    for name, after, function in (
        ("hang_step", 6, "a_step_that_hangs"),
        ("hang_loader", 40, "a_loader_that_hangs"),
    ):
        run = lab.run(name).start(fault=f"{name} {after} {timeout_s}")
        run.until(lambda run=run: bool(run.metrics()))
        made, quiet = 0, time.monotonic()
        while run.process.exitcode is None:
            if len(run.metrics()) != made:
                made, quiet = len(run.metrics()), time.monotonic()
            require(time.monotonic() - quiet < timeout_s + 10, f"{name}: still there")
            time.sleep(0.05)
        told.append(f"{name} {time.monotonic() - quiet:.1f} s")
        require(run.wait() == 124, f"{name}: exit {run.process.exitcode}: {run.log()}")
        require(f"in {function}" in (run.folder / "stacks.txt").read_text(), f"{name}: the stacks do not show it")
        require(run.start().wait() == 0, run.log())
        run.require_equal(lab.reference(), STEPS)
    return f"exit 124 after {' and '.join(told)} with a timeout of {timeout_s:g} s, stacks written, resumed bit-equal"


def t11(lab: Lab) -> str:
    """Ten kills in a run of 200 steps: the time adds up to the wall time within 1 %, goodput is at least 0.8."""
    from qwen3_jax.train import goodput

    kills, steps, step_s = lab.trials(10), 20 * lab.trials(10), 1.5
    run, draw = lab.run("goodput", steps=steps, save_every=2), random.Random(11)
    lab.reference()
    began = time.time()
    for i in range(kills):
        at = i * 20 + draw.randint(6, 18)
        run.start(fault=f"slow {step_s}")
        run.until(lambda at=at: max(run.metrics(), default=0) >= at)
        run.signal(signal.SIGKILL)
        run.wait()
    require(run.start(fault=f"slow {step_s}").wait() == 0, run.log())
    wall_s = time.time() - began
    found = goodput.summary(run.folder / "goodput.jsonl")
    total = sum(found["seconds"].values())
    told = ", ".join(f"{name} {100 * value / total:.1f} %" for name, value in found["seconds"].items() if value)
    require(abs(total / found["wall_s"] - 1) < 0.01, f"categories add up to {total:.1f} s, wall {found['wall_s']:.1f}")
    require(abs(total / wall_s - 1) < 0.01 + 1 / wall_s, f"accounted for {total:.1f} s, seen from outside {wall_s:.1f}")
    require(found["goodput"] >= 0.8, f"goodput {found['goodput']:.3f}: {told}")
    return f"goodput {found['goodput']:.3f} over {found['processes']} processes and {total:.0f} s ({told})"


CASES = {f"T{i}": case for i, case in enumerate((t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11), start=1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=CASES, help="a case; repeatable")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of trials")
    parser.add_argument("--folder", type=Path, help="keep everything here")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    logging.disable(logging.CRITICAL)  # of this process, which looks at what is damaged
    failed = []
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-train-")))
        lab = Lab(folder.absolute(), options.scale)
        for name in options.only or CASES:
            started = time.monotonic()
            try:
                told, good = CASES[name](lab), True
            except Broken as error:
                told, good = str(error), False
            except Exception:
                told, good = traceback.format_exc(), False
            failed += [] if good else [name]
            print(f"{name:4} {'holds' if good else 'FAILS'}  {told}  [{time.monotonic() - started:.0f} s]", flush=True)
    print(f"{len(failed)} of {len(options.only or CASES)} cases fail: {' '.join(failed)}" if failed else "all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

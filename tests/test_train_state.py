"""Training state on disk: exact, verified, survives what disks do; watchdog, goodput, signals."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen3_jax.sharding import make_mesh
from qwen3_jax.train import digests, goodput, signals
from qwen3_jax.train.goodput import Goodput, summary
from qwen3_jax.train.state import Checkpoints, StateError
from qwen3_jax.train.watchdog import EXIT_HUNG, Watchdog
from tests import state_job
from tests.test_distributed import finish, launch


def tree_of(seed: int) -> dict:
    params = {"layers": {0: {"q": jax.random.normal(jax.random.key(seed), (8, 16))}}, "norm": jnp.ones(8, jnp.bfloat16)}
    return {"params": params, "opt": optax.adamw(1e-3).init(params), "rng": jax.random.key(seed), "n": np.int32(seed)}


def abstract_of(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


def same(a, b) -> bool:
    def words(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    pairs = jax.tree.map(lambda x, y: words(x).tobytes() == words(y).tobytes() and x.dtype == y.dtype, a, b)
    return all(jax.tree.leaves(pairs))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder, keep=5) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree_of(step), {"data": {"step": step}})
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copied"))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_what_comes_back_is_what_was_saved(written):
    checkpoints = Checkpoints(written, keep=5)
    assert checkpoints.steps() == [2, 1]
    assert checkpoints.latest(abstract_of(tree_of(0))) == 2
    for step in (1, 2):
        tree, meta = checkpoints.restore(step, abstract_of(tree_of(0)))
        assert same(tree, tree_of(step))
        assert jax.tree.structure(tree) == jax.tree.structure(tree_of(0))
        assert meta == {"data": {"step": step}}


def test_the_sums_are_those_of_coreutils(written):
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=written / "step_00000002", check=False).returncode == 0


def test_nothing_at_all_is_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=1).latest() is None
    assert not (tmp_path / "none").exists()


def test_arrays_may_change_as_soon_as_save_returns(tmp_path):
    """A step that takes the saved state as its own (donation) while it is still being written."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = jnp.zeros((512, 512))
    with Checkpoints(tmp_path, keep=20) as checkpoints:
        for i in range(4):
            checkpoints.save(i, {"x": state}, {})
            for _ in range(10):
                state = step(state)
    checkpoints = Checkpoints(tmp_path, keep=20)
    for i in range(4):
        tree, _ = checkpoints.restore(i, {"x": state})
        assert np.unique(tree["x"]) == [10 * i]


def test_a_save_at_every_step_leaves_the_last_ones_whole(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, tree_of(step), {})
    again = Checkpoints(tmp_path, keep=2)
    assert again.steps() == [6, 5]
    assert [again.verify(step) for step in (6, 5)] == [[], []]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step_00000005", "step_00000006"]


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_any_number_of_devices_reads_it(tmp_path, devices):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state_job.arrays(make_mesh(fsdp=4, devices=jax.devices()[:4])), {})
    mesh = make_mesh(fsdp=devices, devices=jax.devices()[:devices])
    tree, _ = Checkpoints(tmp_path, keep=1).restore(3, state_job.abstract(mesh))
    for name, value in state_job.values().items():
        assert np.asarray(tree[name]).tobytes() == np.asarray(value).tobytes()
        assert tree[name].sharding == state_job.on(mesh)[name]


def test_two_processes_and_one_read_each_others(tmp_path):
    with Checkpoints(tmp_path / "one", keep=1) as checkpoints:
        checkpoints.save(3, state_job.arrays(make_mesh(fsdp=8)), {"from": "one"})
    pair = launch(["-m", "tests.state_job", str(tmp_path / "two"), str(tmp_path / "one")], 2, devices=2)
    _, logs = finish(pair, 300)
    assert [process.returncode for process in pair] == [0, 0], logs
    merged = {"format": "x", "recipe": {}, "batches": 4, "lanes": {"0": [0], "1": [1]}}
    for index in (0, 1):
        told = json.loads((tmp_path / f"two.{index}.json").read_text())
        assert told == {"processes": 2, "merged": merged}
    found = Checkpoints(tmp_path / "two", keep=1)
    mesh = make_mesh(fsdp=8)
    assert found.latest(state_job.abstract(mesh)) == 2  # the pair damaged step 3
    tree, meta = found.restore(2, state_job.abstract(mesh))
    assert meta == {"data": merged}
    for name, value in state_job.values().items():
        assert np.asarray(tree[name]).tobytes() == np.asarray(value).tobytes()


# --- what disks do to it ----------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(copied):
    """200 single bits in the newest step, drawn over its bytes, 60 of them over its files: each time step 1 is used."""
    step = copied / "step_00000002"
    draw = random.Random(0)
    paths = files(step)
    sizes = [path.stat().st_size for path in paths]
    for trial in range(200):
        [path] = draw.choices(paths, sizes if trial >= 60 else [1 if size else 0 for size in sizes])
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        checkpoints = Checkpoints(copied, keep=5)
        assert checkpoints.latest() == 1
        name = str(path.relative_to(step))
        assert name in checkpoints.skipped[2] or name == "SHA256SUMS"  # there, the file that it misnames
        path.write_bytes(good)
    assert Checkpoints(copied, keep=5).latest() == 2


@pytest.mark.parametrize("fault", ["removed", "half", "one byte less", "empty", "one byte more", "a folder"])
def test_every_lost_or_cut_file_is_found(copied, fault):
    step = copied / "step_00000002"
    for path in files(step):
        good = path.read_bytes()
        if fault in ("half", "one byte less", "empty") and not good:
            continue
        path.unlink()
        if fault == "a folder":
            path.mkdir()
        elif fault != "removed":
            cut = {"half": len(good) // 2, "one byte less": len(good) - 1, "empty": 0, "one byte more": len(good)}[
                fault
            ]
            path.write_bytes(good[:cut] + (b"\n" if fault == "one byte more" else b""))
        checkpoints = Checkpoints(copied, keep=5)
        assert checkpoints.latest() == 1
        assert str(path.relative_to(step)) in checkpoints.skipped[2]
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(good)
    (step / "state" / "more").write_text("")
    with pytest.raises(StateError, match="state/more: not listed in SHA256SUMS"):
        Checkpoints(copied, keep=5).restore(2, abstract_of(tree_of(0)))


def test_a_file_that_cannot_be_read_is_named(copied, monkeypatch):
    real = digests._digest

    def broken(path: Path) -> str:
        if path.name == "_METADATA" and "step_00000002" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(digests, "_digest", broken)
    checkpoints = Checkpoints(copied, keep=5)
    assert checkpoints.latest() == 1
    assert "state/_METADATA: Input/output error" in checkpoints.skipped[2]


def test_the_state_of_another_run_is_refused(written):
    tree = abstract_of(tree_of(0))
    q = {"layers": {0: {"q": jax.ShapeDtypeStruct((8, 17), jnp.float32)}}}
    checkpoints = Checkpoints(written, keep=5)
    with pytest.raises(StateError, match=r"params.layers.0.q is float32 \[8, 16\], this run has float32 \[8, 17\]"):
        checkpoints.restore(2, tree | {"params": tree["params"] | q})
    norm = {"norm": jax.ShapeDtypeStruct((8,), jnp.float32)}
    with pytest.raises(StateError, match=r"params.norm is bfloat16 \[8\], this run has float32 \[8\]"):
        checkpoints.restore(2, tree | {"params": tree["params"] | norm})
    with pytest.raises(StateError, match="more is missing"):
        checkpoints.restore(2, tree | {"more": jax.ShapeDtypeStruct((), jnp.int32)})
    with pytest.raises(StateError, match=r"no checkpoint can be used: .*rng is not of this run.*rng is not of"):
        checkpoints.latest({key: leaf for key, leaf in tree.items() if key != "rng"})
    assert checkpoints.skipped.keys() == {1, 2}


def test_a_step_is_not_taken_for_another(copied):
    (copied / "step_00000002").rename(copied / "step_00000009")
    checkpoints = Checkpoints(copied, keep=5)
    assert checkpoints.latest() == 1
    assert "step 2" in checkpoints.skipped[9]


def test_without_a_good_one_nothing_begins_anew(copied):
    for step in (1, 2):
        (copied / f"step_{step:08d}" / "step.json").unlink()
    with pytest.raises(StateError, match=r"no checkpoint can be used: .*step.json: missing.*step.json: missing"):
        Checkpoints(copied, keep=5).latest()


def test_what_was_not_finished_is_ignored_and_cleaned(copied, caplog):
    shutil.copytree(copied / "step_00000002", copied / "step_00000003.partial")
    shutil.copytree(copied / "step_00000002", copied / "step_00000001.old.partial")
    checkpoints = Checkpoints(copied, keep=5)
    assert checkpoints.latest() == 2
    with checkpoints:
        checkpoints.claim()
        assert not list(copied.glob("*.partial"))
        assert "step_00000003.partial, which was not finished" in caplog.text


def test_two_runs_do_not_share_a_folder(copied):
    with Checkpoints(copied, keep=5) as checkpoints:
        checkpoints.claim()
        with pytest.raises(StateError, match="another run writes here"):
            Checkpoints(copied, keep=5).save(3, tree_of(3), {})
        assert Checkpoints(copied, keep=5).latest() == 2  # reading needs no claim
    with Checkpoints(copied, keep=5) as checkpoints:
        checkpoints.claim()


def test_a_damaged_step_is_replaced_when_it_is_reached_again(copied):
    (copied / "step_00000002" / "step.json").write_text("{}")
    with Checkpoints(copied, keep=5) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, tree_of(2), {"data": {"step": 2}})
    checkpoints = Checkpoints(copied, keep=5)
    assert checkpoints.latest() == 2
    assert same(checkpoints.restore(2, abstract_of(tree_of(0)))[0], tree_of(2))


class FileSizeLimit:
    """Let no file of this process grow beyond some bytes, as a full disk would not."""

    def __init__(self, size: int):
        self.size, self.before = size, resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run(tmp_path, caplog):
    big = {"x": jax.random.normal(jax.random.key(0), (400, 400))}
    with Checkpoints(tmp_path, keep=2, max_failures=2) as checkpoints:
        checkpoints.save(1, big, {})
        checkpoints.wait()
        with FileSizeLimit(200_000):
            checkpoints.save(2, big, {})
            with pytest.raises(StateError, match=r"step_00000002 was not saved: .*File too large"):
                checkpoints.wait()
            checkpoints.save(3, big, {})  # training goes on
            with pytest.raises(StateError, match=r"2 saves in a row failed, the last: .*step_00000003 was not saved"):
                checkpoints.save(4, big, {})
        assert checkpoints.failures == 2
        assert "was not saved" in caplog.text
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step_00000001"]
        assert Checkpoints(tmp_path, keep=2).latest(big) == 1
    with Checkpoints(tmp_path, keep=2, max_failures=2) as checkpoints:  # there is room again
        with FileSizeLimit(200_000):
            checkpoints.save(2, big, {})
            with pytest.raises(StateError):
                checkpoints.wait()
        checkpoints.save(3, big, {})
        checkpoints.save(4, big, {})
    assert Checkpoints(tmp_path, keep=2).latest(big) == 4


# --- watchdog ---------------------------------------------------------------------------------------------------------

HANGS = """
import sys, threading, time, ctypes
from pathlib import Path
from qwen3_jax.train.watchdog import Watchdog
def a_step_that_hangs(): time.sleep(60)
def native_code_that_keeps_the_interpreter(): ctypes.PyDLL(None).sleep(60)
with Watchdog(1.0, stacks=Path(sys.argv[1])) as watchdog:
    with watchdog("step", 30): time.sleep(1.2)
    with watchdog("step"): globals()[sys.argv[2]]()
"""


@pytest.mark.parametrize(
    ("what", "code"), [("a_step_that_hangs", EXIT_HUNG), ("native_code_that_keeps_the_interpreter", 1)]
)
def test_a_hang_ends_with_its_stack(tmp_path, what, code):
    command = [sys.executable, "-c", HANGS, str(tmp_path / "stacks.txt"), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ, check=False)
    assert done.returncode == code, done.stderr
    told = (tmp_path / "stacks.txt").read_text()
    assert f"in {what}" in told
    assert code == 1 or "step has taken more than 1 s: stacks follow, exit 124" in told


def test_a_watchdog_lets_work_alone(tmp_path):
    left: list[int] = []
    with Watchdog(2.0, stacks=tmp_path / "stacks.txt", leave=left.append) as watchdog:
        for _ in range(6):
            with watchdog("data"):
                time.sleep(0.4)
    assert not left
    assert (tmp_path / "stacks.txt").read_text() == ""
    with Watchdog(0) as watchdog, watchdog("data"):
        pass


# --- goodput ----------------------------------------------------------------------------------------------------------


class Clock:
    """Stands in for `time` in goodput."""

    def __init__(self):
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


def test_time_is_accounted_for_over_restarts(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    path = tmp_path / "goodput.jsonl"

    def run(first: int, last: int, save_at: int) -> None:
        times = Goodput(path, began=clock.now - 4, every_s=0)  # 4 s of imports
        with times("restore"):
            clock.now += 2
        times.record(first, now=True)
        for step in range(first + 1, last + 1):
            with times("step"):
                clock.now += 1.5
                with times("data"):
                    clock.now += 0.5
            if step == save_at:
                with times("save"):
                    clock.now += 3
            clock.now += 0.25
            times.record(step)
        times.close()

    run(0, 10, save_at=6)
    clock.now += 9  # killed; down 5 s, and 4 s until the next one's first line
    with open(path, "a") as file:
        file.write('{"start": 10')  # torn by the kill
        file.write("\n")
    run(6, 12, save_at=12)
    found = summary(path)
    assert found["processes"] == 2
    assert found["seconds"] == pytest.approx(
        {"start": 8, "restore": 4, "compile": 0, "data": 8, "step": 18, "evaluate": 0, "save": 6, "other": 4}
        | {"down": 5, "repeated": 6}
    )
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"])
    assert found["goodput"] == pytest.approx(12 * 1.5 / found["wall_s"])
    with pytest.raises(ValueError, match="no category 'lunch'"), Goodput(None)("lunch"):
        pass


def test_a_process_knows_when_it_was_started():
    code = (
        "import time; from qwen3_jax.train.goodput import process_start; n = time.time(); print(n - process_start(n))"
    )
    before = time.time()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0 < float(out) <= time.time() - before + 0.05


# --- signals ----------------------------------------------------------------------------------------------------------


def test_sigterm_asks_and_a_second_interrupt_insists():
    before = signal.getsignal(signal.SIGTERM)
    with signals.watch() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.by == "SIGTERM"
        assert stop.agreed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before

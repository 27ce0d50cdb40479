"""A run that is killed, stopped and damaged ends as the undisturbed one: the short form of scripts/soak_train.py.

Every run is a process; they are forked from a server that has imported JAX once for all of them.
"""

import signal
import time

import pytest

from scripts import soak_train
from scripts.soak_train import SAVE_EVERY, STEPS, Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab") / "lab", scale=0.02)


def test_killed_while_saving_stopped_and_damaged_is_bit_equal(lab):
    """T1, T2, T3 and T5 in one run: losses, examples, parameters, moments, RNG and data state."""
    straight, run = lab.reference(), lab.run("disturbed")
    folder = run.folder / "checkpoints"

    run.start(fault="slow 0.02")
    run.until(lambda: (folder / f"step_{2 * SAVE_EVERY:08d}").exists())
    run.until(lambda: any(folder.glob("*.partial")))
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    made, saved = max(run.metrics()), run.latest()
    assert made - saved <= 2 * SAVE_EVERY

    run.start(fault="slow 0.05")
    run.until(lambda: max(run.metrics(), default=0) >= saved + SAVE_EVERY + 2)
    run.signal(signal.SIGTERM)
    assert run.wait() == 143
    assert run.latest() == max(run.metrics())  # no step is lost

    stopped = run.latest()
    [path] = [p for p in (folder / f"step_{stopped:08d}" / "state" / "d").iterdir() if p.stat().st_size > 1000][:1]
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 16
    path.write_bytes(damaged)
    assert run.start().wait() == 0
    assert "checkpoint skipped" in run.said()
    assert path.name in run.said()
    starts = [event["step"] for event in run.events("started")]
    assert starts == [0, saved, (stopped - 1) // SAVE_EVERY * SAVE_EVERY]  # the one before it
    assert not list(folder.glob("*.partial*"))
    run.require_equal(straight, STEPS)


def test_a_poisoned_batch_a_full_disk_and_a_hang(lab):
    """T6, T8 and T10: refused steps and failed saves are passed over, a hang ends with 124; then it goes on."""
    run = lab.run("hung", step_timeout_s=8)
    run.start(fault="hang_step 6")
    run.until(lambda: bool(run.metrics()))
    started = time.monotonic()
    assert run.wait(120) == soak_train.EXIT_HUNG
    assert time.monotonic() - started < 60  # it would sleep for 600 s
    assert "in a_step_that_hangs" in (run.folder / "stacks.txt").read_text()
    assert run.start(fault="small_disk 2 3").wait() == 0
    assert run.said().count("was not saved") == 2
    run.require_equal(lab.reference(), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", soak_train.CASES)
def test_the_fault_table(lab, name):
    soak_train.CASES[name](lab)

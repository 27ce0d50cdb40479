"""A run that is killed, hangs, is stopped, damaged and short of room ends as the undisturbed one.

The short form of scripts/soak_train.py, whose cases are the slow tests here. Every run is a process, forked from a
server that has imported JAX once for all of them.
"""

import signal

import pytest

from scripts import soak_train
from scripts.soak_lab import BETWEEN_SAVES, EXIT_HUNG, EXIT_STOPPED, SAVE_EVERY, STEPS, Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab") / "lab", scale=0.02)


def test_a_run_that_everything_happens_to_is_bit_equal(lab):
    """T1, T2, T3, T5, T6, T7 and T10: losses, examples, parameters, moments, RNG and data state as undisturbed."""
    straight, run = lab.reference(), lab.run("disturbed")
    folder = run.folder / "checkpoints"

    run.start(fault="slow 0.02")  # killed while it saves
    run.until(lambda: (folder / f"step_{2 * SAVE_EVERY:08d}").exists())
    run.until(lambda: any(folder.glob("*.partial")))
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    killed = run.latest()
    assert max(run.metrics()) - killed <= SAVE_EVERY

    run.start(fault=f"hang_step {killed + SAVE_EVERY + 1} 8")
    assert run.wait(240) == EXIT_HUNG, run.log()
    assert "in a_step_that_hangs" in (run.folder / "stacks.txt").read_text()
    hung = run.latest()
    assert hung >= killed

    run.start(fault="slow 0.05")  # stopped, at a step that is not lost
    run.until(lambda: max(run.metrics(), default=0) >= hung + SAVE_EVERY + 2)
    run.signal(signal.SIGTERM)
    assert run.wait() == EXIT_STOPPED
    stopped = run.latest()
    assert stopped == max(run.metrics())

    path = max((folder / f"step_{stopped:08d}").rglob("*/d/*"), key=lambda path: path.stat().st_size)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 16
    path.write_bytes(damaged)
    assert run.start(fault="small_disk 2 3").wait() == 0, run.log()
    assert "checkpoint skipped" in run.said()
    assert path.name in run.said()
    assert run.said().count("was not saved") == 2
    before = (stopped - 1) // BETWEEN_SAVES * BETWEEN_SAVES
    assert [event["step"] for event in run.events("started")] == [0, killed, hung, before]
    assert not list(folder.glob("*.partial*"))
    run.require_equal(straight, STEPS)
    assert straight.checkpoints().steps() == [STEPS, STEPS - BETWEEN_SAVES, STEPS - SAVE_EVERY]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in soak_train.CASES if name != "T11"])  # which takes minutes
def test_the_fault_table(lab, name):
    soak_train.CASES[name](lab)

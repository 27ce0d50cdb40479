"""Preflight: what it finds, and that no dead, stopped or missing process makes it hang.

The supervisors of both processes run as threads of the test; their workers are real processes, killed and stopped here.
"""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
from rich.console import Console

from qwen3_jax import distributed, preflight
from qwen3_jax.distributed import Cluster
from qwen3_jax.preflight import FAILED, PASSED, PEER_LOST, STAGES, Options
from qwen3_jax.sharding import ShardingError, make_mesh
from tests.ports import free_port

LONG = 10_000_000  # rounds: the collectives outlive any test
BOUND_S = 600  # far beyond every time-out below: reaching it is a hang


@pytest.fixture(autouse=True)
def two_devices_per_worker(monkeypatch):
    assert jax.device_count() == 8  # of this process: fixed from now on
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")


class Group:
    """Supervisors on threads, each with its exit code."""

    def __init__(self, monkeypatch, options: Options, *, processes: int = 2, present: int = 2):
        self.supervisors: dict[int, preflight.Supervisor] = {}
        self.codes: dict[int, int] = {}
        self.out = io.StringIO()
        group = self

        class Seen(preflight.Supervisor):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                group.supervisors[self.index] = self

        monkeypatch.setattr(preflight, "Supervisor", Seen)
        coordinator = f"127.0.0.1:{free_port()}"

        def run(index: int) -> None:
            cluster = Cluster(coordinator, processes, index) if processes > 1 else None
            console = Console(file=self.out, width=200)
            self.codes[index] = preflight.run(options, cluster, console=console)

        self.threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(present)]
        for thread in self.threads:
            thread.start()

    def wait(self) -> dict[int, int]:
        deadline = time.monotonic() + BOUND_S
        for thread in self.threads:
            thread.join(deadline - time.monotonic())
            assert not thread.is_alive(), "preflight hangs"
        assert all(supervisor.worker.poll() is not None for supervisor in self.supervisors.values())
        return self.codes

    def reach(self, stage: str) -> None:
        """Wait until every worker is in a stage."""
        deadline = time.monotonic() + BOUND_S
        while time.monotonic() < deadline:
            if len(self.supervisors) == len(self.threads) and all(
                STAGES[supervisor.peers[index].stage] == stage for index, supervisor in self.supervisors.items()
            ):
                time.sleep(0.5)  # into the stage
                return
            time.sleep(0.05)
        raise AssertionError(f"{stage} was not reached")


def told(capsys) -> list[str]:
    """Return the lines on stderr but those that say what is awaited."""
    return [line for line in capsys.readouterr().err.splitlines() if "waiting" not in line]


def test_two_processes_pass(monkeypatch):
    options = Options(mesh="data=2,model=2", model="Qwen3-0.6B", dtype="bfloat16", context=64, mib=0.01, rounds=2)
    group = Group(monkeypatch, options)
    assert group.wait() == {0: PASSED, 1: PASSED}
    shown = group.out.getvalue()
    assert "preflight passed" in shown
    assert shown.count("yes") == 3 * len(preflight.KINDS)  # data, model, all together


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_named_by_all(victim, monkeypatch, capsys):
    group = Group(monkeypatch, Options(mib=0.001, rounds=LONG))
    group.reach("running collectives")
    group.supervisors[victim].worker.kill()
    assert group.wait() == {0: PEER_LOST, 1: PEER_LOST}
    lines = told(capsys)
    assert len(lines) == 2
    for line in lines:
        assert f"process {victim} (" in line.partition(":")[2]
        assert "died while running collectives: its worker was ended by SIGKILL" in line


def test_a_stopped_worker_is_named_by_all(monkeypatch, capsys):
    group = Group(monkeypatch, Options(mib=0.001, rounds=LONG, patience_s=10))
    group.reach("running collectives")
    os.kill(group.supervisors[1].worker.pid, signal.SIGSTOP)
    assert group.wait() == {0: PEER_LOST, 1: PEER_LOST}
    lines = told(capsys)
    assert len(lines) == 2
    for line in lines:
        assert "process 1 (" in line.partition(":")[2]
        assert "while running collectives: it is stopped" in line


def test_a_stage_that_does_not_end_is_told(monkeypatch, capsys):
    group = Group(monkeypatch, Options(mib=0.001, rounds=LONG, stage_timeout_s=8), processes=1, present=1)
    assert group.wait() == {0: PEER_LOST}
    assert "did not finish" in told(capsys)[0]


def test_a_process_that_never_starts_is_named(monkeypatch, capsys):
    group = Group(monkeypatch, Options(start_timeout_s=1), processes=3)
    assert group.wait() == {0: PEER_LOST, 1: PEER_LOST}
    lines = told(capsys)
    assert len(lines) == 2
    for line in lines:
        assert "process 2 of 3 did not report" in line
    assert not group.supervisors


SUPERVISE = """
import sys
from qwen3_jax import distributed, preflight
distributed.code_digest = lambda: sys.argv[1]  # as the test's: sources may change while it runs
sys.exit(preflight.run(preflight.Options(mib=0.001, rounds=10_000_000), distributed.detect()))
"""


def test_the_first_process_as_a_whole_killed(monkeypatch, capsys):
    """Process 0, supervisor and worker and sockets, dies; process 1 says so. Its worker ends by itself."""
    port = free_port()
    environment = os.environ | {
        "QWEN3_COORDINATOR": f"127.0.0.1:{port}",
        "QWEN3_NUM_PROCESSES": "2",
        "QWEN3_PROCESS_ID": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", SUPERVISE, distributed.code_digest()]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    codes = []
    options = Options(mib=0.001, rounds=LONG)
    second = threading.Thread(
        target=lambda: codes.append(preflight.run(options, Cluster(f"127.0.0.1:{port}", 2, 1))), daemon=True
    )
    second.start()
    supervisors = _supervisors(monkeypatch)
    deadline = time.monotonic() + BOUND_S
    while not (supervisors and STAGES[supervisors[0].peers[1].stage] == "running collectives"):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    second.join(BOUND_S)
    assert codes == [PEER_LOST]
    assert "process 0 (" in told(capsys)[0]


def _supervisors(monkeypatch) -> list[preflight.Supervisor]:
    made: list[preflight.Supervisor] = []
    original = preflight.Supervisor.__init__

    def remember(self, *arguments):
        original(self, *arguments)
        made.append(self)

    monkeypatch.setattr(preflight.Supervisor, "__init__", remember)
    return made


def test_too_little_memory(monkeypatch):
    options = Options(mesh="model=2", model="Qwen3-8B", memory_gib=7, mib=0.001, rounds=1, batch=1)
    group = Group(monkeypatch, options, processes=1, present=1)
    assert group.wait() == {0: FAILED}
    # 8,190,735,360 parameters and 4096 cached positions of 147,456 bytes, in halves
    needed = (2 * 8_190_735_360 + 4096 * 147_456) / 2
    assert f"has 7.00 GiB, parameters and cache need {needed / 2**30:.2f}" in group.out.getvalue()


def test_json_of_processes_that_differ(monkeypatch, capsys):
    other = {"code": "0" * 16}
    facts = preflight.distributed.facts
    seen = iter([{}, other])  # one for each process
    monkeypatch.setattr(preflight.distributed, "facts", lambda: facts() | next(seen))
    codes = {}
    port = free_port()
    threads = []
    for index in (0, 1):
        cluster = Cluster(f"127.0.0.1:{port}", 2, index)
        thread = threading.Thread(
            target=lambda i=index, c=cluster: codes.update({i: preflight.run(Options(), c, as_json=True)})
        )
        thread.start()
        threads.append(thread)
        time.sleep(0.2)
    for thread in threads:
        thread.join(BOUND_S)
    assert codes == {0: FAILED, 1: FAILED}
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["passed"] is False
    assert "code differs" in report["problems"][0]
    assert "0" * 16 in report["problems"][0]
    assert captured.err.count("code differs") == 2


@pytest.mark.parametrize(
    "axes", [{"model": 8}, {"data": 2, "fsdp": 2, "expert": 2}, {"expert": 4, "model": 2}], ids=str
)
def test_collectives_are_right_on_every_axis(axes):
    rows = preflight.collectives(make_mesh(**axes), mib=0.001, rounds=1)
    assert len(rows) == len(preflight.KINDS) * (len(axes) + (len(axes) > 1))
    assert not any(row["wrong"] for row in rows)


@pytest.mark.parametrize("kind", ["psum", "ppermute"])
def test_a_wrong_collective_is_noticed(kind, monkeypatch):
    monkeypatch.setattr(jax.lax, kind, lambda x, *_: x)
    rows = preflight.collectives(make_mesh(data=2, model=4), mib=0.001, rounds=1)
    assert {row["kind"] for row in rows if row["wrong"]} == {kind}


def test_arguments_are_checked_before_anything_starts():
    for options in (Options(mesh="modl=2"), Options(rules="both")):
        with pytest.raises(ShardingError):
            preflight.run(options, None)
    with pytest.raises(ValueError, match=r"Qwen3-0\.6B"):
        preflight.run(Options(model="Qwen9"), None)

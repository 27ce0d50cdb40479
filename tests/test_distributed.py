"""Several processes: who they are, the roll call, and a run in two processes that equals one."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from qwen3_jax import checkpoint, distributed, placement
from qwen3_jax.distributed import Cluster, ClusterError, detect, roll_call
from qwen3_jax.ops.plain import XLA
from qwen3_jax.sharding import RULES, make_mesh
from tests import tiny
from tests.cluster_job import STEPS, sampled
from tests.ports import free_port
from tests.run import Network

CASES = [("dense", "data=2,model=4"), ("moe", "expert=4,model=2"), ("orbax", "data=2,model=4")]


def launch(command: list[str], processes: int, *, devices: int) -> list[subprocess.Popen]:
    """Start the processes of one program on this machine."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "QWEN3_COORDINATOR": f"127.0.0.1:{free_port()}",
        "QWEN3_NUM_PROCESSES": str(processes),
        "PYTHONPATH": os.pathsep.join(["", *sys.path]),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment | {"QWEN3_PROCESS_ID": str(index)},
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(processes: list[subprocess.Popen], timeout_s: float) -> tuple[list[str], list[str]]:
    """Wait for all, and return what they printed on stdout and stderr."""
    try:
        printed = [process.communicate(timeout=timeout_s) for process in processes]
        return [out for out, _ in printed], [err for _, err in printed]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Run every case in one pair of processes with four devices each."""
    home = tmp_path_factory.mktemp("cluster")
    tokens = np.random.default_rng(0).integers(0, 94, (4, 6)).astype(np.int32)
    layers = {"dense": 2, "moe": 1}
    folders = {kind: tiny.save(home / kind, moe=kind == "moe", num_hidden_layers=n)[0] for kind, n in layers.items()}
    folders["orbax"] = home / "orbax"  # written by one process
    checkpoint.convert(folders["moe"], folders["orbax"], "orbax", progress=False)
    cases = [
        {"folder": str(folders[kind]), "mesh": mesh, "out": str(home / f"{kind}-{mesh}"), "sampled": kind == "moe"}
        for kind, mesh in CASES
    ]
    order = home / "order.json"
    order.write_text(json.dumps({"tokens": tokens.tolist(), "cases": cases}))
    pair = launch(["-m", "tests.cluster_job", str(order)], 2, devices=4)
    results, logs = finish(pair, 600)
    assert [process.returncode for process in pair] == [0, 0], "\n".join(logs)
    assert results == ["results of 3 cases\n", ""]  # of the first process only, and nothing of gloo's
    return tokens, folders, {key: case["out"] for key, case in zip(CASES, cases, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_and_decode_equal_one_process(case, two_processes):
    tokens, folders, outs = two_processes
    logits = np.load(f"{outs[case]}.npy")
    chosen = logits[:, tokens.shape[1] - 1 : -1].argmax(-1).astype(np.int32)
    whole = np.concatenate([tokens, chosen], axis=1)
    alone = Network(folders[case[0]], formulation="xla")
    pieces = [tokens.shape[1]] + [1] * STEPS
    expected = alone.logits_in_pieces(whole, pieces, capacity=whole.shape[1])
    chex.assert_trees_all_close(logits, expected, atol=1e-5, rtol=0)
    chex.assert_trees_all_equal(chosen, expected[:, tokens.shape[1] - 1 : -1].argmax(-1).astype(np.int32))


def test_sampling_equals_one_process(two_processes):
    _, folders, outs = two_processes
    case = CASES[1]
    config, params = checkpoint.load(folders[case[0]], progress=False)
    chex.assert_trees_all_equal(np.load(f"{outs[case]}.tokens.npy"), sampled(config, params, XLA))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sizes", [{"data": 8}, {"expert": 2, "model": 4}], ids=str)
def test_what_two_processes_wrote_loads_onto_another_mesh(case, sizes, two_processes):
    """Orbax, written from (data, model) or (expert, model) over two processes, read by one."""
    _, folders, outs = two_processes
    config, expected = checkpoint.load(folders[case[0]], progress=False)
    again, params = checkpoint.load(f"{outs[case]}.orbax", progress=False)
    assert again == config
    chex.assert_trees_all_equal(params, expected)
    mesh = make_mesh(data=sizes.get("data", 1), expert=sizes.get("expert", 1), model=sizes.get("model", 1))
    _, params = placement.load_sharded(f"{outs[case]}.orbax", mesh, RULES["serve"], ops=XLA, progress=False)
    chex.assert_trees_all_equal(jax.device_get(placement.without_repeats(params, config)), jax.device_get(expected))


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_each_process_reads_what_its_devices_need(case, two_processes):
    _, folders, outs = two_processes
    whole = checkpoint.inspect(folders[case[0]]).nbytes
    told = [json.loads(Path(f"{outs[case]}.process{i}.json").read_text()) for i in (0, 1)]
    for one in told:
        assert one["devices"] == 8
        assert one["local"] == 4
        assert one["read"] == one["needed"]
    if case == ("moe", "expert=4,model=2"):  # half of the experts, which are most of the bytes
        assert all(one["read"] < 0.8 * whole for one in told)


def test_results_are_written_once_and_failures_are_everybodys(two_processes):
    *_, outs = two_processes
    for out in outs.values():
        assert Path(f"{out}.log").read_text() == "written by process 0\n"
    told = [Path(f"{outs[CASES[0]]}.failure{i}").read_text() for i in (0, 1)]
    assert told[0].startswith("FileNotFoundError")
    assert told[1].startswith("ClusterError: process 0 failed: FileNotFoundError")


def test_one_process_needs_nothing():
    assert detect(environment={}) is None
    assert detect("host:1", 1, 0, environment={}) is None
    assert distributed.is_main()
    assert distributed.share({"a": [1]}) == {"a": [1]}
    assert distributed.once(lambda: 7) == 7
    with distributed.session(None):
        pass


def test_flags_win_over_variables():
    variables = {"QWEN3_COORDINATOR": "host:1", "QWEN3_NUM_PROCESSES": "4", "QWEN3_PROCESS_ID": "3"}
    assert detect(environment=variables) == Cluster("host:1", 4, 3)
    assert detect("other:2", None, 1, environment=variables) == Cluster("other:2", 4, 1)
    cluster = detect("[::1]:8476", 2, 0, environment={})
    assert cluster is not None
    assert (cluster.host, cluster.port, cluster.is_local) == ("::1", 8476, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "--coordinator given without --num-processes or QWEN3_NUM_PROCESSES and"),
        (("host", 2, 0), "coordinator 'host': give host and port"),
        (("host:x", 2, 0), "coordinator 'host:x'"),
        ((":1", 2, 0), "coordinator ':1'"),
        (("host:1", 2, 2), "process id 2 of 2 processes"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ClusterError) as caught:
        detect(*arguments, environment={})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ClusterError, match="--num-processes is 'two'"):
        detect("host:1", None, 0, environment={"QWEN3_NUM_PROCESSES": "two"})


SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "gpu[003-006],login1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "4",
}


@pytest.mark.parametrize(
    ("more", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "CUDA_VISIBLE_DEVICES": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
    ],
)
def test_slurm(more, devices, monkeypatch):
    for key in [*SLURM, "SLURM_STEP_TASKS_PER_NODE", "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(key, raising=False)
    for key, value in (SLURM | more).items():
        monkeypatch.setenv(key, value)
    cluster = detect()
    assert cluster is not None
    assert cluster[1:] == (8, 5, devices)
    assert cluster.host == "gpu003"
    assert 61440 <= cluster.port <= 65535
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert detect() is None


def test_gke_tpu_slice(monkeypatch):
    """What GKE's webhook sets in every pod of a TPU slice; JAX also wants to see the chips."""
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", os.environ.get)
    monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *_: None)
    monkeypatch.setattr(cloud_tpu_cluster.GceTpuCluster, "is_env_present", lambda: False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "job-0-0.job,job-0-1.job")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    cluster = detect()
    assert cluster is not None
    assert cluster.host == "job-0-0.job"
    assert cluster[1:] == (2, 1, None)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert detect() is None


def test_a_lone_pod_is_a_single_process(monkeypatch, recwarn):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert detect() is None
    assert not recwarn.list


def call_all(clusters: list[Cluster], timeout_s: float = 10, **facts: str) -> list:
    """Run the roll call of several processes on threads; return the attendance or the error of each."""
    results: list = [None] * len(clusters)

    def run(place: int, cluster: Cluster) -> None:
        try:
            mine = distributed.facts() | {"host": f"host{cluster.process_id}"} | facts
            results[place] = roll_call(cluster, mine, timeout_s=timeout_s)
        except ClusterError as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(clusters)]
    for thread in reversed(threads):  # process 0 comes last
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, distributed.Attendance):
            result.close()
    return results


def test_everybody_learns_of_everybody():
    address = f"127.0.0.1:{free_port()}"
    results = call_all([Cluster(address, 5, i) for i in range(5)])
    for result in results:
        assert [row["host"] for row in result.roster] == [f"host{i}" for i in range(5)]
        assert distributed.differences(result.roster) == []


def test_roll_call_failures_are_named_on_every_process():
    address = f"127.0.0.1:{free_port()}"
    for result in call_all([Cluster(address, 4, i) for i in (0, 1)], timeout_s=1):
        assert "process 2, 3 of 4 did not report" in str(result)
    address = f"127.0.0.1:{free_port()}"
    [result] = call_all([Cluster(address, 4, 1)], timeout_s=1)
    assert f"process 0 does not answer at {address} within 1 s" in str(result)
    address = f"127.0.0.1:{free_port()}"
    results = call_all([Cluster(address, 3, 0), Cluster(address, 3, 1), Cluster(address, 3, 1)])
    assert all("process id 1 is taken twice" in str(result) for result in results)
    address = f"127.0.0.1:{free_port()}"
    results = call_all([Cluster(address, 2, 0), Cluster(address, 3, 1)])
    assert all("one of 3 processes" in str(result) for result in results)


def test_strangers_on_the_port_do_no_harm():
    import socket

    port = free_port()
    clusters = [Cluster(f"127.0.0.1:{port}", 2, i) for i in (0, 1)]
    stop = threading.Event()

    def pester() -> None:
        while not stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n[1]\n{}\n")
            except OSError:
                stop.wait(0.01)

    thread = threading.Thread(target=pester, daemon=True)
    thread.start()
    results = call_all(clusters)
    stop.set()
    thread.join()
    assert all(isinstance(result, distributed.Attendance) for result in results)


def test_other_code_is_refused_with_the_process_that_has_it():
    roster = [{"host": f"h{i}", "jax": "0.10.2", "code": "a" if i != 2 else "b"} for i in range(4)]
    [problem] = distributed.differences(roster)
    assert problem == (
        "code differs: a on process 0 (h0), 1 (h1), 3 (h3); b on process 2 (h2): install the same everywhere"
    )


def test_the_digest_follows_the_sources():
    package = Path(distributed.__file__).parent
    assert len(distributed.code_digest()) == 16
    assert (package / "model.py").exists()


ONE_FAILS = """
import sys
from qwen3_jax import distributed
distributed.code_digest = lambda: ""
distributed.SHUTDOWN_S = 2
cluster = distributed.detect()
with distributed.session(cluster):
    if cluster.process_id == 1:
        raise ValueError("no luck")
    distributed.share("wait for the other")
"""


def test_an_exception_on_one_process_ends_the_other():
    pair = launch(["-c", ONE_FAILS], 2, devices=1)
    _, logs = finish(pair, 300)
    assert "ValueError: no luck" in logs[1]
    assert [process.returncode != 0 for process in pair] == [True, True]

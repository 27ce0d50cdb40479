"""Several processes, one program: who takes part, the roll call, start and end, and what only the first process does.

flags, QWEN3_* variables or the cluster's own → `detect` → `roll_call`: every process reports to the first one over a
plain socket, with its host, versions and a digest of its code, and learns who is missing → `jax.distributed` → the
program → `stop`.

The roll call comes first because JAX cannot say who is missing: when a process does not show up, all others die of
SIGABRT with "DEADLINE_EXCEEDED … RegisterTask" (jax 0.10.2). It uses the coordinator's port, which is free until JAX's
own service takes it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jaxlib.version
import numpy as np
from jax.experimental import multihost_utils

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "QWEN3_COORDINATOR", "QWEN3_NUM_PROCESSES", "QWEN3_PROCESS_ID"
HEARTBEAT_S = 60  # JAX takes a process that is silent for so long for dead, and ends all others
SHUTDOWN_S = 15  # a process that failed waits this long for the others before it goes
MAX_LINE_BYTES = 1 << 20
PROTOCOL = "qwen3_jax roll call 1"
REMEDIES = {"config": "give all the same config.json", "options": "give all the same arguments"}

T = TypeVar("T")

_JOINED: list[Cluster] = []


class ClusterError(ValueError):
    """Processes that cannot work together: one line, naming the process and its host."""


class Cluster(NamedTuple):
    """The place of this process among the others."""

    coordinator: str  # host:port of process 0
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None  # None: all devices of the host are this process's

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])

    @property
    def is_local(self) -> bool:
        """Whether all processes are on this machine, so that nothing needs to listen on its network."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def detect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> Cluster | None:
    """Find out which process this is, of how many; None for a single one.

    An argument wins over its QWEN3_* variable; with neither, JAX looks for Slurm, Cloud TPU, GKE and Open MPI.

    Raises:
        ClusterError: some but not all of the three are given, or a value makes no sense.
    """
    environment = os.environ if environment is None else environment
    given = {
        ("--coordinator", COORDINATOR): coordinator,
        ("--num-processes", NUM_PROCESSES): num_processes,
        ("--process-id", PROCESS_ID): process_id,
    }
    found = {names: value if value is not None else environment.get(names[1]) or None for names, value in given.items()}
    missing = [" or ".join(names) for names, value in found.items() if value is None]
    if len(missing) == len(found):
        return _from_cluster(environment, timeout_s)
    if missing:
        have = ", ".join(names[0] for names, value in found.items() if value is not None)
        raise ClusterError(f"{have} given without {' and '.join(missing)}: give all three, or none")
    address, count, index = found.values()
    numbers = []
    for names, value in (("--num-processes", count), ("--process-id", index)):
        if not str(value).isdecimal():
            raise ClusterError(f"{names} is {value!r}: give a whole number")
        numbers.append(int(str(value)))
    return _checked(Cluster(str(address), *numbers))


def _checked(cluster: Cluster) -> Cluster | None:
    _, count, index, _ = cluster
    if not index < max(count, 1):
        raise ClusterError(f"process id {index} of {count} processes: ids are 0..{count - 1}")
    port = cluster.coordinator.rpartition(":")[2]
    if not cluster.host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ClusterError(f"coordinator {cluster.coordinator!r}: give host and port of process 0, as in host0:8476")
    return cluster if count > 1 else None


def _from_cluster(environment: Mapping[str, str], timeout_s: float) -> Cluster | None:
    """Ask JAX's detection, which knows the variables, metadata servers and APIs of each kind of cluster."""
    from jax._src.clusters import ClusterEnv  # the public entrance, initialize(), aborts where this raises

    if "KUBERNETES_SERVICE_HOST" in environment and not environment.keys() & {
        "JOB_COMPLETION_INDEX",
        "TPU_WORKER_HOSTNAMES",
        "TPU_PROCESS_ADDRESSES",
    }:
        return None  # a pod by itself
    try:
        address, count, index, local = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout_s)
        )
    except Exception as error:  # a metadata server or API that answers otherwise than JAX expects
        reason = " ".join(str(error).split())
        raise ClusterError(
            f"cannot read this cluster's environment: {reason}: set {COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID}"
        ) from error
    if address is None or count is None or index is None:
        return None
    return _checked(Cluster(address, count, index, _local_devices(local, environment)))


def _local_devices(local: Any, environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Correct JAX's guess under Slurm, one device per task, where a task has the node or already sees one GPU only."""
    if local is None:
        return None
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_NTASKS_PER_NODE", ""))
    alone = tasks.partition("(")[0].partition(",")[0] == "1"
    bound = len(environment.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    return None if alone or bound else tuple(local)


# --- the roll call ----------------------------------------------------------------------------------------------------


@functools.cache
def code_digest() -> str:
    """Return a digest of this package's Python sources, 16 hexadecimal digits."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def facts() -> dict[str, str]:
    """Return what must be the same on every process, and its host."""
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "code": code_digest(),
    }


def differences(roster: list[dict[str, str]], *, ignore: tuple[str, ...] = ("host",)) -> list[str]:
    """Return one line for each fact that is not the same everywhere, with the processes of each value."""
    problems = []
    for key in roster[0]:
        if key in ignore:
            continue
        holders: dict[str, list[str]] = {}
        for index, row in enumerate(roster):
            holders.setdefault(row.get(key, "nothing"), []).append(f"{index} ({row['host']})")
        if len(holders) > 1:
            told = "; ".join(f"{value} on process {_listed(who)}" for value, who in holders.items())
            problems.append(f"{key} differs: {told}: {REMEDIES.get(key, 'install the same everywhere')}")
    return problems


def _listed(who: list[str], limit: int = 4) -> str:
    return ", ".join(who[:limit]) + (f" and {len(who) - limit} more" if len(who) > limit else "")


class Line:
    """One JSON object per line over a socket."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self._sending = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send a message; False if the other side is gone or takes nothing."""
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")
            return True
        return False

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """Return the next message, None at the end of the connection. Raises TimeoutError."""
        self._socket.settimeout(timeout_s)
        while b"\n" not in self._rest:
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError:
                return None
            if not data or len(self._rest) > MAX_LINE_BYTES:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Attendance(NamedTuple):
    """Everybody is there: what each process said of itself, and the open lines (to all, or to process 0)."""

    roster: list[dict[str, str]]
    lines: dict[int, Line]

    def close(self) -> None:
        for line in self.lines.values():
            line.close()


def roll_call(cluster: Cluster, mine: dict[str, str], *, timeout_s: float) -> Attendance:
    """Wait until every process has reported to process 0, and return what each said.

    Args:
        cluster: of `detect`.
        mine: facts about this process, "host" among them.
        timeout_s: how long to wait for the others. The failure is known to all within twice this time.

    Raises:
        ClusterError: naming who is missing, or that process 0 does not answer.
    """
    if cluster.process_id == 0:
        return _call(cluster, mine, timeout_s)
    return _answer(cluster, mine, timeout_s)


def _call(cluster: Cluster, mine: dict[str, str], timeout_s: float) -> Attendance:
    deadline = time.monotonic() + timeout_s
    arrived: queue.Queue[tuple[Line, dict[str, Any] | None]] = queue.Queue()
    rows: dict[int, dict[str, str]] = {0: mine}
    lines: dict[int, Line] = {}
    server = _listen(cluster)

    def accept() -> None:
        while True:
            try:
                line = Line(server.accept()[0])
            except OSError:
                return  # closed
            threading.Thread(target=hear, args=(line,), daemon=True).start()

    def hear(line: Line) -> None:
        try:
            arrived.put((line, line.receive(10)))
        except TimeoutError:  # who says nothing is a stranger; one of us would ask again
            line.close()

    def fail(reason: str) -> ClusterError:
        for line in lines.values():
            line.send({"error": reason})
            line.close()
        return ClusterError(reason)

    threading.Thread(target=accept, daemon=True).start()
    try:
        while len(rows) < cluster.num_processes:
            try:
                line, message = arrived.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                absent = [str(index) for index in range(cluster.num_processes) if index not in rows]
                present = [f"{index} ({row['host']})" for index, row in sorted(rows.items())]
                raise fail(
                    f"process {_listed(absent)} of {cluster.num_processes} did not report to {cluster.coordinator} "
                    f"within {timeout_s:g} s; process {_listed(present)} did: start the missing one, or look at its log"
                ) from None
            if message is None or message.get("protocol") != PROTOCOL:
                line.close()  # a port scan, or another program
                continue
            index, row, count = int(message["process_id"]), dict(message["facts"]), int(message["num_processes"])
            if count != cluster.num_processes or not 0 < index < count:
                reason = (
                    f"process {index} ({row['host']}) was started as one of {count} processes, "
                    f"process 0 ({mine['host']}) as one of {cluster.num_processes}: give all the same number"
                )
                lines[-1] = line
                raise fail(reason)
            if index in rows:
                hosts = f"{rows[index]['host']} and {row['host']}"
                reason = f"process id {index} is taken twice, on {hosts}: number them 0..{cluster.num_processes - 1}"
                lines[-1] = line
                raise fail(reason)
            rows[index], lines[index] = row, line
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which would keep the port
        server.close()
    roster = [rows[index] for index in range(cluster.num_processes)]
    for line in lines.values():
        line.send({"roster": roster})
    return Attendance(roster, lines)


def _listen(cluster: Cluster) -> socket.socket:
    try:
        if cluster.is_local:
            return socket.create_server((cluster.host, cluster.port), family=_family(cluster.host), backlog=1024)
        if socket.has_dualstack_ipv6():
            address = ("::", cluster.port)
            return socket.create_server(address, family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server(("", cluster.port), backlog=1024)
    except OSError as error:
        raise ClusterError(
            f"process 0 cannot listen on port {cluster.port}: {error.strerror}: choose another port"
        ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _answer(cluster: Cluster, mine: dict[str, str], timeout_s: float) -> Attendance:
    silent = ClusterError(
        f"process 0 does not answer at {cluster.coordinator} within {timeout_s:g} s: start it, look at its log, "
        "or check the address and the firewall"
    )
    deadline = time.monotonic() + timeout_s
    hello = {"protocol": PROTOCOL, "num_processes": cluster.num_processes, "process_id": cluster.process_id}
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise silent
        try:
            line = Line(socket.create_connection((cluster.host, cluster.port), timeout=min(5, left)))
        except OSError:
            time.sleep(min(0.2, left))
            continue
        line.send(hello | {"facts": mine})
        try:
            # Process 0 may have come late; its own clock ends the wait for the others.
            message = line.receive(timeout_s + 5)
        except TimeoutError:
            line.close()
            raise silent from None
        if message is None:  # a listener that has just closed, or is another program
            line.close()
            time.sleep(min(0.2, left))
            continue
        if "error" in message:
            line.close()
            raise ClusterError(message["error"])
        return Attendance(message["roster"], {0: line})


# --- start and end ----------------------------------------------------------------------------------------------------


def start(cluster: Cluster | None, *, timeout_s: float = 300) -> None:
    """Join the other processes: roll call, same versions and code everywhere, then JAX. Nothing for a single process.

    Must come before anything that touches a device.

    Raises:
        ClusterError: a process is missing, or runs other code or another JAX.
    """
    if cluster is None:
        return
    attendance = roll_call(cluster, facts(), timeout_s=timeout_s)
    attendance.close()
    if problems := differences(attendance.roster):
        raise ClusterError("; ".join(problems))
    connect(cluster, timeout_s=timeout_s)
    _JOINED.append(cluster)


def joined() -> Cluster:
    """Return the cluster that `start` joined.

    Raises:
        ClusterError: this process has joined none.
    """
    if not _JOINED:
        raise ClusterError("this process has joined no others: call qwen3_jax.distributed.start first")
    return _JOINED[-1]


def connect(cluster: Cluster, *, timeout_s: float, heartbeat_s: float = HEARTBEAT_S) -> None:
    """Start JAX's own service and client; everybody is known to be there."""
    jax.distributed.initialize(
        coordinator_address=cluster.coordinator,
        num_processes=cluster.num_processes,
        process_id=cluster.process_id,
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        coordinator_bind_address=cluster.coordinator if cluster.is_local else None,
        initialization_timeout=int(timeout_s),
        heartbeat_timeout_seconds=int(heartbeat_s),
        shutdown_timeout_seconds=SHUTDOWN_S,
    )


def stop() -> None:
    """Wait for all processes, however long they take, then leave together."""
    if jax.distributed.is_initialized():
        multihost_utils.sync_global_devices("qwen3_jax.stop")
        jax.distributed.shutdown()


@contextlib.contextmanager
def session(cluster: Cluster | None, *, timeout_s: float = 300) -> Iterator[None]:
    """Start, run the body, stop. If the body fails on one process, the others end within SHUTDOWN_S + HEARTBEAT_S."""
    if cluster is None:
        yield
        return
    with _results_only_on_stdout():
        start(cluster, timeout_s=timeout_s)
        yield
        stop()


@contextlib.contextmanager
def _results_only_on_stdout() -> Iterator[None]:
    """Keep stdout for Python; what libraries print there from C++, as gloo does at every connection, goes to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    stream = os.fdopen(os.dup(stdout), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    try:
        with stream, contextlib.redirect_stdout(stream):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def is_main() -> bool:
    """Say whether this is the process that writes results and shows progress."""
    return jax.process_index() == 0


def once(write: Callable[[], T]) -> T | None:
    """Run a function on the first process only; the others wait for it and return None.

    Raises:
        Exception: on the first process, whatever `write` raised; ClusterError on the others.
    """
    result, failure = None, None
    if is_main():
        try:
            result = write()
        except Exception as error:
            failure = error
    failed = share({"error": f"{type(failure).__name__}: {failure}"} if failure else {})
    if failure is not None:
        raise failure
    if "error" in failed:
        raise ClusterError(f"process 0 failed: {failed['error']}")
    return result


def share(value: Any) -> Any:
    """Return process 0's value (JSON) on every process: a prompt from its terminal, for example."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value if is_main() else None).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    if is_main():
        padded[:] = np.frombuffer(text, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def fetch(tree: Any) -> Any:
    """Return arrays on the mesh as numpy arrays, whole, on every process; all processes call this together.

    What is whole on every process already is read without a program of its own: on CPU such a program could run beside
    one that is still under way and mix its messages with that one's.
    """

    def whole(array: Any) -> np.ndarray:
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(whole, tree)

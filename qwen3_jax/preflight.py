"""The `preflight` command: do these processes, this mesh and this model work together, told in minutes, never a hang.

    run          on every process: roll call → compare → supervise a worker → the verdict of process 0
    worker       a child process that touches JAX: connect → devices → collectives per mesh axis → memory

Every process has two halves. The supervisor holds a socket to process 0 and a pipe to its worker, never calls JAX, and
so cannot hang with it; the worker may abort, deadlock or be killed. Process 0 hears from every supervisor each second
how its worker is doing. A worker that died, a supervisor that fell silent, a stage that does not end: process 0 names
the process, everybody prints that one line, kills its worker and exits with PEER_LOST. If process 0 itself is lost, the
others notice on their sockets. JAX by itself ends all processes with SIGABRT and a stack trace when one stops sending
heartbeats, names its number if it had connected and nobody if it had not (jax 0.10.2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table as RichTable

from qwen3_jax import distributed, shardings
from qwen3_jax.distributed import Cluster, ClusterError, Line
from qwen3_jax.sharding import AXES, RULES, ShardingError, make_mesh, parse_mesh

PASSED, FAILED, PEER_LOST = 0, 1, 3  # exit codes; 2 is a usage error
STAGES = ("importing JAX", "connecting", "listing devices", "running collectives", "checking memory", "finished")
BEAT_S = 1.0
GRACE_S = 2.0  # one death makes others fail within moments: wait for the first cause to be heard
# How directly a failure tells the cause: an end by a signal or a closed connection does, an error in JAX may follow
# from the end of another process, JAX's own abort always does.
KILLED, GONE, RAISED, ABORTED = range(4)
KINDS = ("psum", "all_gather", "psum_scatter", "all_to_all", "ppermute")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to check.

    Attributes:
        mesh: "data=1,expert=4,model=4"; None puts all devices on `model`.
        model: a folder or a released name, for divisibility and memory; None leaves both out.
        rules: a table of `sharding.RULES`.
        dtype: of parameters and cache, "float32" or "bfloat16".
        batch: rows of the cache; None for one per part.
        context: slots per row.
        memory_gib: of each device, where the platform does not tell.
        mib: size of the array that each device contributes to a collective.
        rounds: timed repetitions of each collective.
        start_timeout_s: how long to wait for processes to appear.
        stage_timeout_s: how long any stage of the checks may take.
        patience_s: silence after which a process counts as stopped.
    """

    mesh: str | None = None
    model: str | None = None
    rules: str = "serve"
    dtype: str = "bfloat16"
    batch: int | None = None
    context: int = 4096
    memory_gib: float | None = None
    mib: float = 4.0
    rounds: int = 10
    start_timeout_s: float = 300.0
    stage_timeout_s: float = 300.0
    patience_s: float = 20.0


def run(options: Options, cluster: Cluster | None, *, as_json: bool = False, console: Console | None = None) -> int:
    """Check this process among the others; call it on every process with the same options.

    Args:
        options: what to check.
        cluster: of `distributed.detect`; None for a single process.
        as_json: process 0 prints one JSON object instead of tables.
        console: where process 0 prints tables.

    Returns:
        PASSED, FAILED (a check: printed) or PEER_LOST (a process is missing, dead or slow: printed).

    Raises:
        ShardingError, ConfigError: an option makes no sense.
    """
    index = 0 if cluster is None else cluster.process_id
    mine = distributed.facts() | {"options": digest(dataclasses.asdict(options)), "config": "none"}
    if options.mesh is not None:
        parse_mesh(options.mesh)
    if options.rules not in RULES:
        raise ShardingError([f"rules {options.rules!r} are unknown: use {' or '.join(RULES)}"])
    if options.model is not None:
        mine["config"] = digest(shardings.config_of(options.model).to_dict())
    try:
        if cluster is None:
            attendance = distributed.Attendance([mine], {})
        else:
            say(index, f"waiting for {cluster.num_processes} processes at {cluster.coordinator}")
            attendance = distributed.roll_call(cluster, mine, timeout_s=options.start_timeout_s)
    except ClusterError as error:
        say(index, str(error))
        return PEER_LOST
    problems = distributed.differences(attendance.roster)
    if problems:  # everybody has the same roster and comes to the same end
        attendance.close()
        report: dict[str, Any] = {"roster": attendance.roster, "problems": problems}
    else:
        supervisor = Supervisor(options, cluster, attendance)
        try:
            report = supervisor.run()
        except LostError as lost:
            say(index, str(lost))
            return PEER_LOST
        finally:
            supervisor.close()
    report = {"passed": not report["problems"]} | report
    if index == 0 and as_json:
        print(json.dumps(report, indent=2))
    elif index == 0:
        render(report, Console() if console is None else console)
    for problem in report["problems"] if index or as_json else ():
        say(index, problem)
    return PASSED if report["passed"] else FAILED


def digest(value: Any) -> str:
    """Return a digest of a JSON value, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def say(index: int, text: str) -> None:
    sys.stderr.write(f"preflight, process {index}: {text}\n")  # in one piece: other processes write there too
    sys.stderr.flush()


# --- the supervisor ---------------------------------------------------------------------------------------------------


class LostError(Exception):
    """A process is dead, stopped or stuck; the message names it."""


@dataclasses.dataclass
class Peer:
    """What process 0 knows of a process, itself included."""

    heard: float  # when
    stage: int = 0
    entered: float = 0.0  # when, on process 0's clock
    silence_s: float = 0.0  # of its worker
    failure: tuple[int, str] | None = None  # KILLED to ABORTED, and what happened
    report: dict[str, Any] | None = None


class Supervisor:
    """Start the worker, exchange beats with the other supervisors, and come to the same verdict as they."""

    def __init__(self, options: Options, cluster: Cluster | None, attendance: distributed.Attendance):
        self.options, self.cluster, self.roster = options, cluster, attendance.roster
        self.index = 0 if cluster is None else cluster.process_id
        self.lines = attendance.lines
        self.events: queue.Queue[tuple[str | int, dict[str, Any] | None]] = queue.Queue()
        now = time.monotonic()
        self.peers = {i: Peer(heard=now, entered=now) for i in range(len(self.roster))}
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, lives as long as the worker
        # A pipe of its own: libraries print on stdout (gloo does, in pieces).
        self.pipe, theirs = os.pipe()
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "qwen3_jax.preflight", str(theirs)],
            stdin=subprocess.PIPE,
            stdout=self.stderr,
            stderr=self.stderr,
            pass_fds=(theirs,),
            text=True,
        )
        os.close(theirs)
        assert self.worker.stdin is not None
        here = sum(row["host"] == self.roster[self.index]["host"] for row in self.roster)
        order = {"options": dataclasses.asdict(options), "cluster": cluster, "processes_here": here}
        with contextlib.suppress(OSError):
            self.worker.stdin.write(json.dumps(order) + "\n")
            self.worker.stdin.flush()  # and stays open: its end tells the worker that this process is gone
        threading.Thread(target=self._read_worker, daemon=True).start()
        for peer, line in self.lines.items():
            threading.Thread(target=self._read_line, args=(peer, line), daemon=True).start()

    def run(self) -> dict[str, Any]:
        """Return the report of all processes. Raises LostError."""
        next_beat = time.monotonic()
        worker_heard: float | None = None  # importing is silent
        first_failure: float | None = None
        me = self.peers[self.index]
        while True:
            with contextlib.suppress(queue.Empty):
                source, message = self.events.get(timeout=0.1)
                now = time.monotonic()
                if source == "worker":
                    worker_heard = now
                    self._on_worker(me, message, now)
                elif self.index == 0:
                    self._on_peer(int(source), message, now)
                elif message is None:
                    raise LostError(f"{self.name(0)} is gone: the connection to it closed while {STAGES[me.stage]}")
                elif "verdict" in message:
                    if message["verdict"] is not None:
                        raise LostError(message["verdict"])
                    return message["report"]
                else:
                    self.peers[0].heard = now
            now = time.monotonic()
            me.silence_s = 0.0 if me.report or worker_heard is None else now - worker_heard
            if self.index == 0:
                me.heard = now
                first_failure = first_failure or (now if any(p.failure for p in self.peers.values()) else None)
                verdict = self._verdict(now, first_failure)
                if verdict is not None:
                    self._tell({"verdict": verdict})
                    raise LostError(verdict)
                if all(peer.report for peer in self.peers.values()):
                    report = combine(
                        self.options, self.roster, [self.peers[i].report or {} for i in sorted(self.peers)]
                    )
                    self._tell({"verdict": None, "report": report})
                    return report
            elif now - self.peers[0].heard > self.options.patience_s + 2 * GRACE_S:
                raise LostError(self._silent(0, now - self.peers[0].heard, me.stage))
            if now >= next_beat:
                next_beat = now + BEAT_S
                self._beat(me)

    def name(self, index: int) -> str:
        return f"process {index} ({self.roster[index]['host']})"

    def _silent(self, index: int, seconds: float, stage: int) -> str:
        return (
            f"{self.name(index)} has not been heard for {seconds:.0f} s while {STAGES[stage]}: "
            "it is stopped, or its host or network is down"
        )

    def _beat(self, me: Peer) -> None:
        state = {"stage": me.stage, "silence_s": me.silence_s, "failure": me.failure, "report": me.report}
        for line in self.lines.values():
            line.send(state if self.index else {"beat": True})

    def _on_worker(self, me: Peer, message: dict[str, Any] | None, now: float) -> None:
        if message is None:
            if me.report is None and me.failure is None:
                me.failure = self._death()
        elif "stage" in message:
            me.stage, me.entered = message["stage"], now
        elif "failure" in message:
            me.failure = (RAISED, f"{self.name(self.index)} failed while {STAGES[me.stage]}: {message['failure']}")
        elif "report" in message:
            me.report, me.stage = message["report"], len(STAGES) - 1
        else:
            return  # a sign of life
        if self.index:
            self._beat(me)

    def _death(self) -> tuple[int, str]:
        """Say how the worker ended: a signal from outside tells the cause, JAX's own abort follows from another's."""
        code = self.worker.wait()
        self.stderr.seek(0)
        last = self.stderr.read().decode(errors="replace").strip().splitlines()
        fatal = next((line for line in last if line.startswith("F")), last[-1] if last else "no output")
        stage = STAGES[self.peers[self.index].stage]
        if code < 0 and code != -signal.SIGABRT:
            name = signal.Signals(-code).name
            return KILLED, f"{self.name(self.index)} died while {stage}: its worker was ended by {name}"
        return ABORTED, f"{self.name(self.index)} died while {stage}: {fatal.strip()[:500]}"

    def _on_peer(self, index: int, message: dict[str, Any] | None, now: float) -> None:
        peer = self.peers[index]
        if message is None:
            if peer.failure is None:
                text = f"{self.name(index)} is gone: its connection closed while {STAGES[peer.stage]}"
                peer.failure = (GONE, text)
            return
        peer.heard = now
        if message["stage"] != peer.stage:
            peer.stage, peer.entered = message["stage"], now
        peer.silence_s, peer.report = message["silence_s"], message["report"]
        peer.failure = peer.failure or (message["failure"] and tuple(message["failure"]))

    def _verdict(self, now: float, first_failure: float | None) -> str | None:
        """Return what went wrong, once that is clear, or None."""
        options, peers = self.options, self.peers
        failures = sorted(peer.failure for peer in peers.values() if peer.failure)
        if failures and failures[0][0] <= GONE:
            return failures[0][1]
        silent = [i for i, peer in peers.items() if not peer.failure and now - peer.heard > options.patience_s]
        if silent:
            return self._silent(silent[0], now - peers[silent[0]].heard, peers[silent[0]].stage)
        frozen = [i for i, peer in peers.items() if not peer.report and peer.silence_s > options.patience_s]
        if frozen:
            return self._silent(frozen[0], peers[frozen[0]].silence_s, peers[frozen[0]].stage)
        if failures and first_failure is not None and now - first_failure > GRACE_S:
            return failures[0][1]
        stage = min(peer.stage for peer in peers.values())
        behind = [i for i, peer in peers.items() if peer.stage == stage]
        took = now - max(peers[i].entered for i in behind)
        if took > options.stage_timeout_s:
            who = "every process" if len(behind) == len(peers) else " and ".join(self.name(i) for i in behind[:4])
            return f"{who} did not finish {STAGES[stage]} within {options.stage_timeout_s:g} s, though alive"
        return None

    def _tell(self, message: Mapping[str, Any]) -> None:
        for line in self.lines.values():
            line.send(message)

    def _read_worker(self) -> None:
        with os.fdopen(self.pipe) as pipe:
            for text in pipe:
                self.events.put(("worker", json.loads(text)))
        self.events.put(("worker", None))

    def _read_line(self, peer: int, line: Line) -> None:
        while True:
            message = line.receive()
            self.events.put((peer, message))
            if message is None:
                return

    def close(self) -> None:
        """End the worker, stopped or not, and the connections."""
        self.worker.kill()
        self.worker.wait()
        for line in self.lines.values():
            line.close()


# --- the worker -------------------------------------------------------------------------------------------------------


def worker(pipe: int) -> None:
    """Run the stages in the child process, told on stdin, telling the supervisor through a pipe."""
    order = json.loads(sys.stdin.readline())
    options = Options(**order["options"])
    cluster = Cluster(*order["cluster"]) if order["cluster"] else None
    writing = threading.Lock()

    def tell(message: Mapping[str, Any]) -> None:
        with writing:
            data = json.dumps(message).encode() + b"\n"
            while data:
                data = data[os.write(pipe, data) :]

    def end_with_the_supervisor() -> None:
        sys.stdin.read()
        os._exit(1)

    def show_life() -> None:
        while True:
            tell({})
            time.sleep(BEAT_S)

    for target in (end_with_the_supervisor, show_life):
        threading.Thread(target=target, daemon=True).start()
    try:
        tell({"stage": STAGES.index("connecting")})
        if cluster is not None:
            # The supervisors are quicker to notice and clearer to tell: JAX's own timeouts come later.
            late = options.stage_timeout_s + 4 * options.patience_s
            distributed.connect(cluster, timeout_s=late, heartbeat_s=max(10, 4 * options.patience_s))
        tell({"stage": STAGES.index("listing devices")})
        report = devices_report()
        mesh = mesh_of(options)
        tell({"stage": STAGES.index("running collectives")})
        report["collectives"] = collectives(mesh, mib=options.mib, rounds=options.rounds)
        tell({"stage": STAGES.index("checking memory")})
        report["memory"] = memory(options, mesh, order["processes_here"])
    except Exception as error:
        tell({"failure": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
        os._exit(1)
    tell({"report": report})
    time.sleep(3600)  # the supervisor ends this process: nothing is left to go wrong in an orderly shutdown


def mesh_of(options: Options) -> Mesh:
    """Make the mesh that was asked for. Raises ShardingError."""
    sizes = dict.fromkeys(AXES, 1) | {"model": jax.device_count()} if options.mesh is None else parse_mesh(options.mesh)
    return make_mesh(data=sizes["data"], fsdp=sizes["fsdp"], expert=sizes["expert"], model=sizes["model"])


def devices_report() -> dict[str, Any]:
    """Return what this process sees of all devices."""
    return {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "platform": jax.default_backend(),
        "local": [str(device) for device in jax.local_devices()],
        "kinds": sorted({device.device_kind for device in jax.devices()}),
        "all": [[device.id, device.process_index] for device in jax.devices()],
    }


def collectives(mesh: Mesh, *, mib: float, rounds: int) -> list[dict[str, Any]]:
    """Run every kind of collective over every mesh axis longer than 1, and over all together; check and time each.

    Every device contributes [n, m] int32 numbers that name it and the place, so that each output has one right value,
    computed here without communication. `seconds` is the mean of `rounds` calls.
    """
    axes: list[tuple[str, ...]] = [(axis,) for axis in AXES if mesh.shape[axis] > 1]
    axes += [AXES] if len(axes) != 1 else []
    return [_collective(mesh, kind, axis, mib, rounds) for axis in axes for kind in KINDS]


def _collective(mesh: Mesh, kind: str, axes: tuple[str, ...], mib: float, rounds: int) -> dict[str, Any]:
    n = math.prod(mesh.shape[axis] for axis in axes)
    width = max(1, int(mib * 2**20 / 4 / n))
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    total = mesh.size

    def contribution(device: int) -> np.ndarray:
        return np.arange(n * width, dtype=np.int32).reshape(n, width) % 64 + 64 * device

    def on_device(x: jax.Array) -> jax.Array:
        x = x[0]
        if kind == "psum":
            return jax.lax.psum(x, axes)[None]
        if kind == "all_gather":
            return jax.lax.all_gather(x, axes)[None]
        if kind == "psum_scatter":
            return jax.lax.psum_scatter(x, axes, tiled=True)[None]
        if kind == "all_to_all":
            return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)[None]
        return jax.lax.ppermute(x, axes, [(i, (i + 1) % n) for i in range(n)])[None]

    step = jax.jit(
        jax.shard_map(
            on_device, mesh=mesh, in_specs=PartitionSpec(AXES), out_specs=PartitionSpec(AXES), check_vma=False
        )
    )
    x = jax.make_array_from_callback(
        (total, n, width),
        sharding,
        lambda index: contribution(int((index or (slice(0),))[0].start or 0))[None],
        jnp.int32,
    )
    out = step(x).block_until_ready()
    wrong = []
    places = np.arange(total).reshape(tuple(mesh.shape.values()))
    order = [AXES.index(axis) for axis in axes]
    for shard in out.addressable_shards:
        me = int(shard.index[0].start or 0)
        where = np.unravel_index(me, places.shape)
        line: Any = tuple(slice(None) if i in order else where[i] for i in range(len(AXES)))
        group: list[int] = places[line].reshape(-1).tolist()  # row-major over the axes, as XLA numbers them
        rank = group.index(me)
        parts = [contribution(member) for member in group]
        expected = {
            "psum": lambda parts=parts: np.sum(parts, axis=0),
            "all_gather": lambda parts=parts: np.stack(parts),
            "psum_scatter": lambda parts=parts, rank=rank: np.sum(parts, axis=0)[rank : rank + 1],
            "all_to_all": lambda parts=parts, rank=rank: np.stack([part[rank] for part in parts]),
            "ppermute": lambda parts=parts, rank=rank: parts[rank - 1],
        }[kind]()
        if not np.array_equal(np.asarray(shard.data)[0], expected):
            wrong.append(str(shard.device))
    begin = time.perf_counter()
    for _ in range(rounds):
        out = step(x)
        out.block_until_ready()
    seconds = (time.perf_counter() - begin) / max(1, rounds)
    return {
        "axes": list(axes) if axes != AXES else ["all"],
        "ways": n,
        "kind": kind,
        "bytes": n * width * 4,
        "seconds": seconds,
        "wrong": wrong,
    }


def memory(options: Options, mesh: Mesh, processes_here: int) -> dict[str, Any]:
    """Return bytes that the model needs per device and what each local device has; None where nobody knows.

    CPU devices share what their host has left, with those of the other processes on it.
    """
    need, problems = None, []
    if options.model is not None:
        config = shardings.config_of(options.model)
        table = shardings.tabulate(
            config,
            {axis: mesh.shape[axis] for axis in AXES},
            rules=options.rules,
            dtype=options.dtype,
            batch=options.batch,
            context=options.context,
        )
        problems = list(table.problems)
        need = table.bytes_per_device("parameter") + table.bytes_per_device("cache")
    have = []
    for device in jax.local_devices():
        if options.memory_gib is not None:
            have.append([str(device), int(options.memory_gib * 2**30)])
        elif device.platform == "cpu":
            share = host_available_bytes() // (jax.local_device_count() * processes_here)
            have.append([str(device), share])
        else:
            statistics = device.memory_stats() or {}
            limit = statistics.get("bytes_limit")
            have.append([str(device), None if limit is None else limit - statistics.get("bytes_in_use", 0)])
    return {"need_bytes_per_device": need, "have": have, "problems": problems}


def host_available_bytes() -> int:
    """Return the memory that programs can still have on this host."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# --- the report -------------------------------------------------------------------------------------------------------


def combine(options: Options, roster: list[dict[str, str]], reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge what the processes found; "problems" holds one line each, naming the process."""

    def name(index: int) -> str:
        return f"process {index} ({roster[index]['host']})"

    problems = []
    first = reports[0]
    for index, report in enumerate(reports):
        if report["processes"] != len(roster) or report["process"] != index:
            problems.append(
                f"{name(index)} sees itself as {report['process']} of {report['processes']}, expected {index} of "
                f"{len(roster)}: the roll call and JAX disagree"
            )
        if report["all"] != first["all"]:
            problems.append(f"{name(index)} sees {len(report['all'])} devices otherwise than {name(0)}")
        if len(report["local"]) != len(first["local"]):
            problems.append(
                f"{name(index)} has {len(report['local'])} devices, {name(0)} has {len(first['local'])}: "
                "give every process as many"
            )
    timings = []
    for row in zip(*(report["collectives"] for report in reports), strict=True):
        slowest = max(range(len(row)), key=lambda i: row[i]["seconds"])
        for index, measured in enumerate(row):
            if measured["wrong"]:
                axes = " × ".join(measured["axes"])
                devices = ", ".join(measured["wrong"][:4])
                problems.append(f"{name(index)}: {measured['kind']} over {axes} is wrong on {devices}")
        kept = {key: row[slowest][key] for key in ("axes", "ways", "kind", "bytes", "seconds")}
        timings.append(kept | {"slowest_process": slowest, "right": not any(measured["wrong"] for measured in row)})
    problems += first["memory"]["problems"]
    need, least = first["memory"]["need_bytes_per_device"], None
    for index, report in enumerate(reports):
        for device, have in report["memory"]["have"]:
            if have is None:
                continue
            least = have if least is None else min(least, have)
            if need is not None and need > have:
                problems.append(
                    f"{name(index)}: {device} has {have / 2**30:.2f} GiB, parameters and cache need "
                    f"{need / 2**30:.2f}: use more devices, a smaller batch or a shorter context"
                )
    if need is not None and least is None:
        problems.append("this platform does not tell its memory: give it in GiB per device")
    return {
        "roster": roster,
        "platform": first["platform"],
        "device_kinds": first["kinds"],
        "devices": len(first["all"]),
        "devices_per_process": [len(report["local"]) for report in reports],
        "mesh": options.mesh or f"model={len(first['all'])}",
        "collectives": timings,
        "memory": {"need_bytes_per_device": need, "have_bytes_per_device": least},
        "problems": problems,
    }


def render(report: dict[str, Any], console: Console) -> None:
    """Print a report for people."""
    processes = RichTable(title="processes")
    for heading in ("process", "host", "devices", "jax", "jaxlib", "python", "code", "config"):
        processes.add_column(heading)
    counts = report.get("devices_per_process", ["?"] * len(report["roster"]))
    for index, (row, count) in enumerate(zip(report["roster"], counts, strict=True)):
        cells = (row[key] for key in ("jax", "jaxlib", "python", "code", "config"))
        processes.add_row(str(index), row["host"], str(count), *cells)
    console.print(processes)
    if "collectives" in report:
        table = RichTable(title=f"collectives over {report['mesh']}, {', '.join(report['device_kinds'])}")
        for heading in ("axes", "ways", "kind", "MiB per device", "ms", "GB/s per device", "slowest", "right"):
            table.add_column(heading, justify="left" if heading in ("axes", "kind", "right") else "right")
        for row in report["collectives"]:
            speed = row["bytes"] / row["seconds"] / 1e9 if row["seconds"] else math.nan
            table.add_row(
                " × ".join(row["axes"]),
                str(row["ways"]),
                row["kind"],
                f"{row['bytes'] / 2**20:.2f}",
                f"{row['seconds'] * 1e3:.3f}",
                f"{speed:.2f}",
                str(row["slowest_process"]),
                "yes" if row["right"] else "NO",
                style=None if row["right"] else "bold red",
            )
        console.print(table)
        need, have = report["memory"].values()
        told = "unknown" if have is None else f"{have / 2**30:.2f} GiB"
        if need is not None:
            console.print(f"memory per device: {need / 2**30:.2f} GiB of parameters and cache, {told} available")
    for problem in report["problems"]:
        console.print(problem, style="red", highlight=False, markup=False)
    console.print("preflight passed" if report["passed"] else "preflight FAILED", style="bold")


if __name__ == "__main__":
    worker(int(sys.argv[1]))

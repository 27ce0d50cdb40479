"""The half of a process that never calls JAX: it watches its worker, hears of the others, and comes to a verdict."""

import contextlib
import dataclasses
import json
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

from qwen3_jax import distributed
from qwen3_jax.distributed import Cluster, Line
from qwen3_jax.preflight.options import BEAT_S, STAGES, Options
from qwen3_jax.preflight.report import combine

GRACE_S = 2.0  # one death makes others fail within moments: wait for the first cause to be heard
# How directly a failure tells the cause: an end by a signal or a closed connection does, an error in JAX may follow
# from the end of another process, JAX's own abort always does.
KILLED, GONE, RAISED, ABORTED = range(4)


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

"""The `preflight` command: do these processes, this mesh and this model work together, told in minutes, never a hang.

    run              on every process: roll call → compare → supervise a worker → the verdict of process 0
    worker, checks   a child process that touches JAX: connect → devices → collectives per mesh axis → memory

Every process has two halves. The `supervisor` holds a socket to process 0 and a pipe to its worker, never calls JAX,
and so cannot hang with it; the worker may abort, deadlock or be killed. Process 0 hears from every supervisor each
second how its worker is doing. A worker that died, a supervisor that fell silent, a stage that does not end: process 0
names the process, everybody prints that one line, kills its worker and exits with PEER_LOST. If process 0 itself is
lost, the others notice on their sockets. JAX by itself ends all processes with SIGABRT and a stack trace when one stops
sending heartbeats, names its number if it had connected and nobody if it had not (jax 0.10.2).
"""

import dataclasses
import hashlib
import json
import sys
from typing import Any

from rich.console import Console

from qwen3_jax import distributed, shardings
from qwen3_jax.distributed import Cluster, ClusterError
from qwen3_jax.preflight.checks import KINDS, collectives
from qwen3_jax.preflight.options import STAGES, Options
from qwen3_jax.preflight.report import render
from qwen3_jax.preflight.supervisor import LostError, Supervisor
from qwen3_jax.sharding import RULES, ShardingError, parse_mesh

__all__ = ["FAILED", "KINDS", "PASSED", "PEER_LOST", "STAGES", "Options", "Supervisor", "collectives", "run"]

PASSED, FAILED, PEER_LOST = 0, 1, 3  # exit codes; 2 is a usage error


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

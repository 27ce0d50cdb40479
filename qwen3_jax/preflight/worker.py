"""The half of a process that touches JAX, as a child process: it runs the checks and tells how far it is."""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from qwen3_jax import distributed
from qwen3_jax.distributed import Cluster
from qwen3_jax.preflight import checks
from qwen3_jax.preflight.options import BEAT_S, STAGES, Options


def work(pipe: int) -> None:
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
        report = checks.devices()
        mesh = checks.mesh_of(options)
        tell({"stage": STAGES.index("running collectives")})
        report["collectives"] = checks.collectives(mesh, mib=options.mib, rounds=options.rounds)
        tell({"stage": STAGES.index("checking memory")})
        report["memory"] = checks.memory(options, mesh, order["processes_here"])
    except Exception as error:
        tell({"failure": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
        os._exit(1)
    tell({"report": report})
    time.sleep(3600)  # the supervisor ends this process: nothing is left to go wrong in an orderly shutdown

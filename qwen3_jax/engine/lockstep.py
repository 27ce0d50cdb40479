"""One engine over several processes: process 0 decides and says what it dispatches, the others do the same.

    process 0:  engine = Engine(model, options)     the others:  follow(model, options)

Every call of the device side goes out as a frame over plain TCP, with its numpy arrays, before process 0 makes it
itself. Results are whole on every device, so nothing comes back but the connection's end: whoever loses the other side
says so and ends its process, because what it has dispatched waits for the lost one.
"""

import contextlib
import hmac
import json
import logging
import os
import queue
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qwen3_jax import distributed
from qwen3_jax.distributed import ClusterError
from qwen3_jax.engine.device import Device
from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.options import EngineOptions
from qwen3_jax.loaded import LoadedModel

log = logging.getLogger("qwen3_jax.engine")

CALLS = ("prefill", "score", "join", "decode", "forward", "draw", "scrub")
LOST_EXIT = 70  # exit status of a process that lost another
LOST_S = 5.0  # how long process 0 still answers, with errors, before it ends
JOIN_S = 120.0


class Leader:
    """The device of process 0, which tells the others what it is told; otherwise as `Device`."""

    def __init__(self, device: Device, lost: Callable[[str], None]):
        """Wait for the others. `lost` is told when one is gone, on a thread of its own; then the process ends.

        Raises:
            ClusterError: somebody did not come in time.
        """
        self._device = device
        self._lost = lost
        self._ending = False
        self._lines: dict[int, socket.socket] = {}
        cluster = distributed.joined()
        token = secrets.token_hex(16)
        with socket.create_server((cluster.host if cluster.is_local else "", 0)) as server:
            distributed.share({"port": server.getsockname()[1], "token": token})
            server.settimeout(JOIN_S)
            while len(self._lines) < cluster.num_processes - 1:
                try:
                    line, _ = server.accept()
                    line.settimeout(JOIN_S)
                    hello = json.loads(_receive(line)[0])
                except (OSError, ValueError, EOFError) as error:
                    if isinstance(error, TimeoutError):
                        raise ClusterError(
                            f"{len(self._lines) + 1} of {cluster.num_processes} processes joined the engine within "
                            f"{JOIN_S:g} s: look at the others' logs"
                        ) from None
                    continue  # a stranger
                if hmac.compare_digest(str(hello.get("token")), token):
                    line.settimeout(None)
                    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._lines[int(hello["process"])] = line
        for process, line in self._lines.items():
            threading.Thread(target=self._watch, args=(process, line), daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            return getattr(self._device, name)

        def tell(*args: Any) -> Any:
            self._send(name, args)
            return getattr(self._device, name)(*args)

        setattr(self, name, tell)
        return tell

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile everywhere; see `Device.warm_up`."""
        self._send("warm_up", ())
        self._device.warm_up(progress)

    def close(self) -> None:
        """Let the others end."""
        self._ending = True
        with contextlib.suppress(OSError):
            self._send("end", ())

    def _send(self, name: str, args: tuple[Any, ...]) -> None:
        frame = pack(name, args)
        for line in self._lines.values():
            line.sendall(frame)

    def _watch(self, process: int, line: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while line.recv(1):
                pass
        if not self._ending:
            self._ending = True
            reason = f"process {process} is gone: look at its log, and start all processes again"
            log.error(reason)
            self._lost(reason)
            _end(LOST_S)


def follow(model: LoadedModel, options: EngineOptions | None = None, *, observer: Observer | None = None) -> None:
    """Do what process 0's `Engine` does, until it stops. The arguments must be the same there.

    If process 0 disappears, this process ends with status LOST_EXIT.

    Raises:
        ClusterError: process 0 cannot be reached.
    """
    device = Device(model, EngineOptions() if options is None else options, observer or Observer())
    cluster = distributed.joined()
    where: Mapping[str, Any] = distributed.share(None)
    try:
        line = socket.create_connection((cluster.host, int(where["port"])), timeout=JOIN_S)
    except OSError as error:
        raise ClusterError(f"process 0 does not answer at {cluster.host}:{where['port']}: {error.strerror}") from error
    line.settimeout(None)
    line.sendall(_frame(json.dumps({"token": where["token"], "process": jax.process_index()}).encode(), b""))
    frames: queue.Queue[tuple[str, list[Any]]] = queue.Queue()

    def read() -> None:  # on a thread of its own, so that an end is seen even while the device waits for process 0
        try:
            while True:
                name, args = unpack(*_receive(line))
                frames.put((name, args))
                if name == "end":
                    return
        except (OSError, EOFError):
            log.error("process 0 is gone: look at its log, and start all processes again")
            _end(0.0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        name, args = frames.get()
        if name == "end":
            device.wait()
            line.close()
            return
        if name not in (*CALLS, "warm_up"):
            raise ClusterError(f"process 0 asks for {name!r}: run the same version everywhere")
        getattr(device, name)(*args)


def pack(name: str, args: tuple[Any, ...]) -> bytes:
    """Lay a call out as bytes: JSON, with arrays told by dtype and shape, and their contents behind it."""
    blobs: list[bytes] = []

    def lay(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {"map": {key: lay(item) for key, item in value.items()}}
        if isinstance(value, np.ndarray):
            blobs.append(np.ascontiguousarray(value).tobytes())
            return {"array": [value.dtype.str, list(value.shape)]}
        return int(value) if isinstance(value, np.integer) else value

    head = json.dumps([name, [lay(arg) for arg in args]]).encode()
    return _frame(head, b"".join(blobs))


def unpack(head: bytes, blob: bytes) -> tuple[str, list[Any]]:
    """Return the name and arguments of a call."""
    at = 0

    def take(value: Any) -> Any:
        nonlocal at
        if not isinstance(value, dict):
            return value
        if "map" in value:
            return {key: take(item) for key, item in value["map"].items()}
        dtype, shape = np.dtype(value["array"][0]), tuple(value["array"][1])
        count = int(np.prod(shape, dtype=np.int64))
        out = np.frombuffer(blob, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
        return out

    name, args = json.loads(head)
    return name, [take(arg) for arg in args]


def _frame(head: bytes, blob: bytes) -> bytes:
    return struct.pack("<II", len(head), len(blob)) + head + blob


def _receive(line: socket.socket) -> tuple[bytes, bytes]:
    """Return the next frame's head and contents. Raises EOFError at the end of the connection."""
    head, blob = struct.unpack("<II", _exactly(line, 8))
    return _exactly(line, head), _exactly(line, blob)


def _exactly(line: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = line.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _end(after_s: float) -> None:
    """End the process without waiting for a device that waits for the lost one."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(LOST_EXIT)

    timer = threading.Timer(after_s, leave)
    timer.daemon = True
    timer.start()

"""A server in a process of its own, for tests: started on a free port, ended by its pid."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).parents[1]


@dataclass
class Server:
    """A running server: `port`, `process`, `log` (its stderr)."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 30) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def send(self, head: str, body: bytes = b"") -> socket.socket:
        """Open a connection and write a request; the head's lines are parted by newlines."""
        connection = self.connect()
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return connection

    def post(self, path: str, value: Any, **headers: str) -> socket.socket:
        """Open a connection and write a JSON request."""
        body = json.dumps(value).encode()
        lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
        return self.send("\n".join([*lines, *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]), body)

    def get(self, path: str) -> tuple[int, bytes]:
        with self.send(f"GET {path} HTTP/1.1\nhost: x\nconnection: close") as connection:
            return answer(connection)

    def stop(self, how: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(timeout)

    def lines(self) -> list[dict[str, Any]]:
        """Return the log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Read until the other side closes; return the status (0 for nothing) and everything after the head."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            data += chunk
    if not data.startswith(b"HTTP/1.1 "):
        return 0, data
    return int(data[9:12]), data.partition(b"\r\n\r\n")[2]


@contextlib.contextmanager
def started(command: list[str], port: int, log: Path, *, wait_s: float = 120) -> Iterator[Server]:
    """Run a server until the block ends; it listens when this returns."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    server = Server(process, port, log)
    try:
        until = time.monotonic() + wait_s
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"the server did not start: {log.read_text()[-3000:]}")
            with contextlib.suppress(OSError), server.connect(1):
                break
            time.sleep(0.05)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def fake(script: str, log: Path, **options: Any) -> contextlib.AbstractContextManager[Server]:
    """Run a server over `fake_engine`."""
    port = free_port()
    return started(["-m", "tests.fake_engine", script, str(port), json.dumps(options)], port, log)


def demo(log: Path, *arguments: str) -> contextlib.AbstractContextManager[Server]:
    """Run `qwen3-jax serve` on the checkpoint in the package."""
    port = free_port()
    return started(["-m", "qwen3_jax", "serve", "--port", str(port), *arguments], port, log, wait_s=300)

"""A server to break, in a process of its own, and clients: what scripts/soak_serve.py is made of.

A `Bench` holds the servers of a soak, each `qwen3-jax serve` on the embedded checkpoint in which the embedding of one
id that no text has is NaN. A server with a trigger is this file as a program: its engine raises once a file exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "qwen3_jax" / "demo"
POISON = 800  # an id of a padded row
ROWS, CACHE_TOKENS, WAITING = 16, 8192, 256


class Broken(AssertionError):
    """What must hold does not."""


def require(holds: object, told: str) -> None:
    if not holds:
        raise Broken(told)


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path, log: Path, *arguments: str, trigger: Path | None = None, limit_kib: int = 0):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.log = log
        serve = ["serve", str(folder), "--port", str(self.port), *arguments]
        command = [sys.executable, "-m", "qwen3_jax", *serve]
        if trigger is not None:
            command = [sys.executable, str(Path(__file__).resolve()), str(trigger), *serve]
        if limit_kib:  # no file may grow beyond this: as a full disk
            command = ["bash", "-c", f'ulimit -f {limit_kib}; exec "$0" "$@"', *command]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        out = subprocess.DEVNULL if limit_kib else log.open("wb")
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)

    async def ready(self, seconds: float = 600) -> None:
        """Wait until it answers."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            require(self.process.poll() is None, f"the server ended with {self.process.poll()}: {self.tail()}")
            with contextlib.suppress(OSError, TimeoutError):
                if (await self.ask("GET", "/health", seconds=5))[0] == 200:
                    return
            await asyncio.sleep(0.2)
        raise Broken(f"the server did not start within {seconds:.0f} s: {self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-400:] if self.log.exists() else ""

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.wait_for(asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24), 20)

    async def ask(self, method: str, path: str, body: Any = None, *, seconds: float = 120) -> tuple[int, bytes]:
        """Make one request on a connection of its own; status 0 when the server closed without an answer."""
        reader, writer = await self.connect()
        try:
            writer.write(head(method, path, body, close=True))
            data = await asyncio.wait_for(reader.read(-1), seconds)
        except ConnectionError:
            data = b""
        finally:
            writer.close()
        return int(data[9:12]) if data.startswith(b"HTTP/1.1 ") else 0, data.partition(b"\r\n\r\n")[2]

    async def complete(self, prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
        """Complete a prompt greedily; the answer must be 200."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} | more
        status, said = await self.ask("POST", "/v1/completions", body)
        require(status == 200, f"a completion was answered with {status}: {said[:200]!r}")
        return json.loads(said)

    async def metrics(self) -> dict[str, float]:
        """Return the sum over labels of each metric, without the prefix."""
        _, text = await self.ask("GET", "/metrics", seconds=30)
        found: dict[str, float] = {}
        for line in text.decode().splitlines():
            if line.startswith("qwen3:"):
                name, value = line.split("{")[0].split(" ")[0][6:], line.rsplit(" ", 1)[1]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    async def idle(self, seconds: float) -> float:
        """Wait until nothing runs or waits; return the seconds that took."""
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            now = await self.metrics()
            if not now["num_requests_running"] + now["num_requests_waiting"]:
                return time.monotonic() - began
            await asyncio.sleep(0.1)
        raise Broken(f"requests are still there after {seconds:.0f} s")

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_mb(self) -> float:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_s(self) -> float:
        """Return the CPU seconds that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def children(self) -> list[int]:
        """Return the processes that it has started."""
        found = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for file in found for pid in file.read_text().split()]

    async def ended(self, seconds: float) -> tuple[int, float]:
        """Wait for its end; return the exit code and the seconds."""
        began = time.monotonic()
        while self.process.poll() is None:
            require(time.monotonic() < began + seconds, f"the process is still there after {seconds:.0f} s")
            await asyncio.sleep(0.05)
        return self.process.returncode, time.monotonic() - began

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)


def head(method: str, path: str, body: Any = None, *, close: bool = False) -> bytes:
    """Write a request."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([*lines, *(["connection: close"] if close else []), "", ""]).encode() + data


def stream(tokens: int, prompt: str = "Once upon a time", **more: Any) -> bytes:
    """Write the request of a stream that goes on for so many tokens."""
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, **more}
    return head("POST", "/v1/completions", body, close=True)


class Streamed(NamedTuple):
    """What came of a stream."""

    text: str
    wait_s: float
    """From the headers, which come at once, to the first event."""
    silence_s: float
    """The longest between what came after that."""


async def streamed(server: Server, request: bytes, *, seconds: float = 120) -> Streamed:
    """Read a stream to its end."""
    reader, writer = await server.connect()
    try:
        writer.write(request)
        text, wait, longest, last = b"", None, 0.0, time.monotonic()
        while chunk := await asyncio.wait_for(reader.read(1 << 16), seconds):
            now = time.monotonic()
            if wait is not None:
                longest, last = max(longest, now - last), now
            elif b"data: " in text + chunk:
                wait, last = now - last if text else 0.0, now
            elif not text:
                last = now
            text += chunk
        return Streamed(text.decode(errors="replace"), wait or 0.0, longest)
    finally:
        writer.close()


def whole(text: str) -> bool:
    """Tell whether a stream has its end; what follows is the end of chunked encoding."""
    return "data: [DONE]" in text[-60:]


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(("red", "two", "sky", "why", "the", "and", "of", "a", "sun")) for _ in range(n))


class Bench:
    """The servers that the cases share, started when first needed."""

    def __init__(self, folder: Path, scale: float):
        self.folder, self.scale = folder, scale
        self.model = poisoned(folder / "demo")
        self.cache = folder / "cache"
        self.servers: list[Server] = []
        self._main: Server | None = None

    async def start(self, *arguments: str, **options: Any) -> Server:
        log = self.folder / f"server-{len(self.servers)}.log"
        sizes = ("--rows", str(ROWS), "--cache-tokens", str(CACHE_TOKENS), "--max-waiting", str(WAITING))
        cache = () if "--compile-cache" in arguments else ("--compile-cache", str(self.cache))
        server = Server(self.model, log, "--dtype", "float32", *sizes, *cache, *arguments, **options)
        self.servers.append(server)
        await server.ready()
        return server

    async def main(self) -> Server:
        if self._main is None or self._main.process.poll() is not None:
            self._main = await self.start()
            await self._main.complete("Warm", 4)
        return self._main


def poisoned(folder: Path) -> Path:
    """Copy the embedded checkpoint with NaN in the embedding of `POISON`; lm_head is the embeddings as they were."""
    shutil.copytree(DEMO, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    entry = header["model.embed_tokens.weight"]
    first, last = entry["data_offsets"]
    header["lm_head.weight"] = entry | {"data_offsets": [len(tensors), len(tensors) + last - first]}
    tensors += tensors[first:last]
    nan = {"BF16": b"\xc0\x7f", "F16": b"\x00\x7e", "F32": b"\x00\x00\xc0\x7f"}[entry["dtype"]]
    row = nan * entry["shape"][1]
    tensors[first + POISON * len(row) : first + (POISON + 1) * len(row)] = row
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
    return folder


def child(trigger: Path, arguments: list[str]) -> int:
    """Serve with an engine that raises as soon as a file exists."""
    from qwen3_jax import cli
    from qwen3_jax.engine.engine import Engine

    turn = Engine._turn

    def faulty(self: Engine) -> None:
        if trigger.exists():
            raise RuntimeError("injected")
        turn(self)

    Engine._turn = faulty
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(child(Path(sys.argv[1]), sys.argv[2:]))

"""Run the server in this process: a bound socket, uvicorn, signals, and an end that leaves nothing behind.

SIGTERM or SIGINT: no new connections, requests run on for `drain_s`, then they end with what they have
(finish_reason "abort"); a second signal ends them at once. If the engine fails, /health is 503 and the process ends
soon after with exit code `FAILED`.
"""

import asyncio
import contextlib
import logging
import logging.config
import os
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from qwen3_jax.server import logs
from qwen3_jax.server.logs import log
from qwen3_jax.server.options import ServerOptions
from qwen3_jax.server.protocol import bounded
from qwen3_jax.server.serving import Serving

OK, FAILED = 0, 1
GRACE_S = 2.0  # for aborted requests to send their last words, and for clients to see a failed engine's 503


class ListenError(ValueError):
    """An address that cannot be listened on, or TLS files that cannot be used."""


@dataclass(frozen=True)
class Tls:
    """Files of TLS, as uvicorn takes them."""

    keyfile: str | None = None
    certfile: str | None = None
    ca_certs: str | None = None
    ciphers: str | None = None

    def check(self) -> None:
        """Read the files.

        Raises:
            ListenError: one is missing or is not what it should be.
        """
        if self.certfile is None:
            if self.keyfile or self.ca_certs or self.ciphers:
                raise ListenError("TLS needs a certificate: give ssl_certfile too")
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certfile, self.keyfile, password="")
            if self.ca_certs is not None:
                context.load_verify_locations(self.ca_certs)
            if self.ciphers is not None:
                context.set_ciphers(self.ciphers)
        except OSError as error:  # ssl.SSLError among them
            files = ", ".join(filter(None, (self.certfile, self.keyfile, self.ca_certs, self.ciphers)))
            raise ListenError(f"TLS cannot be set up with {files}: {error}") from None


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; it listens when the server runs, so that nobody connects too early.

    Raises:
        ListenError: the address is taken, foreign or malformed.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ListenError(f"cannot listen on {host} port {port}: {error}") from None
    return found


def run(
    app: FastAPI,
    listener: socket.socket,
    options: ServerOptions,
    *,
    tls: Tls | None = None,
    log_level: str = "info",
) -> int:
    """Warm up and serve until a signal or the engine's failure; return the exit code. Call it on the main thread."""
    tls = tls or Tls()
    _raise_file_limit(options.max_connections)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=bounded(options),  # pyright: ignore[reportArgumentType]
        ws="none",
        lifespan="off",
        log_config=logs.config(log_level),
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=options.idle_s,  # pyright: ignore[reportArgumentType]
        timeout_graceful_shutdown=options.drain_s + GRACE_S,  # pyright: ignore[reportArgumentType]
        ssl_keyfile=tls.keyfile,
        ssl_certfile=tls.certfile,
        ssl_ca_certs=tls.ca_certs,
        ssl_ciphers=tls.ciphers,  # pyright: ignore[reportArgumentType]
    )
    config.load()
    app.state.serving.warm_up(lambda line: log(logging.INFO, line))
    server = _Server(config, app.state.serving)
    host, port = listener.getsockname()[:2]
    scheme = "https" if config.is_ssl else "http"
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    log(logging.INFO, "serving", address=address, models=list(app.state.serving.names), key=bool(options.api_keys))
    try:
        server.run([listener])
    finally:
        app.state.serving.close()
    return FAILED if app.state.serving.engine.failure is not None else OK


def end(engine: Any, *, timeout_s: float = 20) -> None:
    """Stop an engine; if its thread hangs, in a device that does not answer, end the process without it."""
    stopping = threading.Thread(target=engine.stop, daemon=True)
    stopping.start()
    stopping.join(timeout_s)
    if stopping.is_alive():
        log(logging.CRITICAL, "the engine does not stop: the process ends without it", seconds=timeout_s)
        sys.stderr.flush()
        os._exit(FAILED)


def _raise_file_limit(connections: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 512
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Server(uvicorn.Server):
    """uvicorn with an end of its own."""

    def __init__(self, config: uvicorn.Config, serving: Serving):
        super().__init__(config)
        self.serving = serving
        self._failed_at: float | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving; unlike uvicorn, end with an exit code and not by the signal itself."""
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second signal does not wait for requests."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Look after the engine, every 0.1 s."""
        failure = self.serving.engine.failure
        if failure is not None and self._failed_at is None:
            self._failed_at = time.monotonic()
            log(logging.CRITICAL, "the engine has failed", error=f"{type(failure).__name__}: {failure}")
        if self._failed_at is not None and time.monotonic() > self._failed_at + GRACE_S:
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests end, for a while, then end them."""
        self.serving.draining = True
        drain_s = self.serving.options.drain_s
        log(logging.INFO, "shutting down", requests=len(self.serving.runs), drain_s=drain_s)
        abort = asyncio.create_task(self._abort(drain_s))
        try:
            await super().shutdown(sockets)
        finally:
            abort.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await abort
        log(logging.INFO, "stopped")

    async def _abort(self, drain_s: float) -> None:
        until = time.monotonic() + drain_s
        while time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(0.05)
        if self.serving.runs:
            log(logging.WARNING, "requests are aborted", requests=len(self.serving.runs))
        for under_way in list(self.serving.runs):
            under_way.cancel()

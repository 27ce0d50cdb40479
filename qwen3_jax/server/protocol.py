"""HTTP/1.1 on a socket with bounds that uvicorn does not have.

A head must be complete within `head_s` of its first byte, or of the connection's opening, and within
`max_header_bytes`; a body within `body_s`; what was answered must be read within `write_s`. Who does not keep to it is
cut, so that an open socket always costs little and not for long. Errors of the wire are the error object too.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from qwen3_jax.server import errors
from qwen3_jax.server.limits import ABORT
from qwen3_jax.server.options import ServerOptions


def bounded(options: ServerOptions) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol class with these bounds."""
    return type("BoundedProtocol", (BoundedProtocol,), {"options": options})


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    options: ServerOptions

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes: int | None = 0  # None while no head is being read
        self._refusal: tuple[int, str] | None = None

    # ---- the socket

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if len(self.connections) >= self.options.max_connections:
            self.transport = transport
            transport.abort()
            return
        super().connection_made(transport)
        self._start(self.options.head_s, "the head of the request did not arrive")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        if self.flow is not None:  # else it was refused in `connection_made`
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.parser is None:
            return
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._start(self.options.head_s, "the head of the request did not arrive")
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self.options.max_header_bytes + 2**18:  # a read may hold a body's beginning as well
                self._too_large()
                return
        super().data_received(data)

    # ---- the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[ABORT] = self.transport.abort  # pyright: ignore[reportGeneralTypeIssues]
        self._length = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)
        if len(self.headers) > self.options.max_headers:
            self._refusal = (431, f"the request has more than {self.options.max_headers} headers")
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._start(self.options.body_s + 1, "the body of the request did not arrive")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        self._stop()
        super().on_message_complete()

    def _count(self, more: int) -> None:
        self._length += more
        if self._length > self.options.max_header_bytes:
            self._refusal = (431, f"the head of the request is longer than {self.options.max_header_bytes} bytes")
            raise ValueError("head too long")

    # ---- the answer

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_reading()

    def shutdown(self) -> None:
        super().shutdown()
        self._expect_reading()

    def _expect_reading(self) -> None:
        """Drop the connection if its client has not read the answer by then: a closing transport waits for ever."""
        if self.transport.get_write_buffer_size():
            cycle = self.cycle
            self.loop.call_later(self.options.write_s, lambda: self._drop_unread(cycle))

    def _drop_unread(self, cycle: Any) -> None:
        if self.cycle is cycle and self.transport.get_write_buffer_size():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        status, message = self._refusal or (400, "the request is not HTTP/1.1")
        self._answer(status, message)

    def _too_large(self) -> None:
        self._answer(431, f"the head of the request is longer than {self.options.max_header_bytes} bytes")

    def _answer(self, status: int, message: str) -> None:
        """Write an error, unless an answer is under way, and close."""
        self._stop()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True  # whoever works on it need not go on
                self.cycle.message_event.set()
            content = json.dumps(errors.body(status, message)).encode()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(content)
            self.transport.write(STATUS_LINE[status] + head + content)
            self.transport.close()
            self.loop.call_later(self.options.write_s, self.transport.abort)
        else:
            self.transport.abort()

    # ---- time

    def _start(self, seconds: float, what: str) -> None:
        self._stop()
        self._timer = self.loop.call_later(seconds, self._late, f"{what} within {seconds:g} s")

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self, message: str) -> None:
        self._timer = None
        busy = self.cycle is not None and not self.cycle.response_complete
        if self._head_bytes is None and busy:
            self._answer(408, message)
        elif self._head_bytes is None or busy:  # answered before its body ended, or a pipelined head that stalls
            self.transport.abort()
        elif self._head_bytes:
            self._answer(408, message)
        else:
            self.transport.close()  # nothing was asked: nothing to answer

"""Bounds on requests: how many at once, how long a body, how slow a client; pure ASGI.

What happens below HTTP (heads, idle sockets) is bounded in `protocol`.
"""

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3_jax.server.errors import ApiError, answer
from qwen3_jax.server.options import ServerOptions

FREE = ("/health",)  # answered however many requests are at work
ABORT = "qwen3_jax.abort"  # key of the scope under which `protocol` puts a function that drops the connection


class ClientGone(Exception):
    """Nobody is there to be answered."""


@dataclass
class _Body:
    """What has arrived of a body."""

    length: int = 0
    whole: bool = False


class Limits:
    """Refuse what is too much and give up on who is too slow."""

    def __init__(self, app: ASGIApp, *, options: ServerOptions):
        self.app = app
        self.options = options
        self.working = 0
        self.held = 0  # bytes of the bodies of those at work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in FREE:
            await self.app(scope, receive, send)
            return
        error = self._refusal(scope)
        if error is not None:
            await answer(error)(scope, receive, send)
            return
        self.working += 1
        body = _Body()
        try:
            await self.app(scope, self._bounded(receive, body), self._patient(scope, send))
        finally:
            self.working -= 1
            self.held -= body.length

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self.working >= self.options.max_requests:
            return ApiError(503, f"the server is at work on {self.working} requests: try again later")
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value[:20]) > self.options.max_body_bytes):
                return self._too_long()
        return None

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self.options.max_body_bytes} bytes")

    def _bounded(self, receive: Receive, body: "_Body") -> Receive:
        """Count the bytes of the body and the seconds until all of it is there."""
        clock = asyncio.get_running_loop().time
        until = clock() + self.options.body_s

        async def bounded() -> Message:
            if body.whole:
                return await receive()  # waits for the client to leave
            try:
                async with asyncio.timeout(max(0.0, until - clock())):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {self.options.body_s:g} s", headers={"connection": "close"}
                ) from None
            if message["type"] != "http.request":
                return message
            more = len(message.get("body", b""))
            body.length += more
            self.held += more
            body.whole = not message.get("more_body", False)
            if body.length > self.options.max_body_bytes:
                raise self._too_long()
            if self.held > self.options.max_held_bytes:
                raise ApiError(503, f"requests of {self.held} bytes are at work: try again later")
            return message

        return bounded

    def _patient(self, scope: Scope, send: Send) -> Send:
        """Drop a client that leaves what it was sent unread."""

        async def patient(message: Message) -> None:
            try:
                async with asyncio.timeout(self.options.write_s):
                    await send(message)
            except TimeoutError:
                scope.get(ABORT, lambda: None)()
                raise ClientGone from None

        return patient

"""Bounds on requests: how many at once, how long a body, how slow a client; pure ASGI.

What happens below HTTP (heads, idle sockets) is bounded in `protocol`.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3_jax.server.errors import ApiError, answer
from qwen3_jax.server.options import ServerOptions

FREE = ("/health",)  # answered however many requests are at work
ABORT = "qwen3_jax.abort"  # key of the scope under which `protocol` puts a function that drops the connection


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Limits:
    """Refuse what is too much and give up on who is too slow."""

    def __init__(self, app: ASGIApp, *, options: ServerOptions):
        self.app = app
        self.options = options
        self.working = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in FREE:
            await self.app(scope, receive, send)
            return
        error = self._refusal(scope)
        if error is not None:
            await answer(error)(scope, receive, send)
            return
        self.working += 1
        try:
            await self.app(scope, self._bounded(receive), self._patient(scope, send))
        finally:
            self.working -= 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self.working >= self.options.max_requests:
            return ApiError(503, f"the server is at work on {self.working} requests: try again later")
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value[:20]) > self.options.max_body_bytes):
                return self._too_long()
        return None

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self.options.max_body_bytes} bytes")

    def _bounded(self, receive: Receive) -> Receive:
        """Count the bytes of the body and the seconds until all of it is there."""
        clock = asyncio.get_running_loop().time
        until = clock() + self.options.body_s
        length, whole = 0, False

        async def bounded() -> Message:
            nonlocal length, whole
            if whole:
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
            length += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if length > self.options.max_body_bytes:
                raise self._too_long()
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

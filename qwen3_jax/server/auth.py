"""The API key: one door for everything, /health excepted."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from qwen3_jax.server.errors import ApiError, answer

OPEN = ("/health",)
PAGE = ("/",)  # a browser that opens the page can ask its user only for a Basic password


class Auth:
    """Let through who shows a key; pure ASGI.

    `Authorization: Bearer KEY`; for the chat page also Basic with the key as password. Digests of equal length are
    compared in constant time, all of them, so that neither time nor the number of keys tells anything.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]):
        self.app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] in OPEN or self._shown(scope):
            await self.app(scope, receive, send)
            return
        page = scope["path"] in PAGE
        error = ApiError(
            401,
            "no valid API key: send the header `Authorization: Bearer KEY`",
            headers={"www-authenticate": 'Basic realm="qwen3-jax", charset="UTF-8"' if page else "Bearer"},
        )
        await answer(error)(scope, receive, send)

    def _shown(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        if scheme.lower() == b"basic" and scope["path"] in PAGE:
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != b"bearer":
            return False
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self._digests])  # a list: no early end


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

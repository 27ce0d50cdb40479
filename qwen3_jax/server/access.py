"""The outermost layer: request ids, one log line per request, counters, and the answer to a fault of ours."""

import logging
import re
import secrets
import time
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3_jax.server import errors
from qwen3_jax.server.limits import ClientGone
from qwen3_jax.server.logs import log

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class HttpObserver(Protocol):
    """Hears of every answer; `server.metrics` counts them."""

    def http(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Hear of one answer. `route` is the path's pattern, "unmatched" without one; status 499: the client left."""
        ...


class Access:
    """Name, time, log and count requests; pure ASGI.

    `scope["state"]["request_id"]` is the client's `X-Request-Id` or a new one; every answer carries it. What a route
    puts into `scope["state"]["log"]`, a dict, goes into the request's log line.
    """

    def __init__(self, app: ASGIApp, *, observer: HttpObserver | None = None):
        self.app = app
        self.observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = _given_id(scope) or secrets.token_hex(16)
        said: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, log=said)
        status, complete = 0, False

        async def named(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, named)
        except ClientGone:
            status = 499
        except Exception:
            log(logging.ERROR, "the server failed at a request", request_id=request_id)
            logging.getLogger("qwen3_jax.server").exception("%s", request_id)
            if not status:
                message = f"the server failed at this request; its log names it {request_id}"
                await errors.answer(errors.ApiError(500, message))(scope, receive, named)
            elif not complete and (abort := scope.get("qwen3_jax.abort")):
                abort()
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "unmatched")
            if self.observer is not None:
                self.observer.http(method=_method(scope), route=route, status=status, seconds=seconds)
            quiet = route in ("/health", "/metrics", "/ping") and status < 400
            log(
                logging.DEBUG if quiet else logging.INFO,
                "request",
                request_id=request_id,
                method=_method(scope),
                path=errors.clip(scope["path"], 200),
                status=status,
                seconds=round(seconds, 4),
                client=(scope.get("client") or ("", 0))[0],
                **said,
            )


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            return text if REQUEST_ID.fullmatch(text) else None
    return None


def _method(scope: Scope) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
    return scope["method"] if scope["method"] in known else "other"

"""Call an ASGI application without a socket."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any


@dataclass
class Answer:
    """What came back: `started` is False if nothing did."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """Return the error, having checked that it is the error object."""
        value = self.json()
        assert value.keys() == {"error"}
        assert value["error"].keys() == {"message", "type", "param", "code"}
        assert value["error"]["code"] == self.status
        assert isinstance(value["error"]["message"], str)
        assert len(self.body) < 20_000
        return value["error"]

    def events(self) -> list[Any]:
        """Return the events of a stream, having checked that it ends with [DONE]."""
        parts = self.body.decode().split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""], parts[-3:]
        assert all(part.startswith("data: {") for part in parts[:-2])
        return [json.loads(part[6:]) for part in parts[:-2]]


async def call(app: Any, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
    """Make one request and wait for its answer; the client stays."""
    headers = {"content-type": "application/json"} | (headers or {})
    sent, gone, messages = False, asyncio.Event(), []
    path, _, query = path.partition("?")

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
        "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    start = messages[0]
    content = b"".join(m.get("body", b"") for m in messages[1:])
    return Answer(start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, content)


def request(app: Any, method: str, path: str, value: Any = None, **headers: str) -> Answer:
    """Make one request with a JSON body, in an event loop of its own."""
    body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
    named = {key.replace("_", "-"): text for key, text in headers.items()}
    return asyncio.run(asyncio.wait_for(call(app, method, path, body, named), 30))

"""One error object for everything that can go wrong: {"error": {"message", "type", "param", "code"}}.

Any `ValueError` of this package that a route lets through is the client's (400), unless `STATUS` says otherwise;
anything else is ours (500), logged with its traceback and answered without it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from qwen3_jax.engine.updates import EngineStopped, Overloaded

MAX_ENTRIES = 10  # of a list of errors
MAX_VALUE = 200  # characters per entry
MAX_MESSAGE = 2400

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
STATUS: dict[type[Exception], int] = {Overloaded: 503, EngineStopped: 503}  # of the engine's; the others are 400


class ApiError(ValueError):
    """An answer that is an error; `param` is the field of the request it is about."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.headers = status, param, dict(headers or {})


def refuse(param: str | None, message: str) -> ApiError:
    """Return the 400 about one field."""
    return ApiError(400, message, param=param)


def body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the error object."""
    kind = TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": clip(message, MAX_MESSAGE), "type": kind, "param": param, "code": status}}


def answer(error: ApiError) -> JSONResponse:
    """Return the response."""
    headers = {"retry-after": "1"} | error.headers if error.status == 503 else error.headers
    return JSONResponse(body(error.status, str(error), error.param), status_code=error.status, headers=headers)


def from_exception(error: Exception) -> ApiError | None:
    """Turn a typed error of this package into its answer; None for a fault of the server."""
    if isinstance(error, ApiError):
        return error
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            return ApiError(status, str(error))
    if isinstance(error, ValueError) and type(error).__module__.startswith("qwen3_jax."):
        return ApiError(400, str(error), param=_leading_name(str(error)))
    return None


def from_validation(error: ValidationError) -> ApiError:
    """Say what is wrong with a body, in at most `MAX_ENTRIES` entries."""
    found = error.errors(include_url=False, include_context=False)
    entries = [_entry(e["loc"], e["msg"], e.get("input")) for e in found[:MAX_ENTRIES]]
    if len(found) > MAX_ENTRIES:
        entries.append(f"and {len(found) - MAX_ENTRIES} more")
    first = found[0]["loc"] if found else ()
    return ApiError(400, "; ".join(entries), param=clip(str(first[0]), 64) if first else _leading_name(entries[0]))


def clip(text: str, most: int) -> str:
    """Cut a text, and say so."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= most else text[: most - 1] + "…"


def _entry(place: Sequence[int | str], message: str, value: Any) -> str:
    where = ".".join(clip(str(step), 40) for step in place[:6])
    given = "" if isinstance(value, dict | list) or "required" in message else f", got {_brief(value)}"
    said = message.removeprefix("Value error, ") + given
    return clip(f"{where}: {said}" if where else said, MAX_VALUE)


def _brief(value: Any) -> str:
    """Print a value without printing all of it first."""
    if isinstance(value, str):
        return repr(value[:60] + "…") if len(value) > 60 else repr(value)
    if isinstance(value, int) and value.bit_length() > 256:
        return "an integer of more than 256 bits"
    return clip(repr(value), 80)


def _leading_name(message: str) -> str | None:
    """Read the field out of a message of the form `field is value: ...`."""
    found = re.match(r"([a-z][a-z_]{1,40}) (?:is|has|names|needs|must|token|of) ", message)
    return found[1] if found else None

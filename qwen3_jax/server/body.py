"""The body of a request: JSON within bounds, then a model of `schema`."""

import json
import re
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from qwen3_jax.server.errors import ApiError, clip, from_validation
from qwen3_jax.server.options import ServerOptions

Model = TypeVar("Model", bound=BaseModel)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


async def read(request: Request, model: type[Model]) -> Model:
    """Read and check the body of a request.

    Raises:
        ApiError: another media type than JSON, not JSON, too deep, too many values, fields missing or out of range.
    """
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media != "application/json":
        # Also what keeps a foreign web page from calling a server without a key: the browser asks first.
        raise ApiError(400, f"the content type is {clip(media, 80)!r}: must be application/json")
    options: ServerOptions = request.app.state.serving.options
    value = parse(await request.body(), options)
    if options.log_prompts:
        request.state.log["request"] = value
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}: must be an object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None


def parse(data: bytes, options: ServerOptions) -> Any:
    """Parse JSON, refusing NaN and Infinity, bodies of too many values, deep nesting, and halves of surrogate pairs."""
    values = data.count(b",") + data.count(b"[") + data.count(b"{")  # counts those inside of strings too
    if values > options.max_json_values:
        raise ApiError(400, f"the body has about {values} values: at most {options.max_json_values} are allowed")
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_constant)
    except RecursionError:
        raise _too_deep(options) from None
    except ApiError:
        raise
    except ValueError as error:  # malformed JSON, not UTF-8, or an integer of thousands of digits
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else clip(str(error), 120)
        raise ApiError(400, f"the body is not JSON: {reason}") from None
    if data.count(b"[") + data.count(b"{") > options.max_json_depth:
        _check_depth(value, options)
    if _SURROGATE.search(text):  # a pair is a character; a half could be said back to nobody
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(error.object[error.start]):X}"
            raise ApiError(400, f"the body holds half of a surrogate pair, {half}, which is no character") from None
    return value


def _check_depth(value: Any, options: ServerOptions) -> None:
    level = [value]
    for _ in range(options.max_json_depth):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return
    raise _too_deep(options)


def _children(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [v for v in values if isinstance(v, dict | list)]


def _too_deep(options: ServerOptions) -> ApiError:
    return ApiError(400, f"the body is nested too deeply: at most {options.max_json_depth} levels are allowed")


def _constant(name: str) -> Any:
    raise ApiError(400, f"the body has the value {name}, which is not JSON")

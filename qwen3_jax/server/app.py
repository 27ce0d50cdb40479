"""The application: routes, layers around them, and errors turned into answers.

A module of routes has a `router`; a handler takes the `fastapi.Request`, reads its body with `body.read`, finds the
engine through `serving.serving(http)`, and raises `errors.ApiError` or any `ValueError` of this package to refuse.
"""

from typing import Any, Protocol

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from qwen3_jax.server import chat, completions, embeddings, errors, page, responses, status, tokenize
from qwen3_jax.server.access import Access, HttpObserver
from qwen3_jax.server.auth import Auth
from qwen3_jax.server.limits import Limits
from qwen3_jax.server.options import ServerOptions
from qwen3_jax.server.serving import Serving


class Metrics(HttpObserver, Protocol):
    """What `server.metrics.Metrics` is to the application: a counter of answers with a route of its own."""

    @property
    def router(self) -> APIRouter:
        """The route /metrics."""
        ...


def create_app(engine: Any, options: ServerOptions | None = None, *, metrics: Metrics | None = None) -> FastAPI:
    """Put an engine behind HTTP.

    Args:
        engine: started; `engine.Engine` or anything with its `submit`, `requests`, `model`, `load`, `failure`.
        options: what is allowed.
        metrics: counts HTTP answers and serves /metrics; None for neither.
    """
    options = options or ServerOptions()
    app = FastAPI(title="qwen3-jax", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.serving = Serving(engine, options)
    for module in (status, tokenize, chat, completions, responses, embeddings, page):
        app.include_router(module.router)
    if metrics is not None:
        app.include_router(metrics.router)

    # Added last is outermost.
    app.add_middleware(Limits, options=options)  # pyright: ignore[reportArgumentType]
    app.add_middleware(Auth, keys=options.api_keys)  # pyright: ignore[reportArgumentType]
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(Access, observer=metrics)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(ValueError, _value)
    return app


async def _http(http: Request, error: Exception) -> JSONResponse:
    """Answer what Starlette refuses: no such route, no such method."""
    assert isinstance(error, HTTPException)
    path = errors.clip(http.url.path, 100)
    said = {404: f"there is no {path} here", 405: f"{path} does not take {errors.clip(http.method, 20)}"}
    message = said.get(error.status_code, str(error.detail))
    return errors.answer(errors.ApiError(error.status_code, message, headers=error.headers))


async def _validation(_: Request, error: Exception) -> JSONResponse:
    return errors.answer(errors.ApiError(400, errors.clip(str(error), errors.MAX_VALUE)))


async def _value(_: Request, error: Exception) -> JSONResponse:
    known = errors.from_exception(error)
    if known is None:
        raise error
    return errors.answer(known)

"""What is served and how it does: /health, /ping, /version, /load, /v1/models."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

import qwen3_jax
from qwen3_jax.server import errors
from qwen3_jax.server.serving import Serving, serving

router = APIRouter()


@router.api_route("/health", methods=["GET", "HEAD"])
@router.api_route("/ping", methods=["GET", "POST"])
async def health(http: Request) -> Response:
    """Answer 200 and nothing, or 503 when the engine cannot work."""
    state = serving(http)
    if state.engine.failure is not None:
        return JSONResponse(errors.body(503, "the engine has failed"), status_code=503)
    if state.draining:
        return JSONResponse(errors.body(503, "the server is shutting down"), status_code=503)
    return Response(status_code=200)


@router.get("/version")
async def version() -> dict[str, str]:
    """Answer with the version of this package."""
    return {"version": qwen3_jax.__version__}


@router.get("/load")
async def load(http: Request) -> dict[str, Any]:
    """Answer with how busy the engine is."""
    now = serving(http).engine.load()
    return {
        "server_load": now.running + now.waiting,
        "running": now.running,
        "waiting": now.waiting,
        "waiting_tokens": now.waiting_tokens,
        "pages_used": now.pages_used,
        "pages_total": now.pages_total,
    }


@router.get("/v1/models")
async def models(http: Request) -> dict[str, Any]:
    """List the model under each of its names."""
    state = serving(http)
    return {"object": "list", "data": [_card(state, name) for name in state.names]}


@router.get("/v1/models/{name:path}")
async def model(http: Request, name: str) -> dict[str, Any]:
    """Describe the model."""
    state = serving(http)
    return _card(state, state.check_model(name))


def _card(state: Serving, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "qwen3-jax",
        "root": state.model.name,
        "parent": None,
        "max_model_len": state.context,
        "permission": [],
    }

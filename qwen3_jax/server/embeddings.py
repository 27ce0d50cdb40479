"""POST /v1/embeddings, /v1/rerank and /v1/score: what a model makes of whole texts, without generating.

texts → ids → parts of a few rows (`pooling`) → the engine's thread, one part between two of its steps → the answer.

An embedding model, see `pooling.embeds`, scores a query and a document by the cosine of their vectors. Any other judges
them as Qwen3-Reranker does, by the token "yes" against "no".
"""

import asyncio
import base64
import functools
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import jax
import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from qwen3_jax import pooling
from qwen3_jax.engine.updates import RequestStats
from qwen3_jax.pooling import QUERY_TASK
from qwen3_jax.server import shapes
from qwen3_jax.server.body import read
from qwen3_jax.server.errors import ApiError, refuse
from qwen3_jax.server.generation import watched
from qwen3_jax.server.schema import Body, IdLists, Ids, Texts, few
from qwen3_jax.server.serving import Serving, serving

router = APIRouter()

INPUTS = 2048  # texts of one request, as in the OpenAI API
UNSUPPORTED = {
    "truncate_prompt_tokens": "shorten the text",
    "messages": "give text",
    "softmax": "scores are as the models define them",
    "use_activation": "scores are as the models define them",
    "activation": "scores are as the models define them",
    "normalize": "vectors have length 1",
}


class EmbeddingsBody(Body):
    """POST /v1/embeddings: one text or several, as text or token ids."""

    REFUSED = UNSUPPORTED

    model: str | None = None
    input: str | Texts | Ids | IdLists
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)

    def inputs(self) -> list[str] | list[list[int]]:
        """Return the inputs as a list."""
        if isinstance(self.input, str):
            return [self.input]
        ids = [x for x in self.input if isinstance(x, int)]
        return [ids] if ids else self.input  # pyright: ignore[reportReturnType]


class Document(Body):
    text: str


class RerankBody(Body):
    """POST /v1/rerank: one query, many documents."""

    REFUSED = UNSUPPORTED

    model: str | None = None
    query: str
    documents: Annotated[list[str | Document], few(INPUTS)] = Field(min_length=1)
    top_n: int | None = Field(None, ge=0)
    return_documents: bool = True
    instruction: str | None = None

    def texts(self) -> list[str]:
        """Return the documents as text."""
        return [d if isinstance(d, str) else d.text for d in self.documents]


class ScoreBody(Body):
    """POST /v1/score: a query against many documents, or one against one, several times."""

    REFUSED = UNSUPPORTED

    model: str | None = None
    text_1: str | Texts
    text_2: str | Texts
    instruction: str | None = None

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        first, second = (1 if isinstance(t, str) else len(t) for t in (self.text_1, self.text_2))
        if not first or not 1 <= second <= INPUTS or first not in (1, second):
            raise ValueError(f"text_1 has {first} texts, text_2 has {second}: give 1 and n, or n and n, up to {INPUTS}")
        return self

    def pairs(self) -> list[tuple[str, str]]:
        """Return (query, document) of each score."""
        first, second = ([t] if isinstance(t, str) else t for t in (self.text_1, self.text_2))
        return list(zip(first * (len(second) // len(first)), second, strict=True))


@router.post("/v1/embeddings")
async def embeddings(http: Request) -> dict[str, Any]:
    """Answer with a unit vector for each input."""
    state, body = serving(http), await read(http, EmbeddingsBody)
    model, given = state.check_model(body.model), body.inputs()
    if not 1 <= len(given) <= INPUTS:
        raise refuse("input", f"input has {len(given)} texts: give 1 to {INPUTS}")
    most = state.model.config.hidden_size
    if body.dimensions is not None and body.dimensions > most:
        raise refuse("dimensions", f"dimensions is {body.dimensions}: the model has 1 to {most}")
    ids = await _ids(state, given)
    hidden = await watched(http, _pooled(http, "embed", ids))
    vectors = pooling.embeddings(hidden, body.dimensions)
    usage = _usage(http, ids)
    return {
        "id": shapes.new_id("embd", None),
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [
            {"object": "embedding", "index": i, "embedding": _written(vector, body.encoding_format)}
            for i, vector in enumerate(vectors)
        ],
        "usage": usage,
    }


@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(http: Request) -> dict[str, Any]:
    """Answer with the documents, the most relevant first."""
    state, body = serving(http), await read(http, RerankBody)
    model, texts = state.check_model(body.model), body.texts()
    scores, usage = await _scored(http, [(body.query, text) for text in texts], body.instruction)
    best = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n or None]
    return {
        "id": shapes.new_id("rerank", None),
        "model": model,
        "results": [
            {"index": i, "relevance_score": scores[i]}
            | ({"document": {"text": texts[i]}} if body.return_documents else {})
            for i in best
        ],
        "usage": usage,
    }


@router.post("/score")
@router.post("/v1/score")
async def score(http: Request) -> dict[str, Any]:
    """Answer with the relevance of each pair."""
    state, body = serving(http), await read(http, ScoreBody)
    model = state.check_model(body.model)
    scores, usage = await _scored(http, body.pairs(), body.instruction)
    return {
        "id": shapes.new_id("score", None),
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"object": "score", "index": i, "score": s} for i, s in enumerate(scores)],
        "usage": usage,
    }


async def _scored(
    http: Request, pairs: list[tuple[str, str]], instruction: str | None
) -> tuple[list[float], dict[str, int]]:
    """Return the score of each (query, document), and the usage."""
    state, task = serving(http), instruction or QUERY_TASK
    tokenizer = state.model.tokenizer
    if not pooling.embeds(state.model):
        yes, no = pooling.verdicts(tokenizer)
        ids = []
        for query, document in pairs:
            write = functools.partial(
                pooling.judged, tokenizer, query, document[: state.most_characters], context=state.context, task=task
            )
            ids.append(await state.off_loop(write, size=len(query) + len(document)))
        found = await watched(http, _pooled(http, "score", ids, yes=yes, no=no))
        return [float(s) for s in found], _usage(http, ids)
    queries = list(dict.fromkeys(query for query, _ in pairs))
    ids = await _ids(state, [*(pooling.query_text(q, task) for q in queries), *(document for _, document in pairs)])
    vectors = pooling.embeddings(await watched(http, _pooled(http, "embed", ids)))
    place = {query: i for i, query in enumerate(queries)}
    asked = vectors[[place[query] for query, _ in pairs]]
    return [float(s) for s in np.sum(asked * vectors[len(queries) :], axis=-1)], _usage(http, ids)


async def _ids(state: Serving, given: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
    """Turn inputs into token ids, with what the model's tokenizer adds to texts."""
    ids = []
    for i, one in enumerate(given):
        if isinstance(one, str):
            one = await state.encode(one, add_special_tokens=True, param="input")
        else:
            state.check_ids(one, "input")
        if not 0 < len(one) <= state.context:
            raise refuse("input", f"input {i} has {len(one)} tokens: give 1 to {state.context}, the model's context")
        ids.append(one)
    return ids


async def _pooled(http: Request, name: str, prompts: list[list[int]], **ids: int) -> np.ndarray:
    """Run prompts by a program of the pooler, part by part, so that streams go on in between."""
    state = serving(http)
    if state.draining:
        raise ApiError(503, "the server is shutting down", headers={"connection": "close"})
    if jax.process_count() > 1:
        raise ApiError(501, "embeddings and scores are not served from several processes: start a server of one")
    began = time.perf_counter()
    out: list[Any] = [None] * len(prompts)
    for part in state.pooler.parts(prompts):
        rows = await state.pooled(name, [prompts[i] for i in part], **ids)
        for i, row in zip(part, rows, strict=True):
            out[i] = row
    if (observer := getattr(state.engine, "observer", None)) is not None:
        seconds = time.perf_counter() - began
        tokens = sum(map(len, prompts))
        stats = RequestStats(tokens, 0, 0, 0, 0.0, seconds, 0.0, None, seconds, 0, 0)
        # Told before the answer: whoever has the answer finds it counted.
        await asyncio.wrap_future(state.engine.call(functools.partial(observer.finished, stats, finish_reason="stop")))
    return np.stack(out)


def _usage(http: Request, ids: list[list[int]]) -> dict[str, int]:
    tokens = sum(map(len, ids))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    http.state.log.update(usage | {"inputs": len(ids)})
    return usage


def _written(vector: np.ndarray, form: str) -> list[float] | str:
    if form == "float":
        return [float(x) for x in vector]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()

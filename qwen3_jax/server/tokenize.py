"""POST /tokenize and /detokenize: the model's tokenizer and chat template by themselves."""

import functools
from typing import Any

from fastapi import APIRouter, Request

from qwen3_jax.server.body import read
from qwen3_jax.server.conversation import prompt_ids
from qwen3_jax.server.schema import DetokenizeBody, TokenizeBody
from qwen3_jax.server.serving import serving

router = APIRouter()


@router.post("/tokenize")
async def tokenize(http: Request) -> dict[str, Any]:
    """Answer with the ids of a prompt or a conversation."""
    state = serving(http)
    body = await read(http, TokenizeBody)
    state.check_model(body.model)
    if body.prompt is not None:
        ids = await state.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        ids = await prompt_ids(state, body.messages or [], body)
    said: dict[str, Any] = {"count": len(ids), "max_model_len": state.context, "tokens": ids}
    if body.return_token_strs:
        texts = [state.model.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
        said["token_strs"] = texts
    return said


@router.post("/detokenize")
async def detokenize(http: Request) -> dict[str, Any]:
    """Answer with the text of ids."""
    state = serving(http)
    body = await read(http, DetokenizeBody)
    state.check_model(body.model)
    state.check_ids(body.tokens, "tokens")
    decode = functools.partial(state.model.tokenizer.decode, skip_special_tokens=body.skip_special_tokens)
    text = await state.off_loop(decode, body.tokens, size=len(body.tokens))
    return {"prompt": text}

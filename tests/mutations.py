"""Requests gone wrong: valid ones, changed at random."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{\"a\": 1}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "12"},
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "strict": True, "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", None]}}, "required": ["a"],
}}}  # fmt: skip
SAMPLING = {
    "model": "demo", "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "seed": 3,
    "frequency_penalty": 0.5, "repetition_penalty": 1.1, "n": 2, "logit_bias": {"5": 1.5}, "stop": ["x", "yy"],
    "stop_token_ids": [7], "min_tokens": 1, "ignore_eos": False, "include_stop_str_in_output": True, "priority": 1,
    "cache_salt": "s", "request_id": "r", "truncate_prompt_tokens": 5, "return_token_ids": True,
    "return_tokens_as_token_ids": True, "thinking_token_budget": 2, "user": "u",
}  # fmt: skip
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 6} | SAMPLING),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 2,
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 6, "tools": [TOOL], "tool_choice": "required",
        "parallel_tool_calls": False, "chat_template_kwargs": {"enable_thinking": False}}),
    ("/v1/chat/completions", {"messages": MESSAGES[:2], "max_tokens": 6, "response_format": {"type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "array", "items": {"$ref": "#/$defs/a"},
        "$defs": {"a": {"type": "string", "pattern": "^a+$"}}}}}}),
    ("/v1/chat/completions", {"messages": MESSAGES[:2], "max_tokens": 6, "structured_outputs": {"regex": "[ab]{1,3}"}}),
    ("/v1/chat/completions", {"messages": MESSAGES[:2], "max_tokens": 6, "guided_grammar": 'root ::= "a" | "b"'}),
    ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 6, "echo": True, "logprobs": 1} | SAMPLING),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 6, "prompt_logprobs": 1}),
    ("/v1/completions", {"prompt": "one", "max_tokens": 6, "stream": True}),
    ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 0, "echo": True, "logprobs": 1, "stream": True}),
    ("/v1/chat/completions", {"messages": [*MESSAGES[:2], {"role": "assistant", "content": "So "}], "max_tokens": 6,
        "continue_final_message": True, "add_generation_prompt": False, "skip_special_tokens": False}),
    ("/v1/responses", {"input": [{"role": "user", "content": "hi"}, {"type": "function_call", "call_id": "1",
        "name": "look", "arguments": "{}"}, {"type": "function_call_output", "call_id": "1", "output": "x"}],
        "instructions": "i", "max_output_tokens": 6, "reasoning": {"effort": "low"}, "metadata": {"a": "b"},
        "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}}], "tool_choice": "auto"}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 6, "stream": True, "top_logprobs": 1,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}}),
    ("/tokenize", {"messages": MESSAGES, "tools": [TOOL], "return_token_strs": True}),
    ("/tokenize", {"prompt": "text", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]  # fmt: skip
POOLED: list[tuple[str, dict[str, Any]]] = [  # for a model that embeds
    ("/v1/embeddings", {"input": "text", "encoding_format": "float", "dimensions": 3, "user": "u"}),
    ("/v1/embeddings", {"input": ["one", "two"], "encoding_format": "base64", "model": "demo"}),
    ("/v1/embeddings", {"input": [[1, 2], [3]]}),
    ("/v1/rerank", {"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1, "return_documents": False}),
    ("/v1/score", {"text_1": "q", "text_2": ["a", "b"], "instruction": "find"}),
    ("/v1/score", {"text_1": ["q", "r"], "text_2": ["a", "b"]}),
]
NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 5e-324, 2**31, 2**63, -(2**63) - 1, 10**40, "", " ", "a", "0",
    "\0", "null", "\ud800", "\U0001f600" * 9, "x" * 5000, "{{ 7*7 }}", "{% for i in range(9999) %}{% endfor %}",
    "<|im_end|>", "../../etc/passwd", "http://127.0.0.1:1/",
    [], {}, [[]], [None], [0] * 300, ["a"] * 200, {"": {}}, {"a": [{}]},
    {"type": "text"}, {"$ref": "#"}, "auto", "none", "json_object", "(a+)+$", "[" * 50, 2048, 2047, 4096,
]  # fmt: skip
OTHER = [
    ("GET", "/v1/models"), ("GET", "/v1/models/x%00"), ("PUT", "/v1/chat/completions"), ("GET", "/%ff"), ("POST", "/"),
    ("PATCH", "/health"), ("GET", "/v1/responses/x"), ("POST", "/v1/responses/x/cancel"), ("OPTIONS", "/v1/models"),
    ("BREW", "/tokenize"),
]  # fmt: skip


def requests(
    seed: int, count: int, *, brief: bool = False, seeds: list[tuple[str, dict[str, Any]]] = SEEDS
) -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    """Yield (method, path, body, headers); `brief` ones do not ask for long answers."""
    rng = random.Random(seed)
    for _ in range(count):
        path, body = rng.choice(seeds)
        body = copy.deepcopy(body)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _change(rng, body)
        if brief and path.startswith("/v1"):
            for name in ("max_output_tokens",) if path == "/v1/responses" else ("max_tokens", "max_completion_tokens"):
                if body.get(name) is None or body[name] in (2048, 2047, 300):
                    body[name] = 5
        data = json.dumps(body).encode()
        headers: dict[str, str] = {}
        method = "POST"
        kind = rng.random()
        if kind < 0.08:
            data = _spoilt(rng, data)
        elif kind < 0.1:
            headers["content-type"] = rng.choice(("text/plain", "application/xml", "", "application/json; charset=x"))
        elif kind < 0.12:
            method, path = rng.choice(OTHER)
        elif kind < 0.14:
            headers["x-request-id"] = rng.choice(("a b", "x" * 500, "é", "ok"))
        yield method, path, data, headers


def _change(rng: random.Random, body: Any) -> None:
    """Change one place of a tree: replace, remove, add or wrap."""
    places: list[tuple[Any, Any]] = []
    stack = [body]
    while stack:
        here = stack.pop()
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        for key in keys[:40]:
            places.append((here, key))
            if isinstance(here[key], dict | list):
                stack.append(here[key])
    if not places:
        return
    here, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.6:
        here[key] = copy.deepcopy(rng.choice(NASTY))
    elif kind < 0.75:
        del here[key]
    elif kind < 0.85:
        value = copy.deepcopy(rng.choice(NASTY))
        if isinstance(here, dict):
            here[rng.choice(("", "type", "schema", "$ref", "n", "stream", "stop", "é\0"))] = value
        else:
            here.append(value)
    elif kind < 0.95:
        here[key] = rng.choice(([here[key]], {"a": here[key]}, str(here[key])))
    else:
        for _ in range(rng.choice((3, 70, 150))):
            here[key] = [here[key]]


def _spoilt(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.choice((b"NaN", b"Infinity", b"1e999", b"\xff", b"\\ud800", b'"')) + data[at:]
    if kind == 3:
        return data + rng.choice((b"}", b"x", b"\0", data))
    return data * 2

"""The request of /v1/responses as one of /v1/chat/completions."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from qwen3_jax.server.errors import clip, from_validation, refuse
from qwen3_jax.server.schema import ChatBody, Generating, ResponsesBody


def as_chat(body: ResponsesBody) -> ChatBody:
    """Translate a request: input items to messages, flat tools and formats to nested ones.

    Raises:
        ApiError: an item, a tool or a format that has no place in a conversation of text.
    """
    given = body.model_dump(by_alias=True, exclude_unset=True, include=set(Generating.model_fields))
    given |= {"messages": messages(body)}
    for name in ("chat_template", "chat_template_kwargs", "enable_thinking", "parallel_tool_calls"):
        given[name] = getattr(body, name)
    given["max_completion_tokens"] = body.max_output_tokens
    given["reasoning_effort"] = None if body.reasoning is None else body.reasoning.effort
    given["tools"] = [_tool(i, tool) for i, tool in enumerate(body.tools)] if body.tools else None
    given["tool_choice"] = _choice(body.tool_choice) if body.tools else None
    if body.text is not None and body.text.format is not None:
        given["response_format"] = _format(body.text.format)
    if body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ()):
        given |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    try:
        return ChatBody.model_validate(given)
    except ValidationError as error:
        raise from_validation(error) from None


def messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """Return instructions and input as messages; what the assistant did in one turn becomes one message."""
    out: list[dict[str, Any]] = []
    if body.instructions is not None:
        out.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*out, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        kind = item.get("type", "message")
        if kind == "message":
            role, content = item.get("role"), item.get("content")
            turn = _assistant(out) if role == "assistant" else None
            if turn is None or "content" in turn or "tool_calls" in turn:
                out.append(turn := {"role": role})
            turn["content"] = content
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            _turn(out)["reasoning_content"] = "".join(
                _text(f"input.{i}.content.{j}", part) for j, part in enumerate(parts if isinstance(parts, list) else [])
            )
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            _turn(out).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            out.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        else:
            known = "message, reasoning, function_call, function_call_output"
            raise refuse("input", f"input.{i} is of type {clip(repr(kind), 60)}: must be one of {known}")
    return out


def _assistant(out: list[dict[str, Any]]) -> dict[str, Any] | None:
    return out[-1] if out and out[-1]["role"] == "assistant" else None


def _turn(out: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant's turn under way, or begin one."""
    if (turn := _assistant(out)) is None:
        out.append(turn := {"role": "assistant"})
    return turn


def _text(place: str, part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise refuse("input", f"{place} has no text")
    return text


def _tool(i: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        shown = clip(repr(tool.get("type")), 60)
        raise refuse("tools", f"tools.{i} is of type {shown}: only functions can be called")
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {key: tool[key] for key in known if tool.get(key) is not None}}


def _choice(choice: str | Mapping[str, Any] | None) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(form: Mapping[str, Any]) -> dict[str, Any]:
    if form.get("type") != "json_schema":
        return {"type": form.get("type")}
    return {"type": "json_schema", "json_schema": {key: form[key] for key in form if key != "type"}}

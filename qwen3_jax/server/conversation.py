"""Messages → prompt ids, by the model's chat template; what a request may say to the template, and what not."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_jax.server.errors import clip, refuse
from qwen3_jax.server.schema import Rendering
from qwen3_jax.server.serving import INLINE, Serving
from qwen3_jax.text.template import ChatTemplate, TemplateError

MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content")
TEXT_PARTS = ("text", "input_text", "output_text")
# Names that a caller's variables must not take: arguments of rendering and tokenizing, and what templates call.
RESERVED = re.compile(
    r"messages|tools|documents|add_generation_prompt|continue_final_message|chat_template|conversation|enable_thinking"
    r"|tokeniz\w*|return_\w*|padding|truncation|max_length|\w+_tokens?|additional_special_tokens|raise_exception"
    r"|strftime_now|range|dict|lipsum|cycler|joiner|namespace|loop|self|super|varargs|kwargs|caller|_.*"
)


async def prompt_ids(
    state: Serving,
    messages: Sequence[Mapping[str, Any]],
    body: Rendering,
    *,
    enable_thinking: bool | None = None,
) -> list[int]:
    """Render a conversation as a body wants it and turn it into ids, off the event loop if it is long.

    Raises:
        ApiError: content that is not text, a template in the request, too long for the context, or a final message
            that cannot be continued.
        TemplateError: no template, or messages that it cannot render.
    """
    variables = body.chat_template_kwargs or {}
    source = body.chat_template or variables.get("chat_template")
    if source and not state.options.trust_request_chat_template:
        raise refuse("chat_template", "chat_template is refused: this server runs the model's own template only")
    switch = variables.get("enable_thinking") if enable_thinking is None else enable_thinking
    given = {k: v for k, v in variables.items() if k.isidentifier() and not RESERVED.fullmatch(k)}
    parts = sum(len(m["content"]) for m in messages if isinstance(m.get("content"), list))
    if len(messages) + parts > state.context:  # every message has tokens of its own
        raise refuse(
            "messages", f"messages are {len(messages)}, of {parts} parts: the context is {state.context} tokens"
        )
    turns = [message(i, m) for i, m in enumerate(messages)]
    if open_ended := bool(body.continue_final_message):
        _check_open(turns)
    tools = None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools]
    size = sum(len(str(turn.get("content", ""))) + len(str(turn.get("reasoning_content", ""))) for turn in turns)
    size += 0 if not tools else len(str(tools))
    if size > state.most_characters:
        most = f"the {state.context} tokens of the context hold fewer"
        raise refuse("messages", f"messages have {size} characters: {most}")
    render = functools.partial(
        _render,
        state.model.template,
        source,
        turns,
        tools,
        add_generation_prompt=not open_ended if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=open_ended,
        enable_thinking=switch,
        **given,
    )
    return await state.encode(await state.off_loop(render, size=INLINE + 1 if given else size), param="messages")


def _render(
    own: ChatTemplate | None,
    source: Any,
    turns: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    **variables: Any,
) -> str:
    if source is not None and not isinstance(source, str):
        raise refuse("chat_template", "chat_template must be text")
    template = ChatTemplate(source) if source else own
    if template is None:
        raise TemplateError("this model has no chat template: use /v1/completions with a raw prompt")
    return template.render(turns, tools, **variables)


def message(i: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Bring one message into the form of `ChatTemplate.render`; nothing is ever fetched.

    Raises:
        ApiError: a part that is not text, or tool calls that are none.
    """
    kept = {key: given[key] for key in MESSAGE_KEYS if given.get(key) is not None}
    if kept.get("role") == "developer":
        kept["role"] = "system"
    for key in ("role", "name", "tool_call_id", "reasoning", "reasoning_content"):
        if not isinstance(kept.get(key, ""), str):
            raise refuse("messages", f"messages.{i}.{key} must be text")
    if isinstance(kept.get("content"), list):
        kept["content"] = "\n".join(_part(i, j, part) for j, part in enumerate(kept["content"]))
    if kept.get("role") in ("user", "system", "tool") and "content" not in kept:
        raise refuse("messages", f"messages.{i}.content is missing")
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls(i, kept["tool_calls"])
    return kept


def _part(i: int, j: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else part
    if kind == "refusal" and isinstance(part, Mapping):
        kind, text = "text", part.get("refusal")
    if not isinstance(text, str) or not (kind in TEXT_PARTS or isinstance(part, str)):
        shown = clip(repr(kind), 60) if isinstance(kind, str | None) else "no text"
        raise refuse("messages", f"messages.{i}.content.{j} is of type {shown}: this is a text model, only text parts")
    return text


def _calls(i: int, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise refuse("messages", f"messages.{i}.tool_calls must be a list")
    return [_call(f"messages.{i}.tool_calls.{j}", call) for j, call in enumerate(calls)]


def _call(place: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise refuse("messages", f"{place} must have a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # templates print an object; what is none is printed as it stands
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    arguments = {} if arguments is None else arguments
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _check_open(turns: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to continue a final message that is not the assistant's, or in which something follows the content."""
    last = turns[-1] if turns else {}
    if last.get("role") != "assistant" or "content" not in last or "tool_calls" in last:
        raise refuse(
            "continue_final_message",
            "continue_final_message needs a final message of the assistant's, with content and without tool_calls",
        )

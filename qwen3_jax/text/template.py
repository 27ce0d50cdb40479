"""Messages → prompt text, by the chat template that lies in the model folder.

The template is chat_template.jinja, or `chat_template` in tokenizer_config.json (a string, or a list of named ones), as
transformers looks for it; it is compiled once, in `sandbox.TemplateEnvironment`. `render` equals transformers'
`apply_chat_template(..., tokenize=False)` wherever both answer; where transformers would drop a message, print a
placeholder or fail deep inside the template, it raises `TemplateError` with the message's index.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from qwen3_jax.text.sandbox import Meter, TemplateEnvironment, metered
from qwen3_jax.text.tokenizer import read_json, token_text

# The work a render may do, in units of `sandbox.Meter`; Qwen3's own template needs about 15 per item of its input. The
# worst hostile template in tests/test_text_sandbox.py ends after 1.8 s of CPU and 100 MB (2-core VM), after up to
# 3 s for compiling the longest source that is accepted.
BASE_UNITS = 1_000_000
UNITS_PER_ITEM = 64  # more for every list element, dict entry and CHARS_PER_UNIT characters of the messages

OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "  # follows a message to be continued while it is rendered, as in transformers
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names a message's reasoning goes by, the first wins


class TemplateError(ValueError):
    """A chat template that cannot be compiled, or messages it cannot render."""


class NoTemplateError(TemplateError):
    """A folder without a chat template, as base and embedding models have it."""


class ChatTemplate:
    """The compiled chat template of one model folder."""

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None):
        """Compile a template, or several by name ("default", and "tool_use" for conversations with tools).

        `special_tokens` are the variables `eos_token` etc. Raises TemplateError when a template does not compile.
        """
        sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special = dict(special_tokens or {})
        environment = TemplateEnvironment()
        self._templates = {}
        for name, text in sources.items():
            try:
                with metered(BASE_UNITS):
                    self._templates[name] = environment.from_string(text)
            except Exception as e:  # jinja2 and Python's compiler raise many types on hostile input
                raise TemplateError(f"chat template {name!r} does not compile: {_reason(e)}") from None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate":
        """Find and compile the template of a model folder.

        Raises NoTemplateError if it has none, TemplateError for one that does not compile, TokenizerError for bad JSON.
        """
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        files = [("default", folder / "chat_template.jinja")]
        files += [(p.stem, p) for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))]
        try:
            found: Any = {name: path.read_text(encoding="utf-8") for name, path in files if path.is_file()}
        except (OSError, ValueError) as e:
            raise TemplateError(f"{folder}: a chat template file cannot be read as UTF-8 text ({e})") from None
        if not found:  # files take priority over tokenizer_config.json
            found = settings.get("chat_template")
            if isinstance(found, list) and all(isinstance(t, dict) for t in found):
                found = {t.get("name"): t.get("template") for t in found}
            elif isinstance(found, str):
                found = {"default": found}
        if not found:
            raise NoTemplateError(f"{folder}: no chat_template.jinja and no chat_template in tokenizer_config.json")
        if not isinstance(found, dict) or not all(isinstance(x, str) for pair in found.items() for x in pair):
            raise TemplateError(f"{folder}: chat_template is neither a string nor a list of named templates")
        special = {key: text for key in SPECIAL if (text := token_text(settings.get(key))) is not None}
        try:
            return cls(found, special)
        except TemplateError as e:
            raise TemplateError(f"{folder}: {e}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation to prompt text.

        Messages are dicts with `role` (one of ROLES), `content` (a string, or text parts, joined by newlines; may be
        missing or None for the assistant) and what the template reads besides: `reasoning_content`, `tool_calls`, …
        `continue_final_message` ends the text with the content of the last message, for a model to go on with it.
        `enable_thinking=None` leaves the variable unset. Other keywords become template variables. Everything must be
        plain JSON data. Raises TemplateError for bad messages, errors of the template and more work than allowed.
        """
        turns = checked(messages)
        final = turns[-1]["content"]
        if continue_final_message:
            if add_generation_prompt:
                raise TemplateError("continue_final_message and add_generation_prompt exclude each other: give one")
            turns[-1]["content"] = final + OPEN_END
        values: dict[str, Any] = {
            **self._special,
            **variables,
            "messages": turns,
            "tools": None if tools is None else [_tool(i, tool) for i, tool in enumerate(tools)],
            "add_generation_prompt": add_generation_prompt,
        }
        values.setdefault("documents", None)
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        try:
            values = plain(values)
            with metered(allowance(values)):
                text = self._template(tools is not None).render(values)
        except TemplateError:
            raise
        except Exception as e:  # a template can raise anything Python's operators and methods raise
            raise TemplateError(f"the chat template cannot render these messages: {_reason(e)}") from None
        return _up_to_open_end(text, final) if continue_final_message else text

    def _template(self, with_tools: bool) -> jinja2.Template:
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise TemplateError(f"no chat template is named 'default', only {sorted(self._templates)}")
        return self._templates["default"]


def _up_to_open_end(text: str, final: str) -> str:
    """Cut a rendered text behind the final message; where the template stripped what follows, the message is too."""
    mark = OPEN_END.strip()
    if mark not in text or final.strip() not in text:
        raise TemplateError("continue_final_message: the chat template changes the final message")
    at = text.rindex(mark)
    return text[:at] if text.startswith(OPEN_END, at) else text[:at].rstrip()


def allowance(values: Any) -> int:
    """Return the units of work a render of these values may do."""
    scale = Meter(2**62)
    scale.weigh(values)
    return BASE_UNITS + UNITS_PER_ITEM * (scale.units - scale.left)


def plain(value: Any) -> Any:
    """Copy JSON data into exact built-in types, so that a template meets no method of a richer type."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):  # enums and other subclasses lose their extra methods
        return str.__str__(value)
    if isinstance(value, bool | int | float):
        return float.__float__(value) if isinstance(value, float) else int.__int__(value)
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    raise TemplateError(f"messages, tools and variables must be plain JSON data, found a {type(value).__name__}")


def checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check the shape of a conversation; return it with string contents, None values dropped, reasoning named."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise TemplateError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(f"message {i} is a {type(message).__name__}, expected a dict with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise TemplateError(f"message {i} has role {role!r}, expected one of {', '.join(ROLES)}")
    content = message.get("content", "" if role == "assistant" else None)
    if isinstance(content, list | tuple):
        content = "\n".join(_part(i, j, part) for j, part in enumerate(content))
    if not isinstance(content, str):
        raise TemplateError(f"message {i} ({role}) has content {type(content).__name__}, expected text")
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise TemplateError(f"message {i} ({role}) has reasoning {type(reasoning).__name__}, expected text")
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list | tuple) or not all(isinstance(c, Mapping) for c in calls):
        raise TemplateError(f"message {i} ({role}) has tool_calls that are not a list of objects")
    return {**message, "content": content}


def _part(i: int, j: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
        raise TemplateError(f"message {i} content part {j} is of type {kind!r}; only text parts are supported")
    return part["text"]


def _tool(i: int, tool: Any) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping):
        raise TemplateError(f"tool {i} is a {type(tool).__name__}, expected a JSON schema object")
    return tool


def _reason(error: Exception) -> str:
    """Say in one line what a template did wrong."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        text = f"line {error.lineno}: {error.message}"
    elif isinstance(error, jinja2.TemplateError):
        text = str(error.message)
    elif isinstance(error, RecursionError):
        text = "it nests too deeply"
    else:
        text = f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + "…"

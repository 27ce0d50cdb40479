"""Tool calls in the form that Qwen3 writes them (Hermes): read from a growing text, and forced by a constraint.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Text goes in piece by piece, events come out; any way of cutting the text gives the same content, names and arguments. A
call ends with its JSON object, found with strings in mind, so a `</tool_call>` inside an argument is only text. What is
no well-formed call comes out as the text it is.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_jax.text.grammars import Constraint

OPEN, CLOSE = "<tool_call>", "</tool_call>"
DEPTH = 64  # of nested objects and lists in one call
BLANKS = 16  # characters of white space around a tag; more is no call
HEAD_CHARS = 1024  # a call's name and the start of its arguments lie in its first characters, if in the usual order


class ToolError(ValueError):
    """Tools, or a choice among them, that cannot be honoured."""


@dataclass(frozen=True)
class Text:
    """Content between the calls."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call of `name` begins; calls are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A call is complete."""

    index: int


Event = Text | CallStart | CallArguments | CallEnd


@dataclass(frozen=True)
class Call:
    """A call: the function's name, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


def parse(text: str, *, names: Collection[str] | None = None) -> tuple[str, list[Call]]:
    """Split a whole answer into its content and its calls; see `ToolStream`."""
    stream = ToolStream(names=names)
    content: list[str] = []
    called: list[str] = []
    arguments: list[list[str]] = []
    for event in [*stream.feed(text), *stream.finish()]:
        if isinstance(event, Text):
            content.append(event.text)
        elif isinstance(event, CallStart):
            called.append(event.name)
            arguments.append([])
        elif isinstance(event, CallArguments):
            arguments[event.index].append(event.text)
    return "".join(content), [Call(name, "".join(parts)) for name, parts in zip(called, arguments, strict=True)]


_PLAIN = re.compile(r"[\s\d:,.+\-eEtrufalsn]*")  # what JSON has outside of strings and brackets
_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


class _Object:
    """The JSON object of one call as it grows; work is linear in its length."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.size = 0
        self.closed = self.bad = False
        self.inner_end: int | None = None  # where the first nested value ends
        self._depth = 0
        self._string = self._escaped = False

    def feed(self, text: str) -> int:
        """Take characters until the object closes or cannot be JSON; return how many."""
        at = 0
        while at < len(text) and not (self.closed or self.bad):
            at = self._in_string(text, at) if self._string else self._outside(text, at)
        self.parts.append(text[:at])
        self.size += at
        return at

    def text(self) -> str:
        """Return all of it so far."""
        self.parts = ["".join(self.parts)]
        return self.parts[0]

    def _in_string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        at = _end(_STRING, text, at)
        if at < len(text):
            self._string = text[at] != '"'
            self._escaped = text[at] == "\\"
            self.bad = self._string and not self._escaped  # a control character
            at += 1
        return at

    def _outside(self, text: str, at: int) -> int:
        at = _end(_PLAIN, text, at)
        if at == len(text):
            return at
        sign = text[at]
        at += 1
        if sign == '"':
            self._string = True
        elif sign in "{[":
            self._depth += 1
            self.bad = self._depth > DEPTH
        elif sign in "}]":
            self._depth -= 1
            self.closed = self._depth == 0
            if self._depth == 1 and self.inner_end is None:
                self.inner_end = self.size + at
        else:
            self.bad = True
            at -= 1
        return at


class ToolStream:
    """Read an answer as it grows.

    Line ends directly before a call and at the end of an answer with calls belong to the form and are dropped.
    """

    def __init__(self, *, names: Collection[str] | None = None, eager: bool = False):
        """Start at the beginning of an answer.

        Args:
            names: of the functions there are; a call of another comes out as text. None allows any.
            eager: let arguments out while they grow. Only for answers that a grammar forces into the form: a call
                that turns out malformed can then not be taken back, and ends where it stops being JSON.
        """
        self._names = names
        self._eager = eager
        self._held = ""  # not yet known to be content: line ends, a beginning of a tag, white space within a call
        self._within = False  # after OPEN, before its object
        self._object: _Object | None = None
        self._after = False  # after an object, before CLOSE
        self._calls = 0
        self._sent: int | None = None  # characters of the object let out, once an eager call has started
        self._before = ""  # line ends before OPEN
        self._blank = ""  # white space after it

    def feed(self, text: str) -> list[Event]:
        """Return the events that a piece of text completes."""
        out: list[Event] = []
        text, self._held = self._held + text, ""
        while text:
            if self._object is not None:
                text = self._in_object(text, out)
            elif self._within:
                text = self._to_object(text, out)
            elif self._after:
                text = self._to_close(text)
            else:
                text = self._in_content(text, out)
        return _joined(out)

    def finish(self) -> list[Event]:
        """Return what was held back, now that the answer has ended."""
        out: list[Event] = []
        if self._object is not None and self._sent is None:
            self._reject(out)
        elif self._within:
            out.append(Text(self._before + OPEN + self._held))
        elif self._object is None and (not self._calls or self._held.strip("\n")) and not self._after:
            out.append(Text(self._held))
        self._held, self._object, self._within = "", None, False
        return _joined(out)

    def _in_content(self, text: str, out: list[Event]) -> str:
        at = text.find(OPEN)
        if at >= 0:
            content = _without_line_ends(text[:at])
            out.append(Text(content))
            self._before, self._within = text[len(content) : at], True
            return text[at + len(OPEN) :]
        kept = next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
        content = _without_line_ends(text[: len(text) - kept])
        out.append(Text(content))
        self._held = text[len(content) :]
        return ""

    def _to_object(self, text: str, out: list[Event]) -> str:
        stripped = text.lstrip(" \t\r\n")
        blanks = len(text) - len(stripped)
        if not stripped and blanks <= BLANKS:
            self._held = text
            return ""
        self._within = False
        if blanks > BLANKS or stripped[0] != "{":
            out.append(Text(self._before + OPEN))
            return text
        self._blank = text[:blanks]
        self._object, self._sent = _Object(), None
        return stripped

    def _in_object(self, text: str, out: list[Event]) -> str:
        grown = self._object
        assert grown is not None
        taken = grown.feed(text)
        if self._eager:
            self._let_out(grown, out)
        if grown.closed or grown.bad:
            if self._sent is not None:
                out.append(CallEnd(self._calls))
                self._calls += 1
                self._after = True
            elif grown.closed and (call := _call(grown, self._names)) is not None:
                out += [CallStart(self._calls, call.name), CallArguments(self._calls, call.arguments)]
                out.append(CallEnd(self._calls))
                self._calls += 1
                self._after = True
            else:
                self._reject(out)
            self._object = None
        return text[taken:]

    def _let_out(self, grown: _Object, out: list[Event]) -> None:
        piece = grown.parts[-1]
        if self._sent is None and grown.size - len(piece) <= HEAD_CHARS:
            piece = grown.text()
            if (head := _HEAD.match(piece)) and (name := _name(head[1], self._names)) is not None:
                out.append(CallStart(self._calls, name))
                self._sent = head.end()
        if self._sent is not None:  # what was not sent lies in the last piece
            end = grown.size if grown.inner_end is None else grown.inner_end
            first = grown.size - len(piece)
            out.append(CallArguments(self._calls, piece[self._sent - first : max(end, self._sent) - first]))
            self._sent = max(end, self._sent)

    def _reject(self, out: list[Event]) -> None:
        assert self._object is not None
        out.append(Text(self._before + OPEN + self._blank + self._object.text()))

    def _to_close(self, text: str) -> str:
        stripped = text.lstrip(" \t\r\n")
        near = len(text) - len(stripped) <= BLANKS
        if near and len(stripped) < len(CLOSE) and CLOSE.startswith(stripped):
            self._held = text
            return ""
        self._after = False
        return stripped[len(CLOSE) :] if near and stripped.startswith(CLOSE) else text


def _without_line_ends(text: str) -> str:
    """Drop line ends from the end, `BLANKS` at most, so that little is ever held back."""
    least = max(0, len(text) - BLANKS)
    return text[:least] + text[least:].rstrip("\n")


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()


def _name(quoted: str, names: Collection[str] | None) -> str | None:
    try:
        name = json.loads(quoted)
    except ValueError:
        return None
    return name if name and (names is None or name in names) else None


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _call(grown: _Object, names: Collection[str] | None) -> Call | None:
    """Read a complete object; None if it is no call."""
    text = grown.text()
    try:
        value = json.loads(text, parse_constant=_not_json)
        text.encode()
    except ValueError:
        return None
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict) or not name:
        return None
    if names is not None and name not in names:
        return None
    usual = _HEAD.match(text)
    if usual and grown.inner_end is not None and usual.end() <= HEAD_CHARS:
        return Call(name, text[usual.end() : grown.inner_end])
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _joined(events: list[Event]) -> list[Event]:
    """Drop empty pieces and join neighbours."""
    out: list[Event] = []
    for event in events:
        if isinstance(event, Text | CallArguments) and not event.text:
            continue
        last = out[-1] if out else None
        if isinstance(event, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + event.text)
        else:
            out.append(event)
    return out


def tools_constraint(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any], parallel: bool = True
) -> Constraint | None:
    """Return what an answer must look like so that its calls are as the tools and the choice say.

    Args:
        tools: as in the OpenAI API, {"type": "function", "function": {name, parameters, strict}}.
        choice: "none"; "auto", which is free text and, if any tool is `strict`, forms the calls in it; "required"; or
            {"type": "function", "function": {"name": …}}.
        parallel: several calls may follow one another. A named choice is one call.

    Returns:
        None where nothing is constrained. Arguments of a tool that lists its parameters hold no others.

    Raises:
        ToolError: no tools, two of one name, or a choice of a tool that is not there.
    """
    functions = {}
    for i, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if tool.get("type", "function") != "function" or not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ToolError(f"tools[{i}] must be a function with a name of at most 64 letters, digits, _, - and .")
        if name in functions:
            raise ToolError(f"tools[{i}]: there are two functions named {name!r}")
        functions[name] = function
    if choice == "none":
        return None
    if not functions:
        raise ToolError("tools must not be empty when tool_choice asks for one")
    if choice == "auto":
        if not any(f.get("strict") for f in functions.values()):
            return None
        known = {name: f if f.get("strict") else {} for name, f in functions.items()}
        tags = [_tag(name, f, closed=bool(f)) for name, f in known.items()]
        form = {"type": "triggered_tags", "triggers": [OPEN], "tags": tags}
        return Constraint("structural_tag", {"format": form | {"stop_after_first": not parallel}})
    if isinstance(choice, Mapping):
        chosen = choice.get("function", {}).get("name")
        if chosen not in functions:
            raise ToolError(f"tool_choice names {str(chosen)[:64]!r}, tools has {', '.join(functions)[:200]}")
        functions, parallel = {chosen: functions[chosen]}, False
    elif choice != "required":
        raise ToolError(f"tool_choice is {choice[:64]!r}: give none, auto, required or a function")
    form = {
        "type": "tags_with_separator",
        "separator": "\n",
        "tags": [_tag(*f) for f in functions.items()],
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
    return Constraint("structural_tag", {"format": form})


def _tag(name: str, function: Mapping[str, Any], *, closed: bool = True) -> dict[str, Any]:
    """Write the form of one function's call; `closed`: without parameters there are no arguments."""
    schema = {"type": "object", **(function.get("parameters") or {})}
    if "properties" in schema and not schema.keys() & {"allOf", "anyOf", "oneOf", "$ref", "patternProperties"}:
        schema.setdefault("additionalProperties", False)
    elif closed and schema.keys() == {"type"}:
        schema["additionalProperties"] = False
    return {
        "type": "tag",
        "begin": f'{OPEN}\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ',
        "content": {"type": "json_schema", "json_schema": schema},
        "end": f"}}\n{CLOSE}",
    }

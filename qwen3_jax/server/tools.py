"""Tool calling: what `tool_choice` asks for, and the model's calls as deltas of the OpenAI API."""

import secrets
from dataclasses import dataclass
from typing import Any

from qwen3_jax.server.errors import refuse
from qwen3_jax.server.schema import ChatBody, NamedTool
from qwen3_jax.server.structure import Wanted
from qwen3_jax.text import tools as hermes


class Content:
    """No tools: the answer is content."""

    called = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Return the deltas of a piece of the answer."""
        return [{"content": text}] if text else []

    def finish(self) -> list[dict[str, Any]]:
        """Return what was held back when the answer ends."""
        return []


class Calls:
    """An answer that may call tools."""

    def __init__(self, calling: "Calling"):
        self._stream = hermes.ToolStream(names=calling.names, eager=calling.must)
        self._most = None if calling.parallel else 1
        self.called = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Return the deltas of a piece of the answer."""
        return self._deltas(self._stream.feed(text))

    def finish(self) -> list[dict[str, Any]]:
        """Return what was held back when the answer ends."""
        return self._deltas(self._stream.finish())

    def _deltas(self, events: list[hermes.Event]) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, hermes.Text):
                out += [{"content": event.text}] if event.text else []
            elif self._most is not None and event.index >= self._most:
                continue  # one call was asked for
            elif isinstance(event, hermes.CallStart):
                self.called = True
                function = {"name": event.name, "arguments": ""}
                out.append(_delta(event.index, id=f"call_{secrets.token_hex(12)}", type="function", function=function))
            elif isinstance(event, hermes.CallArguments):
                out.append(_delta(event.index, function={"arguments": event.text}))
        return out


def _delta(index: int, **call: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, **call}]}


@dataclass(frozen=True)
class Calling:
    """How one request wants tools to be called.

    Attributes:
        names: of the functions that may be called; () for none.
        parallel: more than one at once.
        must: the answer is a call and nothing else.
        form: what makes the answer, or the calls in it, follow the tools' schemas.
    """

    names: tuple[str, ...] = ()
    parallel: bool = True
    must: bool = False
    form: Wanted | None = None

    @classmethod
    def of(cls, body: ChatBody) -> "Calling":
        """Read the fields about tools.

        Raises:
            ApiError: tools that cannot be called.
        """
        if not body.tools:
            return cls()
        names = tuple(tool.function.name for tool in body.tools)
        choice: Any = body.tool_choice or "auto"
        if isinstance(choice, NamedTool):
            names, choice = (choice.function.name,), choice.model_dump()
        parallel = body.parallel_tool_calls is not False
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
        try:
            form = hermes.tools_constraint(tools, choice, parallel=parallel)
        except hermes.ToolError as error:
            raise refuse("tools", str(error)) from None
        if choice == "none":
            return cls()
        return cls(names, parallel, choice != "auto", form and Wanted("tools", form.kind, form.value))

    def parser(self) -> Content | Calls:
        """Return what reads one answer: feed text, get deltas."""
        return Calls(self) if self.names else Content()

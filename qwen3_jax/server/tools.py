"""Tool calling: what `tool_choice` asks for, and the model's calls in the form of the OpenAI API."""

from dataclasses import dataclass
from typing import Any, Literal

from qwen3_jax.server.schema import ChatBody, NamedTool
from qwen3_jax.server.structure import Wanted


class Plain:
    """No tools: the answer is content."""

    called = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Return the deltas of a piece of the answer."""
        return [{"content": text}] if text else []

    def finish(self) -> list[dict[str, Any]]:
        """Return what was held back when the answer ends."""
        return []


@dataclass(frozen=True)
class Calling:
    """How one request wants tools to be called; `forced` is the form that makes the model call one."""

    mode: Literal["none", "auto", "forced"]
    names: tuple[str, ...] = ()
    parallel: bool = True
    forced: Wanted | None = None

    @classmethod
    def of(cls, body: ChatBody) -> "Calling":
        """Read the fields about tools."""
        if not body.tools or body.tool_choice == "none":
            return cls("none")
        return cls("auto", tuple(t.function.name for t in body.tools))

    def parser(self) -> Any:
        """Return a parser of one answer: feed text, get deltas."""
        return Plain()

"""What an engine hands back: updates of a request as its tokens arrive, its ticket, and the errors of submitting.

Pure Python, no JAX import.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from qwen3_jax.reply import Completion, Piece, TokenLogprob


class EngineError(ValueError):
    """An engine cannot take or finish a request."""


class Overloaded(EngineError):
    """The queue is full: ask again later."""


class EngineStopped(EngineError):
    """The engine has been stopped, is draining, or has failed."""


class TooLarge(EngineError):
    """A request that would not fit into the whole cache, were it alone."""


@dataclass(frozen=True)
class RequestStats:
    """What became of a request, in tokens and seconds.

    Attributes:
        prompt_tokens, generated_tokens: as in the completion's usage.
        reasoning_tokens: of the generated ones, those of the thinking.
        cached_tokens: of the prompt, those that the prefix cache had.
        queue_s: from submit to the first prefill call.
        prefill_s: from there to the first token.
        decode_s: from the first token to the last.
        first_token_s: from submit to the first token; None if there was none.
        e2e_s: from submit to the end.
        preemptions: how often its pages were taken and computed again.
        limit: most tokens it could have generated.
        choice, choices: which of how many continuations of one prompt that were asked for together.
    """

    prompt_tokens: int
    generated_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    first_token_s: float | None
    e2e_s: float
    preemptions: int
    limit: int
    choice: int = 0
    choices: int = 1


PromptLogprobs = tuple[TokenLogprob | None, ...]  # one per prompt token; the first has none


class Update(NamedTuple):
    """News of one request, handed to its listener on the engine's thread; a listener must not block.

    Attributes:
        pieces: ("reasoning" | "answer", text) in order.
        tokens: ids that arrived, the one that ends the row included.
        logprobs: one per token if the request asked for them.
        prompt_logprobs: on the first update, if asked for.
        completion: on the last update, whose finish_reason says why; then `stats` is there too.
        error: why the engine could not go on, with the finish_reason "error".
    """

    pieces: tuple[Piece, ...] = ()
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    completion: Completion | None = None
    stats: RequestStats | None = None
    error: str | None = None


Listener = Callable[[Update], None]


@dataclass(frozen=True)
class Ticket:
    """A request under way."""

    id: str
    cancel: Callable[[], None] = field(repr=False)
    """Give the request up; any thread, any number of times. Its last update has the finish_reason "abort", and its
    pages are free after the step under way."""


@dataclass(frozen=True)
class Load:
    """How busy an engine is, at one moment."""

    running: int
    waiting: int
    waiting_tokens: int
    pages_used: int
    pages_total: int
    draining: bool = False

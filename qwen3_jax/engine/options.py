"""How an engine is set up: rows, pages and the sizes of its steps. Pure Python, no JAX import."""

from dataclasses import dataclass, fields, replace

CACHE_CONTEXT = 4096  # positions per row that the cache has room for unless told otherwise
CHUNK_TOKENS = {"cpu": 64}
BUSY_TOKENS = {"cpu": 5}


class EngineOptionError(ValueError):
    """An option out of range, or options that do not fit together."""


@dataclass(frozen=True)
class EngineOptions:
    """The static side of an engine; checked on construction.

    Attributes:
        rows: most sequences decoded together. There is one decode program, of this many rows.
        page_tokens: positions per page of the KV cache, the unit of allocation and of prefix sharing.
        cache_tokens: positions that all pages hold together; None is rows * min(context, 4096).
        chunk_tokens: most prompt tokens per prefill call, a multiple of page_tokens; None is 64 on a CPU, where a
            longer call would hold decoding up, and 512 elsewhere.
        decode_tokens: most tokens per row and call when nobody waits. Calls of slow steps take fewer, down to 3, so
            that they end after 0.2 s.
        busy_tokens: the same while a prompt of more than four chunks is prefilled. A chunk and a decode call take
            turns, so this many tokens share the chunk's time; fewer, the more prompts there are beside the rows that
            decode. None is 5 on a CPU, where a chunk takes as long as several steps, 1 elsewhere, and never more than
            decode_tokens.
        max_waiting: most requests in the queue; more are refused.
        max_waiting_tokens: most prompt tokens in the queue; None is unlimited.
        prefix_cache: share the pages of equal beginnings.
        deterministic: a sequence's tokens depend on nothing but itself, neither on its neighbours nor on what was
            cached, chunked or preempted.

    Raises:
        EngineOptionError: a value out of range; the message names the field and the remedy.
    """

    rows: int = 16
    page_tokens: int = 16
    cache_tokens: int | None = None
    chunk_tokens: int | None = None
    decode_tokens: int = 8
    busy_tokens: int | None = None
    max_waiting: int = 256
    max_waiting_tokens: int | None = None
    prefix_cache: bool = True
    deterministic: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool or field.type == "bool":
                if not isinstance(value, bool):
                    raise EngineOptionError(f"{field.name} is {value!r}: must be true or false")
            elif value is None and field.default is None:
                continue
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise EngineOptionError(f"{field.name} is {value!r}: must be a positive integer")
        if self.chunk_tokens is not None and self.chunk_tokens % self.page_tokens:
            raise EngineOptionError(
                f"chunk_tokens is {self.chunk_tokens}, page_tokens {self.page_tokens}: chunk_tokens must be a multiple"
            )
        if self.busy_tokens is not None and self.busy_tokens > self.decode_tokens:
            raise EngineOptionError(
                f"busy_tokens is {self.busy_tokens}, decode_tokens {self.decode_tokens}: set it to that or less"
            )
        if self.cache_tokens is not None and self.cache_tokens < 2 * self.page_tokens:
            raise EngineOptionError(
                f"cache_tokens is {self.cache_tokens}: must be at least two pages, {2 * self.page_tokens}"
            )

    def on(self, platform: str) -> "EngineOptions":
        """Return the options with what depends on the platform ("cpu", "tpu", "gpu") filled in."""
        chunk, busy = self.chunk_tokens, self.busy_tokens
        if chunk is None:
            chunk = -(-CHUNK_TOKENS.get(platform, 512) // self.page_tokens) * self.page_tokens
        if busy is None:
            busy = min(BUSY_TOKENS.get(platform, 1), self.decode_tokens)
        return replace(self, chunk_tokens=chunk, busy_tokens=busy)

    @property
    def chunk(self) -> int:
        """chunk_tokens, of options that are filled in."""
        assert self.chunk_tokens is not None
        return self.chunk_tokens

    @property
    def busy(self) -> int:
        """busy_tokens, of options that are filled in."""
        assert self.busy_tokens is not None
        return self.busy_tokens

    def pages(self, context: int) -> int:
        """Return the number of pages for a model of `context` positions."""
        tokens = self.rows * min(context, CACHE_CONTEXT) if self.cache_tokens is None else self.cache_tokens
        return tokens // self.page_tokens

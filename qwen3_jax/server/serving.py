"""What the routes share: the engine, the model's text side, and where slow text work is done."""

import asyncio
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from fastapi import Request as HttpRequest

from qwen3_jax import pooling
from qwen3_jax.server.errors import ApiError, clip, refuse
from qwen3_jax.server.generation import Ask, Run
from qwen3_jax.server.options import ServerOptions
from qwen3_jax.server.structure import Wanted
from qwen3_jax.text.constraints import Constraint, ConstraintError, Constraints, Grammar

Result = TypeVar("Result")
INLINE = 4096  # characters of text below which a thread costs more than it spares
NFC_SHRINKS = 4  # normalisation makes at most about this many bytes into one


class Serving:
    """One model behind HTTP.

    Attributes: `engine`, `options`, `model` (the engine's LoadedModel), `names` it goes by, `context`, `created`
    (Unix seconds), `draining` (no new work is taken), `runs` (requests of the engine under way).
    """

    def __init__(self, engine: Any, options: ServerOptions):
        self.engine = engine
        self.options = options
        self.model = engine.model
        self.names = options.names or (engine.model.name,)
        self.context: int = engine.model.config.max_position_embeddings
        self.created = int(time.time())
        self.draining = False
        self.runs: set[Run] = set()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="text")
        self._compilers = ThreadPoolExecutor(4, thread_name_prefix="compiler")
        self.constraints = Constraints(engine.model.tokenizer, engine.model.config.vocab_size)

    @functools.cached_property
    def pooler(self) -> pooling.Pooler:
        """What embeds and scores."""
        observer = getattr(self.engine, "observer", None)
        return pooling.Pooler(self.model, **({} if observer is None else {"compiled": observer.compiled}))

    def warm_up(self, progress: Callable[[str], None] = lambda line: None) -> None:
        """Compile what an embedding model runs, before it is asked; `progress` is told of each program.

        Any other model is mostly asked to generate: what it embeds and scores with is compiled when it is first needed,
        in a thread, while its engine goes on.
        """
        if jax.process_count() == 1 and pooling.embeds(self.model):
            self.pooler.warm_up("embed", progress=progress)

    @functools.cached_property
    def most_characters(self) -> int:
        """Return the length above which a text cannot fit into the context, whatever it says."""
        tokenizer = self.model.tokenizer
        longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        return self.context * longest * NFC_SHRINKS

    def check_model(self, name: str | None) -> str:
        """Return the name to answer with.

        Raises:
            ApiError: 404, another model is asked for.
        """
        if name is None or name == "":
            return self.names[0]
        if name not in self.names:
            raise ApiError(
                404, f"the model {clip(name, 100)!r} does not exist: this server has {', '.join(self.names)}"
            )
        return name

    async def off_loop(self, function: Callable[..., Result], *args: Any, size: int) -> Result:
        """Call a function on text of `size` characters, in a thread if that is long."""
        if size <= INLINE:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    async def encode(self, text: str, *, add_special_tokens: bool = False, param: str = "prompt") -> list[int]:
        """Turn text into ids; a text that cannot fit into the context is refused unread."""
        if len(text) > self.most_characters:
            raise refuse(
                param, f"{param} has {len(text)} characters: the {self.context} tokens of the context hold fewer"
            )
        encode = functools.partial(self.model.tokenizer.encode, add_special_tokens=add_special_tokens)
        return await self.off_loop(encode, text, size=len(text))

    def run(self, asks: Iterable[Ask]) -> Run:
        """Give requests to the engine.

        Raises:
            ApiError: 503, the server is shutting down.
            Overloaded, EngineStopped: as the engine says.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", headers={"connection": "close"})
        return Run(self.engine, asks, register=self.runs)

    async def grammar(self, wanted: Wanted | None) -> Grammar | None:
        """Compile the form that an answer must have, in a thread.

        Raises:
            ApiError: it cannot be honoured.
        """
        if wanted is None:
            return None
        constraint = Constraint(wanted.kind, wanted.value)
        try:
            return await self._compiled(self.constraints.compile, constraint)
        except ConstraintError as error:
            raise refuse(wanted.field, f"{wanted.field}: {error}") from None

    async def pooled(self, name: str, prompts: Sequence[Sequence[int]], **ids: int) -> np.ndarray:
        """Run one part of a `Pooler` on the engine's thread, its program compiled in another if it is not yet there."""
        pooler = self.pooler
        length = pooler.length(max(map(len, prompts)))
        if (name, length) not in pooler.programs:
            await self._compiled(pooler.compile, name, length)
        return await asyncio.wrap_future(self.engine.call(functools.partial(pooler.run, name, prompts, **ids)))

    async def _compiled(self, compile: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._compilers, compile, *args)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuse token ids that the model does not have."""
        rows = self.model.config.vocab_size
        if bad := [i for i in ids if not 0 <= i < rows]:
            raise refuse(param, f"{param} has token id {clip(str(bad[0]), 40)}: the model has ids 0 to {rows - 1}")

    def close(self) -> None:
        """End the threads."""
        for pool in (self._pool, self._compilers):
            pool.shutdown(wait=False, cancel_futures=True)


def serving(http: HttpRequest) -> Serving:
    """Return the `Serving` of the application that a request reached."""
    return http.app.state.serving

"""Embeddings and relevance scores: one forward pass without a KV cache, read at each prompt's last token.

prompts (token ids) → `parts`, calls of few shapes → `hidden` [n, D] → `embeddings` (cut, normalised), or
                                                  → `scores` [n], how much likelier "yes" is than "no"

As Qwen3-Embedding and Qwen3-Reranker are used (technical report arXiv:2506.05176 §2, and the example programs of their
repository): the vector is the final norm's output at the last token, which the embedding models' tokenizer makes
`<|endoftext|>`; it is cut to its first dimensions before it is normalised. The reranker judges a query and a document
in a chat turn with an empty thinking block; its score is softmax over the logits of "no" and "yes".
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import distributed
from qwen3_jax.loaded import LoadedModel
from qwen3_jax.model import Params, declare
from qwen3_jax.text.tokenizer import Tokenizer

CALL_TOKENS = 1024  # rows times length of one call, where one row is not longer
ROWS = 16  # most rows of a call
LENGTH = 16  # the shortest bucket; the others are the powers of two up to the context

QUERY_TASK = "Given a web search query, retrieve relevant passages that answer the query"
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class PoolingError(ValueError):
    """A prompt that cannot be embedded or scored, or a model that cannot do it."""


class Pooler:
    """Embeds and scores with one model, by the programs "embed" and "score" of each length.

    A program is compiled when it is first needed, or before: by `warm_up` or `compile`.
    Attributes: `programs` {(name, length): compiled program}; `compile_s`, seconds spent compiling.
    """

    def __init__(self, model: LoadedModel, *, compiled: Callable[[str, float], None] = lambda name, seconds: None):
        """Take a model; `compiled` hears of each program and its seconds."""
        self.config = model.config
        self.context = model.config.max_position_embeddings
        self.programs: dict[tuple[str, int], Any] = {}
        self.compile_s = 0.0
        self._model = model
        self._compiled = compiled
        self._everywhere = None if model.mesh is None else NamedSharding(model.mesh, PartitionSpec())
        self._lock = threading.Lock()

    def length(self, tokens: int) -> int:
        """Return the bucket of a prompt's length."""
        return min(max(LENGTH, 1 << (tokens - 1).bit_length()), self.context)

    def rows(self, length: int) -> int:
        """Return the rows of a call of this length; there is one number for each."""
        return max(1, min(ROWS, CALL_TOKENS // length))

    def parts(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Share prompts out to calls: lists of their indices, similar lengths together, none beyond `rows`.

        Raises PoolingError for a prompt that is empty, longer than the context, or has unknown ids.
        """
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self.context:
                raise PoolingError(f"input {i} has {len(prompt)} tokens: give 1 to {self.context}, the model's context")
            if bad := [t for t in prompt if not 0 <= t < self.config.vocab_size]:
                raise PoolingError(f"input {i} has token id {bad[0]}: the model has 0 to {self.config.vocab_size - 1}")
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_length.setdefault(self.length(len(prompt)), []).append(i)
        return [
            of[at : at + self.rows(length)]
            for length, of in sorted(by_length.items())
            for at in range(0, len(of), self.rows(length))
        ]

    def hidden(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Run one part: the final norm's output at each prompt's last token, [n, D] float32."""
        return self.run("embed", prompts)

    def scores(self, prompts: Sequence[Sequence[int]], *, yes: int, no: int) -> np.ndarray:
        """Run one part: P(yes) of the tokens yes and no at each prompt's last token, [n] float32."""
        return self.run("score", prompts, yes=yes, no=no)

    def embed(self, prompts: Sequence[Sequence[int]], *, dimensions: int | None = None) -> np.ndarray:
        """Embed prompts: unit vectors [n, dimensions] float32."""
        return embeddings(gather(self.parts(prompts), prompts, self.hidden), dimensions)

    def run(self, name: str, prompts: Sequence[Sequence[int]], **ids: int) -> np.ndarray:
        """Run one part by the program "embed", or "score" with the ids `yes` and `no`."""
        length = self.length(max(map(len, prompts)))
        rows = self.rows(length)
        if len(prompts) > rows:
            raise PoolingError(f"{len(prompts)} prompts of {length} tokens in one call: at most {rows}, see parts")
        program = self.compile(name, length)
        tokens = np.zeros((rows, length), np.int32)
        lengths = np.ones(rows, np.int32)
        for b, prompt in enumerate(prompts):
            tokens[b, : len(prompt)] = prompt
            lengths[b] = len(prompt)
        return distributed.fetch(program(*self._arguments(name, tokens, lengths, **ids)))[: len(prompts)]

    def compile(self, name: str, length: int) -> Any:
        """Return the program "embed" or "score" of a bucket, compiled if it is not there yet; any thread may ask."""
        if (name, length) not in self.programs:
            with self._lock:
                if (name, length) not in self.programs:
                    began, rows = time.perf_counter(), self.rows(length)
                    nothing = self._arguments(name, np.zeros((rows, length), np.int32), np.ones(rows, np.int32))
                    self.programs[name, length] = jax.jit(self._step(name)).lower(*nothing).compile()
                    spent = time.perf_counter() - began
                    self.compile_s += spent
                    self._compiled(f"{name} {rows}x{length}", spent)
        return self.programs[name, length]

    def warm_up(self, *names: str, progress: Callable[[str], None] = lambda text: None) -> None:
        """Compile the programs of every length for "embed" and "score"; `progress` is told what is being compiled."""
        for length in sorted({self.length(1 << n) for n in range(self.context.bit_length() + 1)}):
            for name in names:
                progress(f"{name} {self.rows(length)}x{length}")
                self.compile(name, length)

    def _step(self, name: str) -> Callable[..., jax.Array]:
        config, model = self.config, self._model
        if name == "embed":  # needs no lm_head, and embedding models may come without one
            config = replace(config, tie_word_embeddings=True)
        graphdef, _ = declare(config, dtype=model.dtype, ops=model.ops)
        return functools.partial(_embed if name == "embed" else _score, graphdef)

    def _arguments(
        self, name: str, tokens: np.ndarray, lengths: np.ndarray, *, yes: int = 0, no: int = 0
    ) -> tuple[Any, ...]:
        """Return what a program is called with: the parameters it reads, and arrays that lie beside them."""
        params = self._model.params
        if name == "embed":
            params = {key: value for key, value in params.items() if key != "lm_head"}
            return params, *jax.device_put((tokens, lengths), self._everywhere)
        return params, *jax.device_put((tokens, lengths, np.array([no, yes], np.int32)), self._everywhere)


def _last(model: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Return hidden [B, 1, D] of each row's last token; what pads a row to the right it does not see."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return model(tokens, positions=positions, only=lengths - 1)[0]


def _embed(graphdef: Any, params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return _last(nnx.merge(graphdef, params), tokens, lengths)[:, 0].astype(jnp.float32)


def _score(graphdef: Any, params: Params, tokens: jax.Array, lengths: jax.Array, ids: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    logits = model.logits(_last(model, tokens, lengths))[:, 0]
    return jax.nn.softmax(logits[:, ids], axis=-1)[:, 1]


def gather(
    parts: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    call: Callable[[Sequence[Sequence[int]]], np.ndarray],
) -> np.ndarray:
    """Call for each part and put the results in the order of the prompts."""
    out: list[Any] = [None] * len(prompts)
    for part in parts:
        for i, row in zip(part, call([prompts[i] for i in part]), strict=True):
            out[i] = row
    return np.stack(out)


def embeddings(hidden: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """Cut hidden [n, D] to its first dimensions and normalise: unit vectors [n, dimensions] float32.

    Raises PoolingError for more dimensions than there are.
    """
    most = hidden.shape[-1]
    if dimensions is not None and not 1 <= dimensions <= most:
        raise PoolingError(f"dimensions is {dimensions}: the model has 1 to {most}")
    cut = hidden[:, :dimensions].astype(np.float32)
    return cut / np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), np.float32(1e-12))


def appends_end(tokenizer: Tokenizer) -> bool:
    """Tell whether a folder's tokenizer ends every input with a token of its own, as the embedding models' do."""
    return bool(tokenizer.encode("", add_special_tokens=True))


def embeds(model: LoadedModel) -> bool:
    """Tell whether a model is an embedding model: the network alone, or by its tokenizer."""
    return model.backbone or appends_end(model.tokenizer)


def query_text(query: str, task: str = QUERY_TASK) -> str:
    """Write a query as the embedding models expect it; documents stand for themselves."""
    return f"Instruct: {task}\nQuery:{query}"


def judged(tokenizer: Tokenizer, query: str, document: str, *, context: int, task: str = QUERY_TASK) -> list[int]:
    """Write a query and a document as the reranker expects them, the document cut so that the turn fits the context.

    Raises PoolingError when not even the turn around them fits.
    """
    prefix, suffix = tokenizer.encode(JUDGE), tokenizer.encode(ANSWER)
    body = tokenizer.encode(f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}")
    room = context - len(prefix) - len(suffix)
    if room < 1:
        raise PoolingError(f"judging takes {context - room} tokens, the model's context is {context}")
    return [*prefix, *body[:room], *suffix]


def verdicts(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of "yes" and "no".

    Raises PoolingError when they are no tokens: the model is no reranker.
    """
    yes, no = tokenizer.token_id("yes"), tokenizer.token_id("no")
    if yes is None or no is None:
        raise PoolingError('the tokenizer has no tokens "yes" and "no": this model cannot judge, load a reranker')
    return yes, no

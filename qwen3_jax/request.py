"""One prompt and how to continue it, checked against a model. No JAX import."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_jax.config import Qwen3Config
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.text.thinking import ThinkingIds
from qwen3_jax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # raw text, or token ids


class PromptError(ValueError):
    """A prompt that cannot be run: empty, beyond the context, or ids that the model does not have."""


@dataclass(frozen=True)
class Request:
    """One row: what to continue and how."""

    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]  # everything that ends it: the model's end ids, unless ignored, and the request's own
    limit: int  # generate at most this many tokens; the engine's take 0 too, for the prompt's log-probabilities alone
    thinks: bool = False  # not yet past the end of its thinking
    thought: int = 0  # tokens of thinking that already stand in the prompt, `<think>` included
    choice: int = 0  # which of several continuations of one prompt that were asked for together
    choices: int = 1
    raw: bool = False  # its text is the reading of all its tokens, thinking tags and all: everything is answer
    skip_special_tokens: bool = True  # in its text


class Requests:
    """Makes the requests of one model."""

    def __init__(self, config: Qwen3Config, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.tags = ThinkingIds.of(tokenizer)
        self._turn = tokenizer.special.get("<|im_start|>")

    def make(self, prompt: Prompt, params: SamplingParams, *, name: str = "the prompt") -> Request:
        """Check a prompt and its parameters together; `name` is what errors call the prompt.

        Raises:
            PromptError: the prompt is empty, has unknown ids, or leaves no room in the context.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
        context = self.config.max_position_embeddings
        if not ids:
            raise PromptError(f"{name} is empty: give at least one token")
        if bad := [t for t in ids if not 0 <= t < self.config.vocab_size]:
            raise PromptError(f"{name} has token id {bad[0]}: the model has ids 0 to {self.config.vocab_size - 1}")
        room = context - len(ids)
        if room < 1:
            raise PromptError(
                f"{name} has {len(ids)} tokens, the context of the model is {context}: shorten it to {context - 1}"
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise PromptError(
                f"{name} has {len(ids)} tokens and max_tokens is {params.max_tokens}, together "
                f"{len(ids) + params.max_tokens} of a context of {context}: set max_tokens to {room} or less"
            )
        thinks, thought = self.thinking(ids)
        return Request(
            prompt=ids,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stop_ids=(() if params.ignore_eos else self.tokenizer.stop_ids) + params.stop_token_ids,
            limit=room if params.max_tokens is None else params.max_tokens,
            thinks=thinks,
            thought=thought,
        )

    def thinking(self, ids: Sequence[int]) -> tuple[bool, int]:
        """Tell whether the reply to a prompt may still think, and how many tokens of its thinking the prompt holds."""
        if self.tags is None:
            return False, 0
        for n, token in enumerate(reversed(ids), 1):
            if token == self.tags.close_id:
                return False, 0
            if token == self.tags.open_id:
                return True, n
            if token == self._turn:
                break
        return True, 0

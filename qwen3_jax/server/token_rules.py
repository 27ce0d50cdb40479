"""allowed_token_ids and bad_words: which tokens may come next, as the engine asks a grammar.

A bad word is banned as the tokenizer writes it, at the start of a text and after a blank: its last token may not
follow the others. The same word spelt with other tokens is not recognised.
"""

from collections.abc import Sequence

import numpy as np

from qwen3_jax.text.tokenizer import Tokenizer


class TokenRules:
    """The rules of one request."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, *, allowed: Sequence[int] | None = None, words: Sequence[str] = ()
    ):
        """Take the ids that alone may come, None for all of the tokenizer's, and the words that may not."""
        spellings = {tuple(tokenizer.encode(blank + word.lstrip(" "))) for word in words for blank in ("", " ")}
        bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        bits[slice(tokenizer.vocab_size) if allowed is None else list(allowed)] = 1
        bits[[ids[0] for ids in spellings if len(ids) == 1]] = 0
        self.bits = np.packbits(bits, bitorder="little").view(np.dtype("<u4")).astype(np.uint32)
        self.longer = [ids for ids in spellings if len(ids) > 1]
        self.stop_ids = tokenizer.stop_ids

    def start(self) -> "Follower":
        """Return the rules at the beginning of a text."""
        return Follower(self)


class Follower:
    """One text under its rules."""

    finished = False
    error: str | None = None

    def __init__(self, rules: TokenRules):
        self._rules = rules
        self._ids: list[int] = []

    def mask(self, out: np.ndarray) -> None:
        """Set the bits of the ids that may come next; the end tokens, if there are none."""
        out[:] = self._rules.bits
        for ids in self._rules.longer:
            if self._ids[-len(ids) + 1 :] == list(ids[:-1]):
                out[ids[-1] // 32] &= ~np.uint32(1 << ids[-1] % 32)
        if not out.any():
            for stop in self._rules.stop_ids:
                out[stop // 32] |= np.uint32(1 << stop % 32)

    def accept(self, token: int) -> bool:
        """Go on by one token."""
        self._ids.append(token)
        return True

    def rollback(self, n: int) -> None:
        """Take back the last n tokens."""
        del self._ids[len(self._ids) - n :]

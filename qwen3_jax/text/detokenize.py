"""Token ids → text as it arrives: whole characters only, and stop strings cut out exactly.

A `Detokenizer` looks up the text of ids that are whole characters. Of others it reads the bytes as UTF-8 and keeps the
beginning of a character for the next id, so the pieces joined are `Tokenizer.decode` of all ids for every way to split
them, and each id is looked at once. `StopStrings` follows it.
"""

import codecs
from collections import deque
from collections.abc import Sequence

from qwen3_jax.text.tokenizer import Tokenizer


class Detokenizer:
    """Decode one sequence incrementally."""

    __slots__ = ("_rest", "_skip", "_texts", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._texts = tokenizer.token_texts(skip_special_tokens=skip_special_tokens)
        self._rest = b""  # the beginning of a character

    def feed(self, ids: Sequence[int]) -> str:
        """Return the text these ids complete; a character whose bytes are still missing waits for the next call."""
        if not self._rest:
            texts = [self._texts[i] for i in ids]
            if None not in texts:
                return "".join(texts)  # pyright: ignore[reportArgumentType, reportCallIssue]
        data = self._rest + b"".join([self._tokenizer.token_bytes(i, skip_special_tokens=self._skip) for i in ids])
        text, read = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[read:]
        return text

    def finish(self) -> str:
        """Return what still waits: U+FFFD if the sequence ends inside a character, else nothing. Then start anew."""
        text, self._rest = self._rest.decode("utf-8", "replace"), b""
        return text


class StopStrings:
    """Find the first stop string to complete in a stream of text (an Aho-Corasick automaton over the strings).

    `feed` passes on everything that cannot be part of a stop string any more and holds back the rest: at each point
    the longest end of the text that begins a stop string. When several complete at the same character, the longest is
    taken. `matched` is that string, or None; after a match, `feed` returns nothing.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False):
        if isinstance(stops, str) or any(not isinstance(s, str) or not s for s in stops):
            raise ValueError(f"stop strings must be a list of non-empty strings, got {stops!r}")
        self.matched: str | None = None
        self._include_stop = include_stop
        self._held = ""
        # Node = an end of the text read so far that begins a stop string: children, its longest shorter such end,
        # its length, and the longest stop string that ends here.
        self._next: list[dict[str, int]] = [{}]
        self._fail, self._depth = [0], [0]
        self._stop: list[str | None] = [None]
        self._node = 0
        for stop in stops:
            node = 0
            for char in stop:
                if char not in self._next[node]:
                    self._next[node][char] = len(self._next)
                    self._next.append({})
                    self._fail.append(0)
                    self._depth.append(self._depth[node] + 1)
                    self._stop.append(None)
                node = self._next[node][char]
            self._stop[node] = stop
        queue = deque(self._next[0].values())  # breadth first: a node's fail link is shorter, hence ready
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                self._fail[child] = self._step(self._fail[node], char)
                queue.append(child)
            self._stop[node] = self._stop[node] or self._stop[self._fail[node]]

    def _step(self, node: int, char: str) -> int:
        while node and char not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(char, 0)

    def feed(self, text: str) -> str:
        """Return the text that is now known to precede any stop string (plus the stop string with `include_stop`)."""
        if self.matched is not None:
            return ""
        if not self._held and self._next[0].keys().isdisjoint(text):
            return text  # no character of it begins a stop string
        held = self._held + text
        for end in range(len(self._held) + 1, len(held) + 1):
            self._node = self._step(self._node, held[end - 1])
            self.matched = self._stop[self._node]
            if self.matched is not None:
                self._held = ""
                return held[: end if self._include_stop else end - len(self.matched)]
        keep = len(held) - self._depth[self._node]
        self._held = held[keep:]
        return held[:keep]

    def finish(self) -> str:
        """Return what is held back when the text ends without a stop string."""
        text, self._held, self._node = self._held, "", 0
        return text

"""Which sequences share which pages: cached prefixes, and those that are about to be. No JAX import.

A sequence's full pages are its blocks; see `pages` for their digests. Blocks are shared `grain` at a time: 1, or the
pages of a prefill chunk where a token's numbers must not depend on where its chunk began.

While a prefill runs, the blocks that it will share are announced, so that other sequences with the same beginning wait
for them rather than compute them too.
"""

from qwen3_jax.engine.pages import Pages, block_digest, root_digest
from qwen3_jax.engine.sequence import Sequence


class Prefixes:
    """The shared prefixes of one cache."""

    def __init__(self, pages: Pages, *, page_tokens: int, grain: int, enabled: bool):
        self.pages = pages
        self.page_tokens = page_tokens
        self.grain = grain
        self.enabled = enabled
        self.announced: dict[bytes, Sequence] = {}  # digest: the running prefill that will share it

    def cached(self, sequence: Sequence, target: int) -> list[int]:
        """Return the pages of its longest cached prefix, at least one token short of `target`: something must draw."""
        if not self.enabled:
            return []
        found = self.pages.longest(self._digest(sequence, block) for block in range(self._whole(target - 1)))
        return found[: len(found) // self.grain * self.grain]

    def promises_more(self, sequence: Sequence, target: int, shared: int) -> bool:
        """Whether waiting would give a sequence more of its prefix than the blocks that it could share now."""
        if not self.announced or shared >= self._whole(target - 1):
            return False
        sequence.awaited = self._digest(sequence, shared)
        return self.awaits(sequence)

    def awaits(self, sequence: Sequence) -> bool:
        """Whether the block that a sequence waits for is still to come.

        Nobody waits for a prefill of worse priority: it may not get its turn.
        """
        other = self.announced.get(sequence.awaited)
        return other is not None and other.priority <= sequence.priority

    def announce(self, sequence: Sequence) -> None:
        """Let others wait for the blocks that this prefill will share."""
        if not self.enabled:
            return
        sequence.announced = self._whole(sequence.target)
        for block in range(sequence.registered, sequence.announced):
            digest = self._digest(sequence, block)
            other = self.announced.get(digest)
            if other is None or other.priority > sequence.priority:
                self.announced[digest] = sequence

    def withdraw(self, sequence: Sequence, end: int | None = None) -> None:
        """End the announcement of blocks, up to `end`: they are shared now, or never will be."""
        end = sequence.announced if end is None else min(end, sequence.announced)
        for digest in sequence.digests[sequence.registered : end]:
            if self.announced.get(digest) is sequence:
                del self.announced[digest]

    def register(self, sequence: Sequence, end: int) -> None:
        """Share the blocks of a running sequence that are full when its known tokens up to position `end` are
        written."""
        blocks = self._whole(end)
        if not self.enabled or blocks <= sequence.registered:
            return
        self.withdraw(sequence, blocks)
        for block in range(sequence.registered, blocks):
            self.pages.register(sequence.pages[block], self._digest(sequence, block))
        sequence.registered = blocks

    def _whole(self, positions: int) -> int:
        """Return how many blocks these positions fill, of those shared together only all or none."""
        return positions // self.page_tokens // self.grain * self.grain

    def _digest(self, sequence: Sequence, block: int) -> bytes:
        """Return the digest of a full block whose tokens are known, computing those before it if need be."""
        digests = sequence.digests
        size, prompt = self.page_tokens, sequence.prompt
        for at in range(len(digests) * size, (block + 1) * size, size):
            parent = digests[-1] if digests else root_digest(sequence.salt)
            tokens = prompt[at : at + size]
            if len(tokens) < size:
                tokens = [sequence.token(position) for position in range(at, at + size)]
            digests.append(block_digest(parent, tokens))
        return digests[block]

"""Which pages of the KV cache hold what: reference counts, and the prefixes that can be used again. No JAX import.

A page holds the keys and values of `page_tokens` consecutive positions, of every layer. It is free, in use by one or
more sequences, or cached: in use by nobody, but still holding a prefix that a later sequence may share. Cached pages
are taken, least recently used first, when the free ones run out.

A full page is known by the digest of everything that its contents depend on: the salt and all tokens up to its end.
Digests are chained, each over its parent's, so equal digests mean equal prefixes, and a salt parts whole trees.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

_ROOT = b"qwen3_jax.prefix.root\0"
_BLOCK = b"qwen3_jax.prefix.block\0"


class OutOfPages(RuntimeError):
    """More pages were taken than are free or cached; whoever takes asks `available` first."""


def root_digest(salt: str) -> bytes:
    """Return the parent of a sequence's first block: SHA-256 of the salt under a tag that no block carries."""
    return hashlib.sha256(_ROOT + salt.encode("utf-8", "surrogatepass")).digest()


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return SHA-256 of a tag, the parent's 32 bytes and the token ids as 64-bit integers."""
    return hashlib.sha256(_BLOCK + parent + array("q", tokens).tobytes()).digest()


class Pages:
    """The pages of one cache, numbered 0 to total - 1. Every operation is O(pages that it names)."""

    def __init__(self, total: int):
        self.total = total
        self.users = [0] * total  # sequences that hold each page
        self.evictions = 0  # cached pages given to somebody else
        self._free = list(range(total - 1, -1, -1))
        self._digests: list[bytes | None] = [None] * total
        self._pages: dict[bytes, int] = {}  # digest: page that holds it
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached pages, least recently used first

    @property
    def available(self) -> int:
        """Pages that `take` can hand out: free or cached."""
        return len(self._free) + len(self._unused)

    @property
    def cached(self) -> int:
        """Pages in use by nobody that hold a prefix."""
        return len(self._unused)

    def take(self, count: int) -> list[int]:
        """Hand out pages with one user each, evicting cached ones if need be.

        Raises:
            OutOfPages: fewer are available.
        """
        if count > self.available:
            raise OutOfPages(f"{count} pages wanted, {self.available} of {self.total} available")
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._unused.popitem(last=False)
                self._unlist(page)
                self.evictions += 1
            self.users[page] = 1
            taken.append(page)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Add a user to pages that `longest` found."""
        for page in pages:
            if self.users[page] == 0:
                del self._unused[page]
            self.users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Remove a user from a sequence's pages. The last ones become the first to be evicted: a prefix outlives
        what continues it."""
        for page in reversed(pages):
            if self.users[page] < 1:
                raise RuntimeError(f"page {page} is released but has no user")
            self.users[page] -= 1
            if self.users[page] == 0:
                if self._digests[page] is None:
                    self._free.append(page)
                else:
                    self._unused[page] = None

    def longest(self, digests: Iterable[bytes]) -> list[int]:
        """Return the pages of the longest prefix of these chained digests that is held."""
        found = []
        for digest in digests:
            page = self._pages.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def register(self, page: int, digest: bytes) -> None:
        """Say what a full page in use holds. Nothing changes if the same is held already, here or by another page."""
        if self.users[page] < 1:
            raise RuntimeError(f"page {page} is registered but has no user")
        if self._digests[page] is None and digest not in self._pages:
            self._digests[page] = digest
            self._pages[digest] = page

    def forget(self, pages: Iterable[int]) -> None:
        """Never find these pages again; those in use stay so."""
        for page in pages:
            if self._digests[page] is not None:
                self._unlist(page)
                if self.users[page] == 0:
                    del self._unused[page]
                    self._free.append(page)

    def clear(self) -> None:
        """Forget every prefix."""
        self.forget(list(self._pages.values()))

    def digest(self, page: int) -> bytes | None:
        """Return what a page is registered to hold."""
        return self._digests[page]

    def _unlist(self, page: int) -> None:
        digest = self._digests[page]
        assert digest is not None
        del self._pages[digest]
        self._digests[page] = None

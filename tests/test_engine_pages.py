"""The page pool against a model of it that is a list of states, and digests against their formula."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_jax.engine.pages import OutOfPages, Pages, block_digest, root_digest


def test_digests_are_chained_and_parted_by_salt():
    root = root_digest("tenant")
    assert root == hashlib.sha256(b"qwen3_jax.prefix.root\0tenant").digest()
    block = block_digest(root, [1, 2**40])
    assert block == hashlib.sha256(b"qwen3_jax.prefix.block\0" + root + struct.pack("<2q", 1, 2**40)).digest()
    assert len({root_digest(salt) for salt in ("", "a", "b", "a\0", "\ud800")}) == 5
    # A salt cannot play a block: their tags differ in more than what a salt can add.
    assert not (b"qwen3_jax.prefix.block\0").startswith(b"qwen3_jax.prefix.root\0")
    assert block_digest(block_digest(root, [1]), [2]) != block_digest(root, [1, 2])


def test_the_least_recently_used_leaf_goes_first():
    pages = Pages(4)
    chain = [bytes([n]) * 32 for n in range(4)]
    first = pages.take(3)
    for page, digest in zip(first, chain, strict=False):
        pages.register(page, digest)
    pages.release(first)
    assert (pages.available, pages.cached) == (4, 3)
    pages.take(1)  # the one that was never used
    assert pages.longest(chain) == first
    pages.take(1)
    assert pages.longest(chain) == first[:2]  # the end of the prefix went
    assert pages.evictions == 1
    pages.share(pages.longest(chain[:1]))
    assert pages.take(1) == [first[1]]
    with pytest.raises(OutOfPages, match="1 pages wanted, 0 of 4"):
        pages.take(1)
    assert pages.longest(chain) == first[:1]


def test_misuse_is_an_error():
    pages = Pages(2)
    (page,) = pages.take(1)
    pages.release([page])
    with pytest.raises(RuntimeError, match="no user"):
        pages.release([page])
    with pytest.raises(RuntimeError, match="no user"):
        pages.register(page, b"")


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release", "register", "forget"]), st.integers(0, 7))))
def test_a_page_is_free_used_or_cached_and_nothing_else(actions):
    pages = Pages(5)
    held: list[int] = []  # one entry per user
    named: dict[bytes, int] = {}
    order: list[int] = []  # cached pages, oldest first
    for action, n in actions:
        digest = bytes([n]) * 32
        page = held[n % len(held)] if held else None
        if action == "take":
            wanted = n % 3
            if wanted > 5 - len(set(held)):
                with pytest.raises(OutOfPages):
                    pages.take(wanted)
                continue
            free = 5 - len(set(held)) - len(order)
            for _ in range(max(0, wanted - free)):
                gone = order.pop(0)
                named = {d: p for d, p in named.items() if p != gone}
            taken = pages.take(wanted)
            assert not set(taken) & (set(held) | set(order))
            assert len(set(taken)) == wanted
            held += taken
        elif action == "share":
            found = pages.longest([digest])
            assert found == ([named[digest]] if digest in named else [])
            pages.share(found)
            held += found
            order = [p for p in order if p not in found]
        elif action == "release" and page is not None:
            pages.release([page])
            held.remove(page)
            if page not in held and page in named.values():
                order.append(page)
        elif action == "register" and page is not None:
            pages.register(page, digest)
            if digest not in named and page not in named.values():
                named[digest] = page
        elif action == "forget" and digest in named:
            gone = named.pop(digest)
            pages.forget([gone])
            order = [p for p in order if p != gone]
        assert pages.users == [held.count(p) for p in range(5)]
        assert (pages.available, pages.cached) == (5 - len(set(held)), len(order))
        assert {p: pages.digest(p) for p in range(5)} == {p: None for p in range(5)} | {p: d for d, p in named.items()}

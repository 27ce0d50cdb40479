"""A row's text as its tokens arrive: for every split of them, what decoding them all and searching for stops gives."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.reply import Completion, Piece, Reply, Timings, TokenLogprob, logprobs_of
from qwen3_jax.request import Request
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.steps import BROKEN, IDLE, emitted_ids
from qwen3_jax.text.thinking import ThinkingIds
from tests.test_text_stream import cut
from tests.text_folders import ours

LIMIT = 12


def clock() -> Timings:
    return Timings(0.0, 0.0, 0.0, 2.0, 0.0, 0.0)


def request_of(params: SamplingParams, **changes: Any) -> Request:
    end = ours().stop_ids[0]
    return Request(**{"prompt": [5], "params": params, "seed": 0, "stop_ids": (end,), "limit": LIMIT} | changes)


def told(request: Request, parts: list[list[int]], tags: ThinkingIds | None = None) -> tuple[list[Piece], Completion]:
    """Give a reply its tokens part by part, whatever lies behind its end too."""
    reply, pieces = Reply(ours(), tags, 0, request), []
    for part in parts:
        if reply.completion is None:
            pieces += reply.take(part, [TokenLogprob(i, -1.0) for i in part], clock)
    if reply.completion is None:
        pieces += reply.end("abort", clock)
    assert reply.completion is not None
    assert reply.length == len(reply.completion.token_ids)
    return pieces, reply.completion


def text_of(pieces: list[Piece], label: str) -> str:
    return "".join(text for which, text in pieces if which == label)


def expected(ids: list[int], stops: list[str], end: int) -> tuple[str, tuple[int, ...], str, str | int | None]:
    """Return text, ids, finish_reason and stop_reason, found by decoding ever longer beginnings."""

    def decode(n: int) -> str:
        return ours().decode(ids[:n], skip_special_tokens=True)

    for n, token in enumerate(ids[:LIMIT], 1):
        if token == end:
            return decode(n - 1), tuple(ids[:n]), "stop", end
        text = decode(n)
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
        if found:
            until, _, stop = min(found)
            return text[: until - len(stop)], tuple(ids[:n]), "stop", stop
        if n == LIMIT:
            return text, tuple(ids[:n]), "length", None
    return decode(len(ids)), tuple(ids), "abort", None


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_split_gives_what_decoding_and_searching_gives(data):
    end = ours().stop_ids[0]
    words = st.sampled_from([i for text in ("a b ab", "the ähm 😀 …") for i in ours().encode(text)])
    ids = data.draw(st.lists(words | st.integers(0, 255) | st.just(end), max_size=LIMIT + 3))
    stops = data.draw(st.lists(st.sampled_from(["a", "ab", " b", "b a", "m 😀", "xyz"]), max_size=3, unique=True))
    request = request_of(SamplingParams(stop=tuple(stops), logprobs=0), raw=True)
    pieces, completion = told(request, cut(data, ids))
    text, tokens, reason, stop = expected(ids, stops, end)
    assert text_of(pieces, "answer") == completion.answer == text
    assert completion.reasoning == ""
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == (tokens, reason, stop)
    assert completion.logprobs == tuple(TokenLogprob(i, -1.0) for i in tokens)
    assert completion.timings.tokens_per_s == max(0, len(tokens) - 1) / 2


@given(data=st.data(), opened=st.booleans())
@settings(max_examples=100, deadline=None)
def test_thinking_and_least_tokens_do_not_depend_on_the_split(data, opened):
    tags = ThinkingIds.of(ours())
    assert tags is not None
    words = st.sampled_from([tags.open_id, tags.close_id, *ours().encode("a\n\n b"), 0xC3, 0xA4])
    ids = data.draw(st.lists(words, max_size=LIMIT))
    params = SamplingParams(stop=data.draw(st.sampled_from([(), ("a",), ("\n b", "\n")])), min_tokens=3)
    request = request_of(params, prompt=[tags.open_id] if opened else [5], thinks=True)
    (pieces, completion), (others, other) = told(request, cut(data, ids), tags), told(request, [[i] for i in ids], tags)
    assert completion == other
    for label, whole in (("reasoning", completion.reasoning), ("answer", completion.answer)):
        assert text_of(pieces, label) == text_of(others, label) == whole


def test_a_take_joins_its_text_by_label():
    tags = ThinkingIds.of(ours())
    assert tags is not None
    part = ours().encode("<think>ab cd</think>ef gh")
    for stop in ((), ("zz",)):
        pieces, _ = told(request_of(SamplingParams(stop=stop)), [part], tags)
        assert pieces[:2] == [("reasoning", "ab cd"), ("answer", "ef gh")]


def test_what_a_call_emitted_for_a_row():
    assert emitted_ids([3, 4, 5]) == ([3, 4, 5], False)
    assert emitted_ids([3, IDLE, IDLE]) == ([3], False)
    assert emitted_ids([3, BROKEN, IDLE]) == ([3], True)
    assert emitted_ids([BROKEN]) == ([], True)


@pytest.mark.parametrize("wanted", [None, 0, 2])
def test_log_probabilities_of_a_row(wanted):
    """Read from the middle of a call, by plain indexing."""
    rng = np.random.default_rng(0)
    emitted = {
        "logprob": rng.normal(size=(4, 3)).astype(np.float32),
        "top_ids": rng.integers(0, 9, (4, 3, 5)),
        "top_logprobs": rng.normal(size=(4, 3, 5)).astype(np.float32),
    }
    found = logprobs_of(emitted, 2, [7, 8], wanted, at=1)
    if wanted is None:
        assert found == []
        return
    for i, entry in enumerate(found, 1):
        top = tuple((int(emitted["top_ids"][i, 2, k]), float(emitted["top_logprobs"][i, 2, k])) for k in range(wanted))
        assert entry == TokenLogprob(6 + i, float(emitted["logprob"][i, 2]), top)
    assert len(found) == 2

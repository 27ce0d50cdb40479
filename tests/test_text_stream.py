"""Text as it arrives: detokenisation, stop strings and thinking against the same thing done at once."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.text.detokenize import Detokenizer, StopStrings
from qwen3_jax.text.thinking import STOP_TEXT, ThinkingIds, ThinkingStream, Thought, split
from qwen3_jax.text.tokenizer import Tokenizer
from tests.text_folders import DEMO, RELEASED, each_folder, ours, released, theirs


def cut(data, items):
    """Cut a list into consecutive parts, some empty."""
    at = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=6)))
    return [items[a:b] for a, b in zip([0, *at], [*at, len(items)], strict=True)]


# ---- detokenisation


@each_folder
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_pieces_join_to_the_text_of_all_ids(folder, data):
    tokenizer = ours(folder)
    top = tokenizer.vocab_size
    single_bytes = st.integers(0, 255)  # the first 256 ids are bytes: parts of characters, valid or not
    texts = st.text(max_size=6).map(tokenizer.encode)
    anything = st.lists(single_bytes | st.integers(0, top - 1) | st.integers(top - 26, top + 40), max_size=4)
    ids = [i for part in data.draw(st.lists(texts | anything, max_size=6)) for i in part]
    skip = data.draw(st.booleans())
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [stream.feed(part) for part in cut(data, ids)]
    known = [i for i in ids if i < top]
    whole = theirs(folder).decode(known, skip_special_tokens=skip)
    assert whole.startswith("".join(pieces))
    assert "".join([*pieces, stream.finish()]) == whole


@each_folder
@given(text=st.text(min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_no_piece_holds_half_a_character(folder, text):
    ids = ours(folder).encode(text.replace("\ufffd", ""))
    stream = Detokenizer(ours(folder))
    assert all("\ufffd" not in stream.feed([i]) for i in ids)
    assert stream.finish() == ""


def test_a_character_comes_when_its_last_byte_does():
    tokenizer = ours()
    ids = [i for c in "ðŁĺĢ" if (i := tokenizer.token_id(c)) is not None]  # the four bytes of 😀
    stream = Detokenizer(tokenizer)
    assert [stream.feed([i]) for i in ids] == ["", "", "", "😀"]
    assert stream.feed([ids[0], tokenizer.special["<|im_end|>"]]) == "\ufffd<|im_end|>"
    assert (stream.feed(ids[:2]), stream.finish(), stream.finish(), stream.feed([64])) == ("", "\ufffd", "", "a")


# ---- stop strings


def first_stop(text, stops, include):
    """The obvious oracle: the text up to the first completed stop string, and that string (the longest of several)."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    text=st.text("ab<", max_size=30),
    stops=st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_exactly_for_every_split(text, stops, include, data):
    matcher = StopStrings(stops, include_stop=include)
    seen = out = ""
    for piece in cut(data, text):
        seen += piece
        out += matcher.feed(piece)
        if matcher.matched is None:  # what is held back is no longer than it must be
            held = next(
                n for n in range(len(seen), -1, -1) if any(s.startswith(seen[len(seen) - n :]) for s in [*stops, ""])
            )
            assert out == seen[: len(seen) - held]
    out += matcher.finish()
    assert (out, matcher.matched) == first_stop(text, stops, include)


def test_stop_strings_across_tokens():
    matcher = StopStrings(["<|im_end|>", "\n\nUser:"])
    assert [matcher.feed(p) for p in ("Hi\n", "\nUs", "e", "s\n\nUser", ": x", "more")] == [
        "Hi",
        "",
        "",
        "\n\nUses",
        "",
        "",
    ]
    assert (matcher.matched, matcher.finish()) == ("\n\nUser:", "")


def test_many_stop_strings_on_a_long_text():
    """Self-overlapping stops on the text they almost match: linear work, every character passed on once."""
    text = "a" * 100_000
    matcher = StopStrings(["a" * 500 + "b", "a" * 499 + "c"])
    out = "".join(matcher.feed(text[i : i + 7]) for i in range(0, len(text), 7))
    assert len(out) == len(text) - 500
    assert out + matcher.finish() == text


@pytest.mark.parametrize("stops", ["stop", [""], [3], ["a", None]])
def test_bad_stop_strings(stops):
    with pytest.raises(ValueError, match="stop strings"):
        StopStrings(stops)


# ---- thinking


def part(text: str) -> list[int]:
    return ours().encode(text)


OUTPUTS = {
    "thinking": ("<think>\nr\n\ns\n</think>\n\nanswer\n", False, Thought("r\n\ns", "answer\n")),
    "opened by the prompt": ("r\n</think>\n\nanswer", True, Thought("r", "answer")),
    "opened by the prompt, with newlines": ("\n\nr\n</think>answer", True, Thought("r", "answer")),
    "empty block": ("<think>\n\n</think>\n\nanswer", False, Thought("", "answer")),
    "no thinking": ("\n\nanswer\n", False, Thought("", "\n\nanswer\n")),
    "unfinished": ("<think>\nr and\n", False, Thought("r and", "", finished=False)),
    "unfinished, opened by the prompt": ("r and", True, Thought("r and", "", finished=False)),
    "only opened": ("<think>", False, Thought("", "", finished=False)),
    "nothing": ("", False, Thought("", "")),
    "text before the block": ("\nwell <think>r</think>a", False, Thought("r", "\nwell a")),
    "end of turn": ("<think>\nr\n</think>\n\na<|im_end|>", False, Thought("r", "a")),
    "tool call": ("<think>\nr\n</think>\n\n<tool_call>\n{}\n</tool_call><|im_end|>", False, None),
    "no answer": ("<think>\nr\n</think>\n\n<|im_end|>", False, Thought("r", "")),
    "tag inside": ("<think>\na <think> b\n</think>\n\nc", False, Thought("a <think> b", "c")),
}


@pytest.mark.parametrize(("text", "opened", "expected"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_split_and_stream(text, opened, expected):
    ids = part(text)
    thought = split(ours(), ids, opened=opened)
    if expected is not None:
        assert thought == expected
    else:
        assert thought == Thought("r", "<tool_call>\n{}\n</tool_call>")
    stream = ThinkingStream(ours(), opened=opened)
    pieces = [p for i in ids for p in stream.feed([i])] + stream.finish()
    assert joined(pieces) == (thought.reasoning, thought.answer)


def joined(pieces):
    assert all(text for _, text in pieces)
    return tuple("".join(t for label, t in pieces if label == which) for which in ("reasoning", "answer"))


@given(data=st.data(), opened=st.booleans(), closed=st.booleans())
@settings(max_examples=200, deadline=None)
def test_stream_equals_split_for_every_split(data, opened, closed):
    tags = ThinkingIds.of(ours())
    assert tags is not None
    bytes_and_newlines = st.lists(
        st.integers(0, 255) | st.sampled_from(part("\n") + part("\n\n") + part("x")), max_size=6
    )
    before, inside, after = (data.draw(bytes_and_newlines) for _ in range(3))
    ids = ([] if opened else [*before, tags.open_id]) + inside + ([tags.close_id, *after] if closed else [])
    stream = ThinkingStream(ours(), opened=opened)
    pieces = [p for some in cut(data, ids) for p in stream.feed(some)] + stream.finish()
    thought = split(ours(), ids, opened=opened)
    assert joined(pieces) == (thought.reasoning, thought.answer)
    assert thought.finished == closed


def test_the_last_closing_tag_counts():
    assert split(ours(), part("<think>a</think>b</think>c")) == Thought("a</think>b", "c")
    assert split(ours(), part("a\n</think>\n\nb")) == Thought("a", "b")  # without being told that it was opened


def test_prompts_that_open_a_block():
    tags = ThinkingIds.of(ours())
    assert tags is not None
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    prompts = {head + "<think>\n": True, head + "<think>": True, head: False, head + "<think>\n\n</think>\n\n": False}
    prompts |= {"": False, head.replace("Hi", "<think>"): False, head + "<think>\nso": False}
    assert {p: tags.opened_by(part(p), ours()) for p in prompts} == prompts


@released
def test_stop_text_of_the_released_tokenizer():
    """The 24 ids of QWEN3.md §4.4."""
    stop = "271 82796 279 7199 882 553 279 1196 11 358 614 311 2968 279 6291 3118 389 279 7274 5961 1431 624 151668 271"
    tags = ThinkingIds.of(ours(RELEASED))
    assert tags == ThinkingIds(151667, 151668, tuple(map(int, stop.split())))


def test_stop_text_closes_the_block():
    tags = ThinkingIds.of(ours())
    assert tags is not None
    assert ours().decode(tags.stop_ids) == STOP_TEXT
    assert tags.stop_ids.count(tags.close_id) == 1


def test_a_tokenizer_without_the_tags():
    """Base and older exports have no thinking tokens: everything is answer."""
    spec = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = spec["added_tokens"][:-2]
    tokenizer = Tokenizer(spec, {})
    assert ThinkingIds.of(tokenizer) is None
    ids = tokenizer.encode("<think>a</think>b")
    for opened in (False, True):
        assert split(tokenizer, ids, opened=opened) == Thought("", "<think>a</think>b")
        stream = ThinkingStream(tokenizer, opened=opened)
        assert joined(stream.feed(ids) + stream.finish()) == ("", "<think>a</think>b")

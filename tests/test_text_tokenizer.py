"""The tokenizer against transformers and tokenizers, and against broken folders."""

import copy
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.text.tokenizer import Tokenizer, TokenizerError
from tests.text_folders import DEMO, RELEASED, each_folder, ours, released, theirs

TEXTS = [
    "",
    " ",
    "Hello, world! 123",
    "it's  we'LL I'm\n\n\n  x\t\ty \r\n z   ",
    "0123456789 ½ Ⅷ ٣ 1e-6 3.14159",
    "naïve café — “quotes” … ﬁ ﬂ Å Ω K",
    unicodedata.normalize("NFD", "naïve Ångström 각 ữ"),
    "你好，世界。こんにちは 안녕하세요 Привет שלום مرحبا नमस्ते สวัสดี",
    "👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 e\u0301 \u200b\u200d\ufeff \u00a0\u3000\u2028",
    "def f(x):\n    return x**2  # ¹²³\n\tif True: pass\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "a<think>b</think>c <tool_call>{}</tool_call><|im_start|><|im_start|> <|im_start",
    "<|fim_prefix|>x<|vision_pad|>< think><think ><THINK>",
    "\0\x01\x7f\x80\x9f\ufffd\ufffe\U0010ffff",
    "a" * 3000 + " " * 3000 + "\n" * 300 + "é" * 1000,
]
TAGS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "\n", " ", "'s", "0", "e\u0301"]
MIXED = st.lists(st.sampled_from(TAGS) | st.text(max_size=8), max_size=8).map("".join)


@each_folder
@pytest.mark.parametrize("text", TEXTS)
def test_equals_transformers(folder, text):
    ids = ours(folder).encode(text)
    assert ids == theirs(folder)(text).input_ids
    for skip in (False, True):
        assert ours(folder).decode(ids, skip_special_tokens=skip) == theirs(folder).decode(
            ids, skip_special_tokens=skip
        )
    assert ours(folder).decode(ids) == unicodedata.normalize("NFC", text)


@each_folder
@given(text=MIXED)
@settings(max_examples=150, deadline=None)
def test_equals_transformers_on_any_text(folder, text):
    ids = ours(folder).encode(text)
    assert ids == theirs(folder)(text).input_ids


@each_folder
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_ids_decode_as_in_transformers_and_by_their_bytes(folder, data):
    tokenizer = ours(folder)
    rows = 2048 if folder == DEMO else 151936  # ids of padded rows included
    top = st.integers(tokenizer.vocab_size - 30, rows - 1)
    ids = data.draw(st.lists(st.integers(0, 300) | st.integers(0, rows - 1) | top, max_size=12))
    for skip in (False, True):
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        known = [i for i in ids if i < tokenizer.vocab_size]
        assert text == theirs(folder).decode(known, skip_special_tokens=skip)
        data = b"".join(tokenizer.token_bytes(i, skip_special_tokens=skip) for i in ids)
        assert text == data.decode("utf-8", "replace")


@each_folder
def test_special_tokens(folder):
    tokenizer, hf = ours(folder), theirs(folder)
    assert len(tokenizer.special) == 26
    assert tokenizer.special == {t.content: i for i, t in hf.added_tokens_decoder.items()}
    assert tokenizer.vocab_size == len(hf)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (hf.eos_token_id, hf.pad_token_id, None)
    assert all(tokenizer.token_id(t) == i == tokenizer.encode(t)[0] for t, i in tokenizer.special.items())
    assert tokenizer.token_id("no such token") is None


@released
def test_known_ids_of_the_released_tokenizer():
    tokenizer = ours(RELEASED)
    assert tokenizer.vocab_size == 151669
    assert tokenizer.encode("Hello, world! 123") == [9707, 11, 1879, 0, 220, 16, 17, 18]
    assert tokenizer.encode(" /no_think") == [608, 2152, 5854, 766]
    assert tokenizer.encode("<think>\n\n</think>\n\n") == [151667, 271, 151668, 271]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (151645, 151643, (151645,))


def test_stop_ids_come_from_generation_config_then_config_then_eos(tmp_path):
    shutil.copytree(DEMO, tmp_path / "m")
    assert Tokenizer.from_folder(tmp_path / "m").stop_ids == (2008, 2006)
    (tmp_path / "m" / "generation_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path / "m").stop_ids == (2008,)
    config = json.loads((DEMO / "config.json").read_text()) | {"eos_token_id": [2006, 2007]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path / "m").stop_ids == (2006, 2007)
    (tmp_path / "m" / "config.json").unlink()
    assert Tokenizer.from_folder(tmp_path / "m").stop_ids == (2008,)


@pytest.mark.parametrize("text", ["\ud800", "abc\udfffdef", "\ude00\ud83d"])
def test_lone_surrogates_are_refused(text):
    with pytest.raises(TokenizerError, match="lone surrogate"):
        ours().encode(text)


@each_folder
def test_long_words_round_trip(folder):
    for word in ("a" * 1_000_000, "ab" * 50_000 + "é" * 50_000, "\0" * 10_000, "e" + "\u0301" * 5_000):
        assert ours(folder).decode(ours(folder).encode(word)) == unicodedata.normalize("NFC", word)


# ---- folders


def write(folder: Path, **files) -> Path:
    """Copy the demo's tokenizer and replace files: a dict is written as JSON, a str as it is, None removes."""
    folder.mkdir()
    for path in DEMO.glob("*.json"):
        shutil.copy(path, folder)
    for name, content in files.items():
        path = folder / f"{name}.json"
        if content is None:
            path.unlink()
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def demo(name: str) -> dict:
    return json.loads((DEMO / f"{name}.json").read_text(encoding="utf-8"))


def edited(name: str, *path, value) -> dict:
    """Return a demo file with one place replaced."""
    root = node = demo(name)
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    return root


def spec(*path, value) -> dict:
    return {"tokenizer": edited("tokenizer", *path, value=value)}


SPLIT_AT = ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex")
FOREIGN = {"id": 2032, "content": "<new>", "special": False}
BROKEN = {
    "missing tokenizer.json": ({"tokenizer": None}, "tokenizer.json: cannot be read"),
    "missing tokenizer_config.json": ({"tokenizer_config": None}, "tokenizer_config.json: cannot be read"),
    "broken json": ({"tokenizer": '{"model": '}, "cannot be read as JSON"),
    "deep json": ({"tokenizer": "[" * 100_000}, "cannot be read as JSON"),
    "array": ({"tokenizer": "[]"}, "expected an object"),
    "empty": ({"tokenizer": "{}"}, "normalizer is not Qwen's"),
    "no model": ({"tokenizer": {k: v for k, v in demo("tokenizer").items() if k != "model"}}, "model"),
    "cyclic merges": (spec("model", "merges", 0, value=["", "a"]), "merge 0"),
    "merge of unknown tokens": (spec("model", "merges", 3, value=["zqzq", "a"]), "merge 3"),
    "merge makes no token": (spec("model", "merges", 5, value=["Q", "Q"]), "makes 'QQ'"),
    "merge of three": (spec("model", "merges", 0, value="a b c"), "merge 0"),
    "merges of numbers": (spec("model", "merges", 0, value=[1, 2]), "merge 0"),
    "huge regex": (spec(*SPLIT_AT, value="(a|b)*" * 1_700_000), "pre_tokenizer is not Qwen's"),
    "slow regex": (spec(*SPLIT_AT, value="(a+)+$"), "pre_tokenizer is not Qwen's"),
    "no split": (spec("pre_tokenizer", value={"type": "Whitespace"}), "malformed|pre_tokenizer"),
    "prefix space": (spec("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True), "pre_tokenizer"),
    "another normalizer": (spec("normalizer", value={"type": "Lowercase"}), "normalizer"),
    "another decoder": (spec("decoder", value={"type": "WordPiece"}), "decoder"),
    "another model": (spec("model", "type", value="WordPiece"), "WordPiece"),
    "dropout": (spec("model", "dropout", value=0.1), "dropout"),
    "prefix": (spec("model", "continuing_subword_prefix", value="##"), "continuing_subword_prefix"),
    "post-processor": (spec("post_processor", value={"type": "RobertaProcessing"}), "RobertaProcessing"),
    "byte missing": (
        spec("model", "vocab", value={k: v for k, v in demo("tokenizer")["model"]["vocab"].items() if k != "a"}),
        "byte tokens are missing, first 'a'",
    ),
    "two tokens with one id": (spec("model", "vocab", "a", value=66), "one to one"),
    "negative id": (spec("model", "vocab", "a", value=-1), "one to one"),
    "id of 4 billion": (spec("added_tokens", 3, "id", value=2**32), "one to one"),
    "string id": (spec("added_tokens", 3, "id", value="771"), r"added_tokens\[3\]"),
    "empty added token": (spec("added_tokens", 3, "content", value=""), r"added_tokens\[3\]"),
    "added token with another id": (spec("added_tokens", 0, "content", value="a"), "gives it 64"),
    "beyond the embedding": (
        spec("added_tokens", value=demo("tokenizer")["added_tokens"] + [FOREIGN])
        | {"config": edited("config", "vocab_size", value=2032)},
        "has 2033 ids but config.json vocab_size is 2032",
    ),
    "surrogate token": (spec("model", "vocab", "\ud800", value=2032), "lone surrogate, U\\+D800"),
    "config disagrees": (
        {"tokenizer_config": edited("tokenizer_config", "added_tokens_decoder", "2007", "content", value="<x>")},
        "'<x>' has id 2007, tokenizer.json gives it None",
    ),
    "eos unknown": ({"tokenizer_config": edited("tokenizer_config", "eos_token", value="<eos>")}, "'<eos>' is not in"),
    "eos a number": ({"tokenizer_config": edited("tokenizer_config", "eos_token", value=3)}, "expected a string"),
    "stop id unknown": ({"generation_config": {"eos_token_id": [2008, 2038]}}, "eos_token_id 2038"),
    "stop id a string": ({"generation_config": {"eos_token_id": "2008"}}, "must be an integer"),
    "broken config": ({"config": "{"}, "config.json: cannot be read as JSON"),
}


@pytest.mark.parametrize(("files", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_folder(tmp_path, files, message):
    with pytest.raises(TokenizerError, match=message) as e:
        Tokenizer.from_folder(write(tmp_path / "m", **files))
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500


def places(node, path=()):
    yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(child, (*path, key))


SMALL = demo("tokenizer")
SMALL["model"]["merges"] = SMALL["model"]["merges"][:2]
SMALL["model"]["vocab"] = {k: v for k, v in SMALL["model"]["vocab"].items() if v < 258}
SMALL["added_tokens"] = [t | {"id": 258 + i} for i, t in enumerate(SMALL["added_tokens"][:4])]
PLACES = [p for p in places(SMALL) if p and (p[:2] != ("model", "vocab") or len(p) < 3 or p[2] in "aĠé")]
JUNK = st.sampled_from([None, True, -1, 0, 2**40, 1.5, "", "a", "\ud800", [], {}, [[]], {"a": {}}, ["a"], [None]])


@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), JUNK), min_size=1, max_size=2))
@settings(max_examples=400, deadline=None)
def test_mutated_files_load_or_raise_the_typed_error(tmp_path_factory, changes):
    mutated = copy.deepcopy(SMALL)
    for path, junk in changes:
        node = mutated
        try:
            for step in path[:-1]:
                node = node[step]
            node[path[-1]] = copy.deepcopy(junk)
        except (TypeError, KeyError, IndexError):
            continue  # the first change took this place away
    folder = tmp_path_factory.mktemp("m")
    (folder / "tokenizer.json").write_text(json.dumps(mutated))
    (folder / "tokenizer_config.json").write_text("{}")
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except TokenizerError:
        return
    assert tokenizer.decode(tokenizer.encode("a é")) == "a é"


def test_post_processor_of_embedding_models(tmp_path):
    """Embedding folders end every text with <|endoftext|>; tokenizers itself is the reference."""
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 1}}, end],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [2006], "tokens": ["<|endoftext|>"]}},
    }
    for step in (processor, {"type": "Sequence", "processors": [demo("tokenizer")["post_processor"], processor]}):
        folder = write(tmp_path / step["type"], **spec("post_processor", value=step))
        reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for flag in (False, True):
            for text in ("", "query: what?"):
                expected = reference.encode(text, add_special_tokens=flag).ids
                assert Tokenizer.from_folder(folder).encode(text, add_special_tokens=flag) == expected

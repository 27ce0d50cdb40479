"""Text ↔ token ids, from the tokenizer.json of a Qwen3 folder.

tokenizer.json is parsed once and checked here; its vocabulary, merges and added tokens then fill Qwen's one pipeline
(NFC → `SPLIT` → byte-level BPE), whose description in the file must be exactly that one. So a folder can neither bring
a regular expression of its own nor a step that would be silently dropped, and the ids equal transformers'
`AutoTokenizer`, which builds the same pipeline from the same three tables.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

# Qwen's split rule: contractions, words with one leading sign, single digits, runs of signs, line ends, blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerError(ValueError):
    """A tokenizer folder that cannot be honoured, or a text that has no UTF-8 form."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map of printable characters to the 256 bytes (byte-level BPE writes its tokens in them)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing, unreadable or malformed file is a `TokenizerError` that names it."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:  # ValueError: malformed JSON or not UTF-8
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise TokenizerError(f"{path}: cannot be read as JSON ({reason})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


class Tokenizer:
    """Encode and decode with the tokenizer of one model folder.

    Attributes: `vocab_size`, the number of ids in use, contiguous from 0 (rows of the embedding beyond it are padding,
    to be masked when sampling); `special` {token: id} of every added token; `eos_id`, `pad_id`, `bos_id` (None when the
    folder names none); `stop_ids`, what generation_config.json lists as eos, else config.json, else `eos_id`.
    """

    def __init__(self, spec: dict[str, Any], settings: dict[str, Any], stop_ids: Iterable[int] | None = None):
        """Build from the parsed tokenizer.json and tokenizer_config.json; a foreign pipeline is a TokenizerError."""
        vocab, merges, added = _tables(spec)
        ids = vocab | {t["content"]: t["id"] for t in added}
        if set(ids.values()) != set(range(len(ids))):
            raise TokenizerError(f"tokenizer.json: {len(ids)} tokens do not number 0..{len(ids) - 1} one to one")
        self.vocab_size = len(ids)
        self.special = {t["content"]: t["id"] for t in added}
        self._prefix, self._suffix = _affixes(spec.get("post_processor"), ids)

        self._backend = backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        backend.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
        backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [
                pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        for t in sorted(added, key=lambda t: t["id"]):
            flags = {k: t.get(k, False) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            token = AddedToken(t["content"], **flags)
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])

        for key, entry in settings.get("added_tokens_decoder", {}).items():
            if ids.get(entry["content"]) != int(key):
                raise TokenizerError(
                    f"tokenizer_config.json: added token {entry['content']!r} has id {key}, "
                    f"tokenizer.json gives it {ids.get(entry['content'])}; re-export the tokenizer"
                )
        self.eos_id, self.pad_id, self.bos_id = (
            self._named(settings, ids, k) for k in ("eos_token", "pad_token", "bos_token")
        )
        stops = (() if self.eos_id is None else (self.eos_id,)) if stop_ids is None else tuple(stop_ids)
        self.stop_ids: tuple[int, ...] = stops
        for stop in stops:
            if not 0 <= stop < self.vocab_size:
                raise TokenizerError(f"eos_token_id {stop} is not an id of the tokenizer (0..{self.vocab_size - 1})")
        skipped = frozenset(t["id"] for t in added if t.get("special"))
        self._bytes = _Bytes(backend, frozenset()), _Bytes(backend, skipped)  # by skip_special_tokens
        self._texts = _Texts(self._bytes[False]), _Texts(self._bytes[True])

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json and tokenizer_config.json (and, when present, config.json and generation_config.json).

        Raises TokenizerError naming the file for anything missing, malformed or not Qwen's pipeline, and for a
        tokenizer with more ids than config.json's `vocab_size` has rows.
        """
        folder = Path(folder)
        spec, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
        stops, rows = None, None
        for name in ("config.json", "generation_config.json"):  # the later file wins, as in transformers
            if (folder / name).is_file():
                config = read_json(folder / name)
                rows = config.get("vocab_size", rows)
                eos = config.get("eos_token_id")
                if eos is not None:
                    stops = eos if isinstance(eos, list) else [eos]
        try:
            if stops is not None and any(type(s) is not int for s in stops):
                raise TokenizerError(f"eos_token_id {stops} must be an integer or a list of integers")
            tokenizer = cls(spec, settings, stops)
        except TokenizerError as e:
            raise TokenizerError(f"{folder}: {e}") from None
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise TokenizerError(
                f"{folder}: tokenizer.json or tokenizer_config.json is malformed ({e!r:.200})"
            ) from None
        if rows is not None and tokenizer.vocab_size > rows:
            raise TokenizerError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} ids but config.json vocab_size is {rows}; "
                "the two files belong to different models"
            )
        return tokenizer

    @staticmethod
    def _named(settings: dict[str, Any], ids: dict[str, int], key: str) -> int | None:
        token = token_text(settings.get(key))
        if token is not None and token not in ids:
            raise TokenizerError(f"tokenizer_config.json: {key} {token!r} is not in tokenizer.json")
        return None if token is None else ids[token]

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Turn text into ids; added tokens spelled out in the text become their single id.

        `add_special_tokens` also adds what the folder's post-processor adds (embedding models end every input with
        `<|endoftext|>`; chat models add nothing). Raises TokenizerError for lone surrogates.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise TokenizerError(f"text holds a lone surrogate {text[e.start]!r} at character {e.start}") from None
        # The batch form leaves out offsets, which nobody asks for: four times as fast on a text of megabytes.
        ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Turn ids into text; broken UTF-8 becomes U+FFFD, ids of padded rows become nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
        """Return the bytes one id stands for; `decode` is the UTF-8 reading of their concatenation."""
        return self._bytes[skip_special_tokens][token_id]

    def token_texts(self, *, skip_special_tokens: bool = False) -> Mapping[int, str | None]:
        """Return each id's own text, None where its bytes are no whole characters; any id may be looked up."""
        return self._texts[skip_special_tokens]

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its exact string, None when there is none."""
        return self._backend.token_to_id(token)


class _Bytes(dict[int, bytes]):
    """The bytes of each id, found when they are first asked for: a dictionary's own look-up serves every later time."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int]):
        self._backend, self._skipped = backend, skipped

    def __missing__(self, token_id: int) -> bytes:
        token = "" if token_id in self._skipped else self._backend.id_to_token(token_id) or ""
        mapped = all(c in BYTE_OF for c in token)  # else an added token with characters outside the byte alphabet
        found = self[int(token_id)] = bytes(BYTE_OF[c] for c in token) if mapped else token.encode()
        return found


class _Texts(dict[int, str | None]):
    """The text of each id whose bytes are whole characters."""

    def __init__(self, known: _Bytes):
        self._known = known

    def __missing__(self, token_id: int) -> str | None:
        try:
            found = self[int(token_id)] = self._known[token_id].decode()
        except UnicodeDecodeError:
            found = self[int(token_id)] = None
        return found


def token_text(value: Any) -> str | None:
    """Read a token of tokenizer_config.json: a string, an AddedToken object, or None."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"tokenizer_config.json: a token is written as {value!r}, expected a string")
    return value


def _tables(spec: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]], list[dict[str, Any]]]:
    """Check tokenizer.json against Qwen's pipeline; return its vocabulary, merges and added tokens."""
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    steps = spec["pre_tokenizer"]["pretokenizers"] if spec.get("pre_tokenizer") else []
    byte_level = steps[1] if len(steps) == 2 else {}
    expected = {
        "normalizer": spec.get("normalizer") == {"type": "NFC"},
        "pre_tokenizer": steps[:1] == [split]
        and (byte_level.get("type"), byte_level.get("add_prefix_space"), byte_level.get("use_regex"))
        == ("ByteLevel", False, False),
        "decoder": (spec.get("decoder") or {}).get("type") == "ByteLevel",
    }
    for step, same in expected.items():
        if not same:
            raise TokenizerError(f"tokenizer.json: {step} is not Qwen's; only Qwen's own pipeline is supported")
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"tokenizer.json: model type {model['type']!r} is not supported, expected 'BPE'")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(key):
            raise TokenizerError(f"tokenizer.json: model.{key} {model[key]!r} is not supported, expected none")

    vocab: dict[str, int] = model["vocab"]
    missing = [c for c in BYTE_OF if c not in vocab]
    if missing:
        raise TokenizerError(f"tokenizer.json: {len(missing)} of the 256 byte tokens are missing, first {missing[0]!r}")
    try:
        "".join(vocab).encode()
    except UnicodeEncodeError as e:
        raise TokenizerError(f"tokenizer.json: a token holds a lone surrogate, U+{ord(e.object[e.start]):X}") from None
    merges = []
    for i, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or not (pair[0] and pair[1] and pair[0] in vocab and pair[1] in vocab):
            raise TokenizerError(f"tokenizer.json: merge {i} {merge!r} is not a pair of tokens")
        if pair[0] + pair[1] not in vocab:
            raise TokenizerError(f"tokenizer.json: merge {i} makes {pair[0] + pair[1]!r}, which is not a token")
        merges.append((pair[0], pair[1]))
    added: list[dict[str, Any]] = spec.get("added_tokens", [])
    for i, token in enumerate(added):
        if type(token.get("id")) is not int or not isinstance(token.get("content"), str) or not token["content"]:
            raise TokenizerError(f"tokenizer.json: added_tokens[{i}] needs an integer id and a non-empty content")
        if vocab.get(token["content"], token["id"]) != token["id"]:
            raise TokenizerError(
                f"tokenizer.json: added token {token['content']!r} has id {token['id']}, "
                f"the vocabulary gives it {vocab[token['content']]}"
            )
    return vocab, merges, added


def _affixes(step: dict[str, Any] | None, ids: dict[str, int]) -> tuple[list[int], list[int]]:
    """Read the ids a post-processor puts before and after a single text."""
    kind = None if step is None else step.get("type")
    if step is None or kind == "ByteLevel":  # moves offsets only
        return [], []
    if kind == "Sequence":
        prefix, suffix = [], []
        for inner in step["processors"]:
            before, after = _affixes(inner, ids)
            prefix, suffix = before + prefix, suffix + after
        return prefix, suffix
    if kind == "TemplateProcessing":
        names = ["" if "Sequence" in part else part["SpecialToken"]["id"] for part in step["single"]]
        at = names.index("")
        return [ids[n] for n in names[:at]], [ids[n] for n in names[at + 1 :]]
    raise TokenizerError(f"tokenizer.json: post_processor type {kind!r} is not supported")

"""Record → token ids and which of them are learned.

A text is learned whole, with `<|endoftext|>` after it. Of a conversation, rendered by the model's own chat template
with the thinking that the template keeps, the assistant's turns are learned: everything after `<|im_start|>assistant`
and its newline, up to and including `<|im_end|>`. The turns are found in the rendered text, which is exact because a
conversation that spells out either mark is refused, and every turn is counted. The text is cut at those places before
it is tokenised, so that the ids before a turn are those of a prompt, and the ids of a turn those that a model has to
write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from qwen3_jax.text.template import ChatTemplate, TemplateError
from qwen3_jax.text.tokenizer import Tokenizer, TokenizerError
from qwen3_jax.train.data.config import DataError
from qwen3_jax.train.data.records import BadRecord

BEGIN, END = "<|im_start|>", "<|im_end|>"
HEADER = f"{BEGIN}assistant\n"
END_OF_TEXT = "<|endoftext|>"
FORMATS = ("text", "messages", "tokens")


class Example(NamedTuple):
    """Inputs, targets [n] int32 and weights [n] float32: position i sees inputs[: i + 1] and learns targets[i]."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)


class Encoder:
    """Turns records into ids for one tokenizer and template."""

    def __init__(self, tokenizer: Tokenizer | None, template: ChatTemplate | None, vocab_size: int):
        self._tokenizer, self._template, self._vocab_size = tokenizer, template, vocab_size
        self._end = None if tokenizer is None else tokenizer.special.get(END_OF_TEXT, tokenizer.eos_id)

    def examples(self, record: Mapping[str, Any], *, length: int, long: str | None, turns: str) -> list[Example]:
        """Encode a record into examples of at most `length` positions.

        Args:
            record: with exactly one of FORMATS among its keys.
            length: of a row.
            long: what to do with more: "skip", "split", "truncate", or None to split all but conversations.
            turns: "all" of the assistant's turns are learned, or the "last".

        Raises:
            BadRecord: the record cannot be used.
            DataError: none of its kind could, for want of a tokenizer or template.
        """
        kinds = [kind for kind in FORMATS if kind in record]
        if len(kinds) != 1:
            raise BadRecord("unknown format", f"keys {sorted(record)[:8]}, expected one of {', '.join(FORMATS)}")
        ids, learned = getattr(self, f"_{kinds[0]}")(record, turns)
        if len(ids) < 2:
            raise BadRecord("empty", "a record needs two tokens")
        if not learned[1:].any():
            raise BadRecord("nothing to learn", "no turn of the assistant")
        if long is None:
            long = "skip" if kinds[0] == "messages" else "split"
        if len(ids) - 1 > length and long == "skip":
            raise BadRecord("too long", f"{len(ids) - 1} positions, a row has {length}")
        if long == "truncate":
            ids, learned = ids[: length + 1], learned[: length + 1]
        whole = Example(ids[:-1], ids[1:], learned[1:].astype(np.float32))
        pieces = (Example(*(part[at : at + length] for part in whole)) for at in range(0, len(whole), length))
        pieces = [piece for piece in pieces if piece.weights.any()]
        if not pieces:
            raise BadRecord("nothing to learn", f"no turn of the assistant in the first {length} tokens")
        return pieces

    def _text(self, record: Mapping[str, Any], turns: str) -> tuple[np.ndarray, np.ndarray]:
        text = record["text"]
        if not isinstance(text, str):
            raise BadRecord("wrong type", f"text is a {type(text).__name__}")
        if not text.strip():
            raise BadRecord("empty")
        ids = self._encode(text) + ([] if self._end is None else [self._end])
        return np.asarray(ids, np.int32), np.ones(len(ids), bool)

    def _tokens(self, record: Mapping[str, Any], turns: str) -> tuple[np.ndarray, np.ndarray]:
        ids = record["tokens"]
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise BadRecord("wrong type", "tokens must be a list of integers")
        outside = next((i for i in ids if not 0 <= i < self._vocab_size), None)
        if outside is not None:
            raise BadRecord("unknown token", f"id {outside}, the vocabulary has {self._vocab_size}")
        return np.asarray(ids, np.int32), np.ones(len(ids), bool)

    def _messages(self, record: Mapping[str, Any], turns: str) -> tuple[np.ndarray, np.ndarray]:
        if self._template is None:
            raise DataError("the data holds messages, the model folder has no chat template: add chat_template.jinja")
        messages, tools = record["messages"], record.get("tools")
        mark = next((text for text in _strings([messages, tools]) if BEGIN in text or END in text), None)
        if mark is not None:
            raise BadRecord("control token", f"{BEGIN} or {END} is spelled out in a message")
        try:
            text = self._template.render(messages, tools, add_generation_prompt=False)
        except TemplateError as error:
            raise BadRecord("template", str(error)) from None
        count = sum(message["role"] == "assistant" for message in messages)
        parts = cut(text, count, last_only=turns == "last")
        encoded = [(self._encode(part), is_learned) for part, is_learned in parts]
        ids = [i for part, _ in encoded for i in part]
        learned = [is_learned for part, is_learned in encoded for _ in part]
        return np.asarray(ids, np.int32), np.asarray(learned, bool)

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise DataError("the data holds text but there is no tokenizer: give a model folder that has one")
        try:
            return self._tokenizer.encode(text)
        except TokenizerError as error:
            raise BadRecord("not UTF-8", str(error)) from None


def cut(text: str, turns: int, *, last_only: bool = False) -> list[tuple[str, bool]]:
    """Cut a rendered conversation into parts, and say which are the assistant's to write.

    Raises:
        BadRecord: the text has another number of assistant turns than `turns`.
    """
    before, *rest = text.split(HEADER)
    if len(rest) != turns or any(END not in turn for turn in rest):
        raise BadRecord("template", f"it wrote {len(rest)} complete turns of the assistant, the record has {turns}")
    parts = [(before + HEADER if rest else before, False)]
    for i, turn in enumerate(rest):
        body, end, after = turn.partition(END)
        final = i == turns - 1
        parts.append((body + end, final or not last_only))
        parts.append((after if final else after + HEADER, False))
    return parts


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)

"""Reasoning and answer of a Qwen3 output, told apart by token ids; the facts of the thinking budget.

A thinking model writes `<think>`, its reasoning, `</think>`, its answer. The 2507-Thinking models are given the opening
tag in the prompt and write only the closing one; `/no_think` answers open with an empty block. What text a message
contains does not matter: only the two token ids are structure.

The budget (technical report §4.3): a row that has generated `budget` tokens after the assistant header, `<think>`
included, without `</think>` or the end of the turn is given the ids of `STOP_TEXT`, and then goes on by itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen3_jax.text.detokenize import Detokenizer
from qwen3_jax.text.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"

# As in Qwen's quickstart, 24 tokens of the released tokenizer (the report prints a stray period after the tag).
STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)


@dataclass(frozen=True)
class ThinkingIds:
    """The ids of `<think>`, `</think>` and of `STOP_TEXT` in one tokenizer."""

    open_id: int
    close_id: int
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ThinkingIds | None":
        """Look the ids up; None when the tokenizer lacks the tags (base, embedding and some older exports)."""
        open_id, close_id = tokenizer.special.get(OPEN), tokenizer.special.get(CLOSE)
        if open_id is None or close_id is None:
            return None
        return cls(open_id, close_id, tuple(tokenizer.encode(STOP_TEXT)))

    def opened_by(self, prompt_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
        """Tell whether a prompt ends in an opening tag and white space, so that the output starts inside reasoning."""
        for token_id in reversed(prompt_ids):
            if tokenizer.token_bytes(token_id).strip():
                return token_id == self.open_id
        return False


@dataclass(frozen=True)
class Thought:
    """An output taken apart. `finished` is False when the output ends inside its reasoning."""

    reasoning: str
    answer: str
    finished: bool = True


def split(
    tokenizer: Tokenizer, ids: Sequence[int], *, opened: bool = False, skip_special_tokens: bool = True
) -> Thought:
    """Split output ids into reasoning and answer.

    The answer is what follows the last `</think>`; the reasoning is what precedes it, without the opening tag, which
    may be missing. An output without `</think>` is all answer, unless it was `opened` by the prompt or opens a block
    itself: then it is unfinished reasoning. Newlines around the block are the template's, and go with its tags.
    """
    tags = ThinkingIds.of(tokenizer)
    ids = list(ids)
    before: list[int] = []
    inside: list[int] = []
    after = ids
    closed = tags is not None and tags.close_id in ids
    if tags is not None:
        end = len(ids) - 1 - ids[::-1].index(tags.close_id) if closed else len(ids)
        start = ids.index(tags.open_id) if not opened and tags.open_id in ids[:end] else None
        if closed or opened or start is not None:
            before, inside = ids[: start or 0], ids[0 if start is None else start + 1 : end]
            after = ids[end + 1 :]
    text = [tokenizer.decode(part, skip_special_tokens=skip_special_tokens) for part in (before, inside, after)]
    answer = text[0] + (text[2].lstrip("\n") if closed else text[2])
    finished = closed or after is ids
    return Thought(text[1].strip("\n"), answer, finished)


Label = Literal["reasoning", "answer"]


class ThinkingStream:
    """Split ids as they arrive into labelled pieces of text.

    Joined by label, the pieces are `split` of all ids whenever the output has one block, as thinking models write it;
    `opened` must be told, since an output without an opening tag cannot be recognised before it ends. Later tags are
    text of the answer; `raw` makes all of them so.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, opened: bool = False, raw: bool = False, skip_special_tokens: bool = True
    ):
        self._tags = None if raw else ThinkingIds.of(tokenizer)
        self._text = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._state: Literal["before", "inside", "after"] = "inside" if opened and self._tags else "before"
        self._blank = self._state == "inside"  # newlines at the start of a part are dropped
        self._newlines = ""  # held back: dropped if the reasoning ends here

    def feed(self, ids: Iterable[int]) -> list[tuple[Label, str]]:
        """Return the labelled text these ids complete, in order."""
        return [*self._pieces(ids)]

    def finish(self) -> list[tuple[Label, str]]:
        """Return what still waits when the output ends."""
        return [*self._emit(self._text.finish())]

    def _pieces(self, ids: Iterable[int]) -> Iterator[tuple[Label, str]]:
        run: list[int] = []
        for token_id in ids:
            turn = self._turn(int(token_id))
            if turn is None:
                run.append(token_id)
                continue
            yield from self._emit(self._text.feed(run) + self._text.finish())
            run, self._state, self._blank, self._newlines = [], turn, True, ""
        yield from self._emit(self._text.feed(run))

    def _turn(self, token_id: int) -> Literal["inside", "after"] | None:
        if self._tags is not None and self._state == "before" and token_id == self._tags.open_id:
            return "inside"
        if self._tags is not None and self._state == "inside" and token_id == self._tags.close_id:
            return "after"
        return None

    def _emit(self, text: str) -> Iterator[tuple[Label, str]]:
        if self._blank:
            text = text.lstrip("\n")
            self._blank = not text
        if self._state == "inside":
            text = self._newlines + text
            kept = text.rstrip("\n")
            text, self._newlines = kept, text[len(kept) :]
        if text:
            yield ("reasoning" if self._state == "inside" else "answer"), text

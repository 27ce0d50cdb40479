"""Reasoning and answer of a Qwen3 output, told apart by token ids; the facts of the thinking budget.

A thinking model writes `<think>`, its reasoning, `</think>`, its answer. The 2507-Thinking models are given the opening
tag in the prompt and write only the closing one; `/no_think` answers open with an empty block. What text a message
contains does not matter: only the two token ids are structure.

The budget (technical report §4.3): a row that has generated `budget` tokens after the assistant header, `<think>`
included, without `</think>` or the end of the turn is given the ids of `STOP_TEXT`, and then goes on by itself.
"""

from collections.abc import Sequence
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

    __slots__ = ("_blank", "_newlines", "_state", "_tags", "_text", "_turn")

    def __init__(
        self, tokenizer: Tokenizer, *, opened: bool = False, raw: bool = False, skip_special_tokens: bool = True
    ):
        self._tags = None if raw else ThinkingIds.of(tokenizer)
        self._text = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._go("inside" if opened and self._tags else "before")

    def feed(self, ids: Sequence[int]) -> list[tuple[Label, str]]:
        """Return the labelled text these ids complete, in order."""
        if self._turn is None or self._turn not in ids:
            return self._emit(self._text.feed(ids))
        at = ids.index(self._turn)
        pieces = self._emit(self._text.feed(ids[:at]) + self._text.finish())
        self._go("inside" if self._state == "before" else "after")
        return pieces + self.feed(ids[at + 1 :])

    def finish(self) -> list[tuple[Label, str]]:
        """Return what still waits when the output ends."""
        return self._emit(self._text.finish())

    def _go(self, state: Literal["before", "inside", "after"]) -> None:
        self._state: Literal["before", "inside", "after"] = state
        self._blank = state != "before"  # newlines at the start of a part are dropped
        self._newlines = ""  # held back: dropped if the reasoning ends here
        tags = self._tags
        ends = {} if tags is None else {"before": tags.open_id, "inside": tags.close_id}
        self._turn = ends.get(state)  # the id that ends this part

    def _emit(self, text: str) -> list[tuple[Label, str]]:
        if not text:
            return []
        if self._blank:
            text = text.lstrip("\n")
            self._blank = not text
        if self._state == "inside":
            text = self._newlines + text
            kept = text.rstrip("\n")
            text, self._newlines = kept, text[len(kept) :]
        return [("reasoning" if self._state == "inside" else "answer", text)] if text else []

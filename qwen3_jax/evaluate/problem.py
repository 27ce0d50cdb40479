"""One generated problem: its conversation, a worked solution, and how to read an answer out of free text.

No answer is judged by its wording: `read_*` take the value out of a text in any of the languages, `Problem.check`
compares it with the problem's own.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

Language = Literal["en", "ja", "ko"]
LANGUAGES: tuple[Language, ...] = ("en", "ja", "ko")
Message = dict[str, str]
Value = tuple[int, ...]

HELD_OUT = 16  # one problem in so many is held out of training

WEEKDAYS: dict[Language, tuple[str, ...]] = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "ja": ("月曜日", "火曜日", "水曜日", "木曜日", "金曜日", "土曜日", "日曜日"),
    "ko": ("월요일", "화요일", "수요일", "목요일", "금요일", "토요일", "일요일"),
}
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A question with its solution.

    `messages` end with the user's turn; earlier assistant turns are given. `key` names the problem whatever its
    language and phrasing; `parts` are the keys of simpler problems whose solutions it spells out.
    """

    task: str
    language: Language
    messages: tuple[Message, ...]
    reasoning: str
    answer: str
    value: Value
    key: str
    parts: tuple[str, ...] = ()

    def check(self, text: str) -> bool:
        """Tell whether an answer's text gives the right value."""
        return READERS[self.task](text) == self.value

    @property
    def for_training(self) -> bool:
        """True when neither the problem nor anything its solution spells out is held out."""
        return not any(map(is_held_out, (self.key, *self.parts)))

    def flagged(self, flag: str) -> "Problem":
        """Return the problem with a soft switch, such as "/no_think", after its last user turn."""
        last = self.messages[-1]
        return replace(self, messages=(*self.messages[:-1], {**last, "content": f"{last['content']} {flag}"}))


def is_held_out(key: str) -> bool:
    """Tell by its hash alone whether a problem is kept for evaluation."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % HELD_OUT == 0


def say(language: Language, value: str) -> str:
    """Return the sentence that gives an answer."""
    return {"en": f"The answer is {value}.", "ja": f"答えは{value}です。", "ko": f"답은 {value}입니다."}[language]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def read_last_integer(text: str) -> Value | None:
    """Read the last whole number; "5,003" counts as one."""
    found = re.findall(r"(?<!\d)-?\d+", _plain(text))
    return (int(found[-1]),) if found else None


def read_integers(text: str) -> Value | None:
    """Read all whole numbers, in order."""
    return tuple(map(int, re.findall(r"\d+", text))) or None


def read_weekday(text: str) -> Value | None:
    """Read the last named day of the week, 0 for Monday."""
    at = [(text.rfind(name), day) for names in WEEKDAYS.values() for day, name in enumerate(names) if name in text]
    return (max(at)[1],) if at else None


def read_date(text: str) -> Value | None:
    """Read the last date as (month, day): "April 4", "4月4日", "4월 4일"."""
    months = "|".join(MONTHS)
    found = re.findall(rf"({months}) (\d+)|(\d+) ?[月월] ?(\d+) ?[日일]", text)
    if not found:
        return None
    name, day, month, day_of_month = found[-1]
    return (MONTHS.index(name) + 1, int(day)) if name else (int(month), int(day_of_month))


def _plain(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


READERS: dict[str, Callable[[str], Value | None]] = {
    **dict.fromkeys(("add", "subtract", "multiply", "chain", "story", "compare", "count", "follow"), read_last_integer),
    "sort": read_integers,
    "weekday": read_weekday,
    "date": read_date,
}

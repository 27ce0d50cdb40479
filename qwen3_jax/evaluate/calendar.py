"""Days of the week and dates, some days ahead."""

from random import Random

from qwen3_jax.evaluate.arithmetic import is_table_fact, key_of
from qwen3_jax.evaluate.problem import MONTHS, WEEKDAYS, Language, Problem, say, user

WEEKDAY: dict[Language, tuple[str, ...]] = {
    "en": ("Today is {day}. What day is it in {n} days?", "What day comes {n} days after {day}?"),
    "ja": ("今日は{day}です。{n}日後は何曜日ですか。", "{day}の{n}日後は何曜日ですか。"),
    "ko": ("오늘은 {day}입니다. {n}일 후는 무슨 요일입니까?", "{day}에서 {n}일 후는 무슨 요일입니까?"),
}
DATE: dict[Language, tuple[str, ...]] = {
    "en": ("What date is {n} days after {date}, {year}?", "It is {date}, {year}. What is the date in {n} days?"),
    "ja": ("{year}年{date}の{n}日後は何月何日ですか。", "今日は{year}年{date}です。{n}日後は何月何日ですか。"),
    "ko": ("{year}년 {date}의 {n}일 후는 몇 월 며칠입니까?", "오늘은 {year}년 {date}입니다. {n}일 후는 며칠입니까?"),
}


def month_days(year: int, month: int) -> int:
    """Return the days of a month, 1 for January, between the years 1901 and 2099."""
    return 29 if month == 2 and year % 4 == 0 else (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month - 1]


def date_name(language: Language, month: int, day: int) -> str:
    return {"en": f"{MONTHS[month - 1]} {day}", "ja": f"{month}月{day}日", "ko": f"{month}월 {day}일"}[language]


def month_name(language: Language, month: int) -> str:
    return {"en": MONTHS[month - 1], "ja": f"{month}月", "ko": f"{month}월"}[language]


def weekday(rng: Random, language: Language, scale: int) -> Problem:
    """The day of the week up to 99 days ahead: take ten weeks off, single weeks, then go day by day."""
    names = WEEKDAYS[language]
    day, n = rng.randrange(7), rng.randint(2, 25 * scale - 1)
    left, lines, parts = n, [f"{names[day]}+{n}"], []
    while left >= 7:
        weeks = 70 if left >= 70 else 7
        lines.append(f"{left}-{weeks}={left - weeks}")
        if not is_table_fact("-", left, weeks):
            parts.append(key_of("-", left, weeks))
        left -= weeks
    at = day
    lines.append(f"{names[at]} {left}")
    while left:
        at, left = (at + 1) % 7, left - 1
        lines.append(f"{names[at]} {left}")
    lines.append(f"={names[at]}")
    text = rng.choice(WEEKDAY[language]).format(day=names[day], n=n)
    key = f"weekday {day}+{n}"
    return Problem(
        "weekday", language, (user(text),), "\n".join(lines), say(language, names[at]), (at,), key, tuple(parts)
    )


def date(rng: Random, language: Language, scale: int) -> Problem:
    """The date up to 59 days ahead: add to the day, then take whole months off."""
    year, month = rng.randint(2020, 2031), rng.randint(1, 12)
    day, n = rng.randint(1, month_days(year, month)), rng.randint(2, 15 * scale - 1)
    start, total = date_name(language, month, day), day + n
    lines, parts = [f"{start}+{n}: {day}+{n}={total}"], []
    if not is_table_fact("+", day, n):
        parts.append(key_of("+", day, n))
    at = (year, month)
    while total > (days := month_days(*at)):
        leap = f" {at[0]}" if at[1] == 2 else ""
        lines.append(f"{month_name(language, at[1])}{leap} {days}: {total}-{days}={total - days}")
        parts.append(key_of("-", total, days))
        total -= days
        at = (at[0] + (at[1] == 12), at[1] % 12 + 1)
    lines.append(f"{month_name(language, at[1])} {month_days(*at)}: {total}")
    result = date_name(language, at[1], total)
    lines.append(f"={result}")
    text = rng.choice(DATE[language]).format(date=start, year=year, n=n)
    return Problem(
        "date",
        language,
        (user(text),),
        "\n".join(lines),
        say(language, result),
        (at[1], total),
        f"date {year}-{month}-{day}+{n}",
        tuple(parts),
    )

"""Checks of single values, and how values are shown in a refusal.

A check returns None for a good value, else the end of a sentence that starts "<key> is <value>: ".
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], str | None]


class ConfigError(ValueError):
    """An impossible or unsupported config; `problems` holds one line per problem, the message all of them."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


def wrong(prefix: str, values: Mapping[str, Any], checks: Mapping[str, Check]) -> list[str]:
    """Return a line for every value that its check refuses."""
    return [
        f"{prefix}{name} is {show(value)}: {problem}"
        for name, value in values.items()
        if (problem := checks[name](value))
    ]


def whole(low: int, high: int) -> Check:
    """Accept a whole number from `low` to `high`."""
    return lambda v: None if type(v) is int and low <= v <= high else f"expected a whole number in {low}..{high}"


def real(low: float, high: float, *, closed: bool = False) -> Check:
    """Accept a finite number between `low` (itself allowed only if `closed`) and `high`."""

    def check(v: Any) -> str | None:
        if type(v) in (int, float) and (low < v <= high or (closed and v == low)):  # NaN compares false
            return None
        return f"expected a number {'of at least' if closed else 'above'} {low:g} and at most {high:g}"

    return check


def flag(v: Any) -> str | None:
    """Accept true and false."""
    return None if type(v) is bool else "expected true or false"


def one_of(*values: Any) -> Check:
    """Accept these values only."""
    return lambda v: None if any(same(v, w) for w in values) else "expected " + " or ".join(map(json.dumps, values))


def or_null(check: Check) -> Check:
    """Accept null, too."""
    return lambda v: None if v is None else (problem := check(v)) and f"{problem}, or null"


def some(check: Check) -> Check:
    """Accept a list whose every item passes `check`."""

    def check_list(v: Any) -> str | None:
        if type(v) not in (list, tuple):
            return "expected a list"
        return next((f"{problem} for every item" for item in v if (problem := check(item))), None)

    return check_list


def either(one: Check, many: Check) -> Check:
    """Check a list with `many`, anything else with `one`."""
    return lambda v: many(v) if type(v) in (list, tuple) else one(v)


def same(value: Any, other: Any) -> bool:
    """Compare JSON values without taking true for 1."""
    return (type(value) is bool) == (type(other) is bool) and value == other


def show(value: Any) -> str:
    """Render any value on one short line."""
    if type(value) is int and abs(value) >= 10**40:  # str() of a very long int raises
        return "a number of more than 40 digits"
    try:
        text = (
            {True: "true", False: "false"}[value] if type(value) is bool else "null" if value is None else repr(value)
        )
    except ValueError:  # such a number inside a list
        return f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def short(value: Any) -> Any:
    """Return a whole float as an int, as the released files write it (1000000, not 1000000.0)."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) >= 1e5 else value


LENGTH = whole(1, 2**31 - 1)  # positions are int32

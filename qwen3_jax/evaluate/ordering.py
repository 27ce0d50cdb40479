"""Compare, sort and count: solutions that look at the first item of a list, write what is left, and go on."""

from random import Random

from qwen3_jax.evaluate.problem import Language, Problem, say, user

COMPARE: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        ">": ("Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?"),
        "<": ("Which is smaller, {a} or {b}?", "Which number is less: {a} or {b}?"),
    },
    "ja": {
        ">": ("{a}と{b}ではどちらが大きいですか。", "大きいのは{a}と{b}のどちらですか。"),
        "<": ("{a}と{b}ではどちらが小さいですか。", "小さいのは{a}と{b}のどちらですか。"),
    },
    "ko": {
        ">": ("{a}, {b} 중 더 큰 수는 무엇입니까?", "{a} 또는 {b}, 어느 것이 더 큽니까?"),
        "<": ("{a}, {b} 중 더 작은 수는 무엇입니까?", "{a} 또는 {b}, 어느 것이 더 작습니까?"),
    },
}
SORT: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "up": ("Sort from smallest to largest: {x}", "Put these numbers in ascending order: {x}"),
        "down": ("Sort from largest to smallest: {x}", "Put these numbers in descending order: {x}"),
    },
    "ja": {
        "up": ("小さい順に並べてください: {x}", "次の数を小さい順に並べると?: {x}"),
        "down": ("大きい順に並べてください: {x}", "次の数を大きい順に並べると?: {x}"),
    },
    "ko": {
        "up": ("작은 수부터 차례로 쓰세요: {x}", "다음 수를 작은 순서로 정렬하세요: {x}"),
        "down": ("큰 수부터 차례로 쓰세요: {x}", "다음 수를 큰 순서로 정렬하세요: {x}"),
    },
}
COUNT: dict[Language, tuple[str, ...]] = {
    "en": ("How many times does {w} occur in: {x}", "Count the {w} in: {x}"),
    "ja": ("{w}はいくつありますか: {x}", "{w}の数を数えてください: {x}"),
    "ko": ("{w}가 몇 번 나옵니까: {x}", "{w}의 개수를 세세요: {x}"),
}
LETTERS = ("a", "b", "c", "d", "e")


def compare(rng: Random, language: Language, scale: int) -> Problem:
    """The larger or the smaller of two numbers, which often begin alike."""
    digits = rng.randint(2, scale + 1)
    a = rng.randrange(10 ** (digits - 1), 10**digits)
    b = a
    while a == b:
        if rng.random() < 0.75:
            same = rng.randrange(digits)
            tail = 10 ** (digits - same)
            b = a // tail * tail + rng.randrange(tail) if same else rng.randrange(10 ** (digits - 1), 10**digits)
        else:
            b = rng.randrange(1, 10 ** (scale + 1))
    sign = rng.choice("><")
    lines = []
    left, right = str(a), str(b)
    if len(left) != len(right):
        lines.append(f"{a} {b}: {len(left)}{'<' if a < b else '>'}{len(right)} digits")
    else:
        while left[0] == right[0]:
            lines.append(f"{left} {right}: {left[0]}={right[0]}")
            left, right = left[1:], right[1:]
        lines.append(f"{left} {right}: {left[0]}{'<' if a < b else '>'}{right[0]}")
    value = max(a, b) if sign == ">" else min(a, b)
    lines += [f"{a}{'<' if a < b else '>'}{b}", f"={value}"]
    text = rng.choice(COMPARE[language][sign]).format(a=a, b=b)
    key = f"compare {min(a, b)} {max(a, b)}"
    return Problem("compare", language, (user(text),), "\n".join(lines), say(language, str(value)), (value,), key)


def sort(rng: Random, language: Language, scale: int) -> Problem:
    """Three to six different numbers below 100, up or down."""
    numbers = rng.sample(range(1, 100), rng.randint(3, min(6, scale + 2)))
    way = rng.choice(("up", "down"))
    left, lines, done = list(numbers), [], []
    while left:
        best = min(left) if way == "up" else max(left)
        lines.append(f"{' '.join(map(str, left))}: {best}")
        left.remove(best)
        done.append(best)
    result = " ".join(map(str, done))
    text = rng.choice(SORT[language][way]).format(x=" ".join(map(str, numbers)))
    return Problem(
        "sort",
        language,
        (user(text),),
        "\n".join([*lines, f"={result}"]),
        say(language, result),
        tuple(done),
        f"sort {' '.join(map(str, sorted(numbers)))}",
    )


def count(rng: Random, language: Language, scale: int) -> Problem:
    """How often one of five letters occurs in a row of four to ten."""
    items = rng.choices(LETTERS[: rng.randint(2, 5)], k=rng.randint(4, 2 * scale + 2))
    wanted = rng.choice(items)
    lines, seen = [], 0
    for i, item in enumerate(items):
        seen += item == wanted
        lines.append(f"{' '.join(items[i:])}: {seen}")
    text = rng.choice(COUNT[language]).format(w=wanted, x=" ".join(items))
    key = f"count {wanted} {' '.join(items)}"
    return Problem(
        "count", language, (user(text),), "\n".join([f"{wanted}", *lines, f"={seen}"]), say(language, str(seen)),
        (seen,), key,
    )  # fmt: skip

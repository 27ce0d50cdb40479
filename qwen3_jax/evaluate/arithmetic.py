"""Sums, differences, products and stories about them, worked digit by digit.

A line of a solution is a whole state, so that every step is local: what is left of the numbers, the carry `c` or the
borrow `b`, the digits of the result so far `r`, then the one table fact that the step needs:

    4738+265: 8+5=13
    473+26 c1 r3: 3+6+1=10
    47+2 c1 r03: 7+2+1=10
    4+0 c1 r003: 4+0+1=5
    =5003
"""

from random import Random

from qwen3_jax.evaluate.problem import Language, Problem, say, user

Step = tuple[str, int]  # an operator, "+", "-" or "×", and its right side

ASK: dict[Language, tuple[str, ...]] = {
    "en": ("What is {x}?", "Calculate {x}.", "{x} = ?", "Please compute {x}.", "{x}"),
    "ja": ("{x}はいくつですか。", "{x}を計算してください。", "{x} = ?", "{x}の答えは何ですか。"),
    "ko": ("{x}의 값은 얼마입니까?", "{x}의 값을 계산하세요.", "{x} = ?", "{x}의 답을 알려 주세요."),
}
SPOKEN: dict[Language, dict[str, str]] = {
    "en": {"+": "{a} plus {b}", "-": "{a} minus {b}", "×": "{a} times {b}"},
    "ja": {"+": "{a}足す{b}", "-": "{a}引く{b}", "×": "{a}かける{b}"},
    "ko": {"+": "{a} 더하기 {b}", "-": "{a} 빼기 {b}", "×": "{a} 곱하기 {b}"},
}
FOLLOW: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "+": ("Add {n} to that.", "Now add {n}.", "Plus {n}?"),
        "-": ("Subtract {n} from that.", "Now take away {n}.", "Minus {n}?"),
        "×": ("Multiply that by {n}.", "Now times {n}?"),
    },
    "ja": {
        "+": ("それに{n}を足してください。", "さらに{n}を足すと?"),
        "-": ("そこから{n}を引いてください。", "さらに{n}を引くと?"),
        "×": ("それに{n}をかけてください。", "{n}倍すると?"),
    },
    "ko": {
        "+": ("거기에 {n} 더하세요.", "{n} 더하면 얼마입니까?"),
        "-": ("거기에서 {n} 빼세요.", "{n} 빼면 얼마입니까?"),
        "×": ("거기에 {n} 곱하세요.", "{n}배는 얼마입니까?"),
    },
}
NAMES: dict[Language, tuple[str, ...]] = {
    "en": ("Tom", "Mia", "Ben", "Anna"),
    "ja": ("太郎さん", "花子さん", "健さん"),
    "ko": ("민아", "수지", "지우"),
}
THINGS: dict[Language, tuple[str, ...]] = {
    "en": ("apples", "books", "coins", "cards"),
    "ja": ("りんご", "みかん", "あめ"),
    "ko": ("사과", "쿠키", "구두"),
}
# What happens after "{who} has {a} {things}", and what is asked in the end.
STORY: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "": ("{who} has {a} {things}.",),
        "+": ("{who} buys {n} more.", "{who} finds {n} more."),
        "-": ("{who} gives away {n}.", "{who} loses {n}."),
        "×": ("Each of {n} boxes holds {a} {things}.",),
        "?": ("How many {things} are there now?", "How many {things} are there in total?"),
    },
    "ja": {
        "": ("{who}は{things}を{a}個持っています。",),
        "+": ("{n}個買いました。", "{n}個もらいました。"),
        "-": ("{n}個あげました。", "{n}個なくしました。"),
        "×": ("{things}が{a}個入った箱が{n}箱あります。",),
        "?": ("{things}は今何個ありますか。", "全部で何個ですか。"),
    },
    "ko": {
        "": ("{who}는 {things}를 {a}개 가지고 있습니다.",),
        "+": ("{n}개를 샀습니다.", "{n}개를 받았습니다."),
        "-": ("{n}개를 주었습니다.", "{n}개를 잃었습니다."),
        "×": ("{things}가 {a}개 든 상자가 {n}개 있습니다.",),
        "?": ("{things}는 지금 몇 개입니까?", "모두 몇 개입니까?"),
    },
}


def apply(op: str, a: int, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def key_of(op: str, a: int, b: int) -> str:
    """Name one operation; order does not matter where it does not change the problem."""
    if op != "-" and a < b:
        a, b = b, a
    return f"{a}{op}{b}"


def is_table_fact(op: str, a: int, b: int) -> bool:
    """Tell what every solution uses as one step, and what is therefore never held out."""
    return max(a, b) < (20 if op == "-" else 10)


def digit_by_digit(op: str, a: int, b: int) -> list[str]:
    """Work one operation out; the right side of "×" has one digit. The last line is "=" and the result."""
    lines, carry, done, first = [], 0, "", True
    mark = "b" if op == "-" else "c"
    while a or carry or (op != "×" and b):
        x, y = a % 10, b if op == "×" else b % 10
        state = f"{a}{op}{b}"
        if op == "-":
            x += 10 if x < y + carry else 0
            result = x - y - carry
            fact, digit, following = f"{x}-{y}", result, int(x > 9)
        else:
            result = apply(op, x, y) + carry
            fact, digit, following = f"{x}{op}{y}", result % 10, result // 10
        if not first:
            state += f" {mark}{carry} r{done}"
            fact += f"{'-' if op == '-' else '+'}{carry}"
        lines.append(f"{state}: {fact}={result}")
        done, carry, first = f"{digit}{done}", following, False
        a, b = a // 10, b if op == "×" else b // 10
    return [*lines, f"={int(done or '0')}"]


def work(start: int, steps: list[Step]) -> tuple[int, list[str], list[str]]:
    """Work a chain of operations out from left to right; return its value, its lines and the keys of its parts."""
    value, lines, parts = start, [], []
    for op, n in steps:
        if op == "×" and value > 9 and n > 9:
            tens, units = divmod(n, 10)
            low, high = value * units, value * tens * 10
            lines += [f"{value}×{n} = {value}×{units} + {value}×{tens}0"]
            for digit in (units, tens):
                lines += digit_by_digit("×", value, digit)
                parts.append(key_of("×", value, digit))
            lines += digit_by_digit("+", high, low)
            parts.append(key_of("+", high, low))
        elif op == "×" and n > 9:
            lines += digit_by_digit("×", n, value)
        else:
            lines += digit_by_digit(op, value, n)
        if not is_table_fact(op, value, n):
            parts.append(key_of(op, value, n))
        value = apply(op, value, n)
    return value, lines, parts


def expression(start: int, steps: list[Step]) -> str:
    return str(start) + "".join(f"{op}{n}" for op, n in steps)


def number(rng: Random, scale: int, *, at_least: int = 1) -> int:
    """Draw a number with a random count of digits up to `scale`."""
    while True:
        digits = rng.randint(1, scale)
        n = rng.randrange(10 ** (digits - 1), 10**digits)
        if n >= at_least:
            return n


def _problem(task: str, language: Language, text: str, start: int, steps: list[Step]) -> Problem:
    value, lines, parts = work(start, steps)
    one = len(steps) == 1
    key = key_of(steps[0][0], start, steps[0][1]) if one else expression(start, steps)
    head = [] if task in ("add", "subtract", "multiply") else [expression(start, steps)]
    return Problem(
        task, language, (user(text),), "\n".join(head + lines), say(language, str(value)), (value,), key, tuple(parts)
    )


def _ask(rng: Random, language: Language, start: int, steps: list[Step]) -> str:
    if len(steps) == 1 and rng.random() < 0.3:
        text = SPOKEN[language][steps[0][0]].format(a=start, b=steps[0][1])
    else:
        gap = rng.choice(("", " "))
        sign = rng.choice(("×", "*", "x"))
        text = str(start) + "".join(f"{gap}{sign if op == '×' else op}{gap}{n}" for op, n in steps)
    return rng.choice(ASK[language]).format(x=text)


def draw(rng: Random, op: str, scale: int) -> tuple[int, int]:
    """Draw the two sides of one operation that no table holds and whose result is not negative."""
    while True:
        if op == "×":
            both = scale > 2 and rng.random() < 0.4
            a, b = rng.randrange(11, 100) if both else number(rng, scale, at_least=10), rng.randint(2, 9)
            b = rng.randrange(11, 100) if both else b
            a, b = (b, a) if rng.random() < 0.2 else (a, b)
        else:
            a, b = number(rng, scale), number(rng, scale)
            a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
        if not is_table_fact(op, a, b):
            return a, b


def add(rng: Random, language: Language, scale: int) -> Problem:
    """a + b, up to `scale` digits each."""
    a, b = draw(rng, "+", scale)
    return _problem("add", language, _ask(rng, language, a, [("+", b)]), a, [("+", b)])


def subtract(rng: Random, language: Language, scale: int) -> Problem:
    """a - b, not negative."""
    a, b = draw(rng, "-", scale)
    return _problem("subtract", language, _ask(rng, language, a, [("-", b)]), a, [("-", b)])


def multiply(rng: Random, language: Language, scale: int) -> Problem:
    """a × b: one side has one digit, or both have two."""
    a, b = draw(rng, "×", scale)
    return _problem("multiply", language, _ask(rng, language, a, [("×", b)]), a, [("×", b)])


def _moves(rng: Random, start: int, scale: int, count: int) -> list[Step]:
    """Draw additions and subtractions that never fall below zero."""
    steps: list[Step] = []
    for _ in range(count):
        n = number(rng, scale, at_least=10)
        op = "-" if n < start and rng.random() < 0.5 else "+"
        steps.append((op, n))
        start = apply(op, start, n)
    return steps


def chain(rng: Random, language: Language, scale: int) -> Problem:
    """a ± b ± c, of numbers with two or more digits."""
    start = number(rng, min(scale, 3), at_least=10)
    steps = _moves(rng, start, max(2, min(scale, 3)), 2)
    return _problem("chain", language, _ask(rng, language, start, steps), start, steps)


def story(rng: Random, language: Language, scale: int) -> Problem:
    """A story of one or two changes to a number of things."""
    words = STORY[language]
    fill = {"who": rng.choice(NAMES[language]), "things": rng.choice(THINGS[language])}
    start = number(rng, max(2, min(scale, 3)), at_least=11)
    steps: list[Step] = []
    if rng.random() < 0.3:
        steps.append(("×", rng.randint(2, 9)))
        sentences = [rng.choice(words["×"]).format(a=start, n=steps[0][1], **fill)]
    else:
        sentences = [rng.choice(words[""]).format(a=start, **fill)]
    now = start * (steps[0][1] if steps else 1)
    for op, n in _moves(rng, now, max(2, min(scale, 3)), 1 if steps else rng.randint(1, 2)):
        steps.append((op, n))
        sentences.append(rng.choice(words[op]).format(n=n, **fill))
    sentences.append(rng.choice(words["?"]).format(**fill))
    return _problem("story", language, ("" if language == "ja" else " ").join(sentences), start, steps)


def follow(rng: Random, language: Language, scale: int) -> Problem:
    """A second turn that goes on from the first one's answer."""
    base = rng.choice((add, subtract, multiply))(rng, language, min(scale, 3))
    (before,) = base.value
    if before > 9 and rng.random() < 0.25:
        op, n = "×", rng.randint(2, 9)
    else:
        ((op, n),) = _moves(rng, before, min(scale, 3) if scale > 1 else 2, 1)
    value, lines, parts = work(before, [(op, n)])
    text = rng.choice(FOLLOW[language][op]).format(n=n)
    return Problem(
        "follow",
        language,
        (*base.messages, {"role": "assistant", "content": base.answer}, user(text)),
        "\n".join([expression(before, [(op, n)]), *lines]),
        say(language, str(value)),
        (value,),
        f"{base.key}={before}{op}{n}",
        (base.key, *base.parts, *parts),
    )

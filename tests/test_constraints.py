"""Constrained output against `jsonschema`, `re` and enumeration; hostile grammars, and the process that stays whole."""

import json
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest

from qwen3_jax.text import constraints as module
from qwen3_jax.text.constraints import Constraint, ConstraintError, Constraints, Matcher
from qwen3_jax.text.tokenizer import Tokenizer
from tests.text_folders import DEMO, ours, released

TOKENIZER = ours()
VOCAB = 2048  # the model's rows, 16 more than there are tokens
STOPS = set(TOKENIZER.stop_ids)


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    return Constraints(TOKENIZER, VOCAB)


@pytest.fixture(scope="module")
def unchecked(constraints) -> Constraints:
    """The same without a child process per grammar, for tests of many harmless ones."""
    made = Constraints(TOKENIZER, VOCAB)
    made._check = lambda constraint, timeout_s: 0
    return made


def allowed(matcher: Matcher, rows: int = VOCAB) -> set[int]:
    out = np.full(-(-rows // 32), 0xFFFFFFFF, np.uint32)  # what stood there before must not matter
    matcher.mask(out)
    return {int(i) for i in np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little"))}


def walk(matcher: Matcher, rng: random.Random, *, limit: int = 400, wild: float = 0.5) -> str | None:
    """Draw allowed tokens like an untrained model; None when the limit came first.

    The walk prefers ending, and short tokens half of the time, so that unbounded strings come to an end.
    """
    ids: list[int] = []
    for _ in range(limit):
        can = allowed(matcher)
        assert can, "a row must always have something to draw"
        assert matcher.error is None
        if can & STOPS and (rng.random() < 0.3 or can <= STOPS):
            assert matcher.accept(min(can & STOPS))
            assert matcher.finished
            return b"".join(map(TOKENIZER.token_bytes, ids)).decode()
        texts = sorted(can - STOPS)
        assert max(texts) < TOKENIZER.vocab_size
        assert not set(texts) & set(TOKENIZER.special.values())
        closing = [i for i in texts if TOKENIZER.token_bytes(i)[:1] in b'"}],']
        token = rng.choice(closing if closing and rng.random() > wild else texts)
        assert matcher.accept(token)
        ids.append(token)
    return None


def reject_walks(texts: list[str | None]) -> list[str]:
    """Most walks must have come to an end."""
    ended = [t for t in texts if t is not None]
    assert len(ended) >= 0.8 * len(texts), f"{len(ended)} of {len(texts)} walks ended"
    return ended


SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "union": {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"type": "number", "minimum": -2.5, "maximum": 7}]},
    "one_of": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": "x"}, "n": {"type": "integer"}}, "required": ["k", "n"]},
            {"type": "object", "properties": {"k": {"const": "y"}}, "required": ["k"]},
        ]
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "search": {"type": "string", "pattern": "[0-9]{3}", "maxLength": 8},
    "date": {"type": "string", "format": "date"},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"const": None}], "items": False, "minItems": 2},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
    },
    "open": {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    "all_of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    "exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "enum": {"enum": [1, "two", None, {"three": [3]}, 1.5, '\\"\n/']},
    "any": {},
    "true": True,
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_walks_give_documents_that_jsonschema_accepts(unchecked, name):
    schema = SCHEMAS[name]
    grammar = unchecked.compile(Constraint("json_schema", schema))
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    rng = random.Random(name)
    texts = [walk(grammar.start(), rng, wild=0.1) for _ in range(12)]
    for text in reject_walks(texts):
        validator.validate(json.loads(text))


def test_json_object(unchecked):
    grammar = unchecked.compile(Constraint("json_object"))
    rng = random.Random(0)
    for text in reject_walks([walk(grammar.start(), rng, wild=0.1) for _ in range(12)]):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "name", ["person", "union", "pattern", "search", "tuple", "tree", "all_of", "multiple", "enum"]
)
def test_documents_are_taken_exactly_if_jsonschema_accepts_them(unchecked, name):
    """Instances near the schema, valid and not, written as Qwen3 writes JSON."""
    schema: dict = SCHEMAS[name]
    grammar = unchecked.compile(Constraint("json_schema", schema))
    instances = [
        {"name": "Ada", "age": 3}, {"name": "Ada"}, {"name": "", "age": 3}, {"name": "x" * 13, "age": 3},
        {"name": "Ü😀", "age": 150}, {"name": "a", "age": 151}, {"name": "a", "age": -1}, {"name": "a", "age": 1.5},
        {"name": "a", "age": 1, "tags": ["ü", "b"]}, {"name": "a", "age": 1, "tags": []},
        {"name": "a", "age": 1, "x": 1},
        True, None, 7, 7.01, -2.5, "true", "AB-123", "ab-123", "AB-1234", "x123y", "12", [1, None], [1], [1, None, 2],
        {"v": 1}, {"v": 1, "kids": [{"v": 2, "kids": []}]}, {"v": 1, "kids": [{}]}, 3, 9, 10, 2, 0, 49, 50, 994, 1001,
        1, "two", {"three": [3]}, {"three": [4]}, "\\\"\n/", 1.5,
    ]  # fmt: skip
    validator = jsonschema.Draft202012Validator(schema)
    taken = [x for x in instances if takes(grammar.start(), json.dumps(x, ensure_ascii=False))]
    assert taken == [x for x in instances if validator.is_valid(x)]


def takes(matcher: Matcher, text: str) -> bool:
    """Whether a text is taken whole, token by token, each time as the mask says."""
    for token in (*TOKENIZER.encode(text), min(STOPS)):
        can = token in allowed(matcher)
        assert matcher.accept(token) == can or not can
        if not can:
            return False
    return True


PATTERNS = [
    r"a|bc", r"[a-c]{2,4}", r"^\d{3}-\d{2}$", r"(foo|bar)+", r"x?y*z", r"[^a-z]{3}", r"[a-z]{1,3}@[a-z]+\.com",
    r"a/b\/c", r"(?i:hello)", r"\x41\u00e9", r"é+", r".{2}", r"a\\b", r'"[^"]*"', "line\nbreak",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regular_expressions_match_as_re_fullmatch(unchecked, pattern):
    grammar = unchecked.compile(Constraint("regex", pattern))
    rng = random.Random(pattern)
    for text in reject_walks([walk(grammar.start(), rng) for _ in range(6)]):
        assert re.fullmatch(pattern, text), text
    probes = [
        "a", "bc", "abc", "abca", "123-45", "1234-5", "foo", "foobar", "fo", "xyyz", "z", "xx", "ABC", "a@b.com",
        "a/b/c", "Aé", "HELLO", "éé", "ab", "a\nb", "a\\b", '"q"', "line\nbreak", "😀é",
    ]  # fmt: skip
    for text in probes:
        assert takes(grammar.start(), text) == bool(re.fullmatch(pattern, text)), text


def test_choices_are_taken_exactly(unchecked):
    choices = ["yes", "yes, but", 'quo"te', "back\\slash", "new\nline", "\x00\x7f", "é😀", "a.b*", "</think>", ""]
    grammar = unchecked.compile(Constraint("choice", choices))
    rng = random.Random(1)
    seen = {walk(grammar.start(), rng) for _ in range(60)}
    assert seen <= set(choices)
    assert len(seen) > 5
    for text in choices[:4]:
        assert takes(grammar.start(), text)
    assert not takes(grammar.start(), "yes,")


def test_grammars(unchecked):
    arithmetic = 'start: sum\nsum: num (("+" | "-") num)*\nnum: /[0-9]/+\n'
    gbnf = 'root ::= num (("+" | "-") num)*\nnum ::= [0-9]+\n'
    rng = random.Random(2)
    for text in (arithmetic, gbnf):
        grammar = unchecked.compile(Constraint("grammar", text))
        for said in reject_walks([walk(grammar.start(), rng) for _ in range(8)]):
            assert re.fullmatch(r"[0-9]+([+-][0-9]+)*", said)


TAG = {"begin": "<tool_call>\n{", "content": {"type": "regex", "pattern": "[ab]{2}"}, "end": "}\n</tool_call>"}


def test_structural_tags_name_the_tokenizers_own_tags(constraints):
    form = {"type": "tags_with_separator", "separator": "\n", "tags": [TAG], "at_least_one": True}
    start = constraints.compile(Constraint("structural_tag", {"type": "structural_tag", "format": form})).start
    open_id, close_id = TOKENIZER.special["<tool_call>"], TOKENIZER.special["</tool_call>"]
    assert allowed(start()) == {open_id}
    once = [open_id, *TOKENIZER.encode("\n{ab}\n"), close_id]
    matcher = start()
    for token in [*once, *TOKENIZER.encode("\n"), *once]:
        assert matcher.accept(token)
    assert allowed(matcher) & STOPS
    assert not allowed(matcher) & {open_id}


def test_triggered_tags_leave_other_text_free(constraints):
    value = {"structures": [{"begin": "<f>", "schema": {"enum": [12]}, "end": "</f>"}], "triggers": ["<f"]}
    start = constraints.compile(Constraint("structural_tag", value)).start
    assert takes(start(), "Some text, é, then <f>12</f> and more.")
    assert takes(start(), "nothing at all")
    assert not takes(start(), "then <f>13</f>")


def test_stop_ids_are_allowed_exactly_when_the_text_may_end(constraints):
    matcher = constraints.compile(Constraint("regex", "ab?")).start()
    a, b = (TOKENIZER.encode(c)[0] for c in "ab")
    assert not allowed(matcher) & STOPS
    assert not matcher.accept(min(STOPS))
    assert matcher.accept(a)
    assert allowed(matcher) >= STOPS
    assert not matcher.finished
    assert matcher.accept(b)
    assert allowed(matcher) == STOPS
    assert matcher.finished
    assert matcher.accept(max(STOPS))
    assert not matcher.accept(a)
    assert allowed(matcher) == STOPS
    matcher.rollback(2)
    assert b in allowed(matcher)
    assert not matcher.accept(TOKENIZER.special["<think>"])
    assert not matcher.accept(VOCAB - 1)
    assert not matcher.accept(10**9)
    matcher.rollback(1)
    assert not allowed(matcher) & STOPS
    with pytest.raises(ValueError, match="cannot take back 1 tokens, 0 were accepted"):
        matcher.rollback(1)


def test_rollback_leads_to_the_same_masks(unchecked):
    grammar = unchecked.compile(Constraint("json_schema", SCHEMAS["person"]))
    rng = random.Random(3)
    matcher, masks, tokens = grammar.start(), [], []
    while not matcher.finished and len(tokens) < 60:
        masks.append(allowed(matcher))
        tokens.append(rng.choice(sorted(masks[-1])))
        assert matcher.accept(tokens[-1])
    for _ in range(10):
        n = rng.randint(0, len(tokens))
        matcher.rollback(n)
        for i in range(len(tokens) - n, len(tokens)):
            assert allowed(matcher) == masks[i]
            assert matcher.accept(tokens[i])


B = {"$ref": "#/$defs/b"}
REFUSED: dict[str, Any] = {
    "schema text": (("json_schema", "{"), "is not JSON"),
    "schema list": (("json_schema", []), "must be an object"),
    "schema deep": (("json_schema", json.loads('{"items":' * 70 + "{}" + "}" * 70)), "deeper than 64"),
    "schema deep text": (("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000), "deeper than 64|is not JSON"),
    "schema nan": (("json_schema", {"const": float("nan")}), "JSON"),
    "schema big": (("json_schema", {"enum": ["x" * 10] * 20000}), "at most 131072"),
    "schema false": (("json_schema", False), "no finite document"),
    "schema without end": (
        ("json_schema", {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        "no finite document",
    ),
    "schema of itself": (("json_schema", {"$ref": "#"}), "no finite document"),
    "schema loop": (
        ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [B]}, "b": {"$ref": "#/$defs/a"}}}),
        "no finite document",
    ),
    "schema impossible": (("json_schema", {"type": "integer", "minimum": 3, "maximum": 1}), "Unsatisfiable"),
    "schema not": (("json_schema", {"not": {"type": "string"}}), "Unimplemented"),
    "schema uniqueItems": (("json_schema", {"type": "array", "uniqueItems": True}), "Unimplemented"),
    "schema remote": (("json_schema", {"$ref": "http://127.0.0.1:1/x"}), "does not fetch|not present"),
    "schema file": (("json_schema", {"$ref": "file:///etc/passwd"}), "does not fetch|not present"),
    "schema dangling": (("json_schema", {"$ref": "#/$defs/q"}), "does not exist"),
    "schema options": (("json_schema", {"x-guidance": {"lenient": True}, "not": {}}), "x-guidance"),
    "schema pattern": (("json_schema", {"type": "string", "pattern": "("}), "regex"),
    "schema type": (("json_schema", {"type": "bogus"}), "bogus"),
    "schema surrogate": (("json_schema", '{"const": "\ud800"}'), "surrogate"),
    "regex syntax": (("regex", "("), "unclosed group"),
    "regex look-ahead": (("regex", "(?=a)b"), "look-around"),
    "regex back reference": (("regex", r"(a)\1"), "backreference"),
    "regex empty": (("regex", ""), "non-empty"),
    "regex type": (("regex", 3), "non-empty string"),
    "regex long": (("regex", "a" * 200_000), "at most 131072"),
    "regex impossible": (("regex", "[^\\s\\S]"), "no text fits|cannot be honoured"),
    "choice empty": (("choice", []), "non-empty list"),
    "choice type": (("choice", [1]), "list of strings"),
    "choice many": (("choice", [str(i) for i in range(10_001)]), "at most 10000"),
    "grammar syntax": (("grammar", "?"), "grammar"),
    "grammar start": (("grammar", 'foo: "a"'), "start"),
    "grammar of itself": (("grammar", "start: start"), "cannot be honoured"),
    "grammar special": (("grammar", 'start: "a" <|im_end|> "b"'), "special tokens"),
    "grammar special id": (("grammar", "start: <[2022]>"), "special tokens"),
    "grammar gbnf": (("grammar", "root ::= <|im_end|>"), "grammar"),
    "tag shape": (("structural_tag", {"triggers": []}), "must hold"),
    "tag trigger": (
        ("structural_tag", {"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["b"]}),
        "trigger",
    ),
    "tag format": (("structural_tag", {"format": {"type": "qwen_xml_parameter"}}), "not supported"),
    "tag special": (("structural_tag", {"format": {"type": "const_string", "value": "\x00"}}), "control"),
    "kind": (("guided_nonsense", None), "unknown kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_in_one_line(constraints, name):
    (kind, value), message = REFUSED[name]
    with pytest.raises(ConstraintError, match=message) as e:
        constraints.compile(Constraint(kind, value))
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 400


def chain(n: int) -> dict:
    links = {
        f"a{i}": {"type": "object", "required": ["x"], "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}}
        for i in range(n)
    }
    return {"$ref": "#/$defs/a0", "$defs": links | {f"a{n}": {"type": "integer"}}}


HOSTILE: dict[str, tuple[Any, Any]] = {
    # Each of these overflows llguidance's stack or runs for minutes when it is compiled without protection.
    "references": ("json_schema", chain(250)),
    "rules": ("grammar", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(5000)) + '\nr5000: "a"'),
    "intersection": ("grammar", "start: A\nA: " + " & ".join(f"/(.*a.{{{i}}}b.*)/" for i in range(40))),
    "properties": ("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(9000)}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_and_leave_the_process_whole(constraints, name):
    with pytest.raises(ConstraintError, match=r"within 1 s|too large or too deeply|cannot be honoured") as e:
        constraints.compile(Constraint(*HOSTILE[name]), timeout_s=1.0)
    assert "\n" not in str(e.value)
    assert takes(constraints.compile(Constraint("regex", "ab?")).start(), "ab")


MILD: dict[str, tuple[Any, Any]] = {
    "explosive automaton": ("regex", "((a|b)*a(a|b){20})"),
    "nested quantifiers": ("regex", "(a+)+b"),
    "huge repetition": ("regex", "(a{1000}){1000}"),
    "products": ("regex", "(.{0,300}x){100}"),
    "grammar repetition": ("grammar", 'start: ("a" | "b" "c"?){1000000}'),
}


@pytest.mark.parametrize("name", MILD)
def test_costly_grammars_give_masks_in_bounded_work(constraints, name):
    """Either refused or usable; a limit reached on the way is the matcher's `error`, and the row can still end."""
    try:
        matcher = constraints.compile(Constraint(*MILD[name])).start()
    except ConstraintError:
        return
    rng = random.Random(name)
    for _ in range(100):
        can = allowed(matcher)
        assert can
        if matcher.error is not None:
            assert can == STOPS
            return
        if not can - STOPS:
            return
        assert matcher.accept(rng.choice(sorted(can - STOPS)))


def test_many_schemas_keep_the_cache_and_the_memory_bounded(unchecked):
    def schema(i: int) -> Constraint:
        return Constraint(
            "json_schema", {"type": "object", "properties": {f"p{i}": {"type": "string"}}, "required": [f"p{i}"]}
        )

    process = psutil.Process()
    for i in range(100):
        unchecked.compile(schema(i))
    before = process.memory_info().rss
    for i in range(100, 1000):
        unchecked.compile(schema(i))
    assert len(unchecked._cache) <= module.CACHED
    assert process.memory_info().rss - before < 64 << 20
    assert unchecked.compile(schema(999)) is unchecked.compile(schema(999))


def test_threads_share_a_compiler(constraints):
    def one(i: int) -> list[str]:
        grammar = constraints.compile(Constraint("regex", f"[a-e]{{{i % 3 + 1}}}x"))
        rng = random.Random(i)
        return [text for text in (walk(grammar.start(), rng) for _ in range(5)) if text]

    with ThreadPoolExecutor(8) as pool:
        for i, texts in enumerate(pool.map(one, range(16))):
            assert all(re.fullmatch(f"[a-e]{{{i % 3 + 1}}}x", text) for text in texts)


def test_without_llguidance_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConstraintError, match=r"pip install 'qwen3-jax\[serve\]'"):
        Constraints(TOKENIZER, VOCAB).compile(Constraint("json_object"))


def test_importing_the_module_does_not_import_llguidance():
    code = "import sys, qwen3_jax.text.constraints, qwen3_jax.text.tools; assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokenizers_that_cannot_be_constrained():
    with pytest.raises(ConstraintError, match=f"vocab_size is 64, the tokenizer has {TOKENIZER.vocab_size} ids"):
        Constraints(TOKENIZER, 64)
    spec, settings = (json.loads((DEMO / f).read_text()) for f in ("tokenizer.json", "tokenizer_config.json"))
    endless = Tokenizer(spec, settings, ())
    with pytest.raises(ConstraintError, match="end token"):
        Constraints(endless, VOCAB).compile(Constraint("json_object"))


@released
@pytest.mark.slow
def test_the_released_vocabulary(capsys):
    """151,936 rows, of which 267 have no token; masks in the time of one step."""
    from tests.text_folders import RELEASED

    tokenizer = Tokenizer.from_folder(RELEASED)
    constraints = Constraints(tokenizer, 151_936)
    began = time.perf_counter()
    grammar = constraints.compile(Constraint("json_schema", SCHEMAS["person"]))
    compiled = time.perf_counter() - began
    matcher, out, times = grammar.start(), np.zeros(151_936 // 32, np.uint32), []
    for token in tokenizer.encode('{"name": "Grace", "age": 85, "tags": ["a"]}'):
        began = time.perf_counter()
        matcher.mask(out)
        times.append(time.perf_counter() - began)
        assert matcher.accept(token)
    assert matcher.finished
    with capsys.disabled():
        mean, worst = 1e6 * np.mean(times), 1e6 * max(times)
        print(f"\nfirst grammar {compiled:.2f} s, mask mean {mean:.0f} µs, worst {worst:.0f} µs")

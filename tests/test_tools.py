"""Tool calls: the stream equals the whole-text parse on any split; forced calls are valid by `jsonschema`."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.text.constraints import Constraints
from qwen3_jax.text.tools import Call, CallArguments, CallEnd, CallStart, Text, ToolError, ToolStream, parse
from qwen3_jax.text.tools import tools_constraint as constrain
from tests.text_folders import ours, template

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "minLength": 1, "maxLength": 10},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]


def call(name: str, arguments: dict) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def streamed(pieces: list[str], **options) -> tuple[str, list[Call], list]:
    """Feed the pieces; check the order of events; return content, calls and events."""
    stream = ToolStream(**options)
    events = [e for piece in pieces for e in stream.feed(piece)] + stream.finish()
    content, calls, open_ = "", [], None
    for event in events:
        if isinstance(event, Text):
            assert open_ is None
            assert event.text
            content += event.text
        elif isinstance(event, CallStart):
            assert open_ is None
            assert event.index == len(calls)
            open_ = event.index
            calls.append(Call(event.name, ""))
        else:
            assert event.index == open_
            if isinstance(event, CallArguments):
                calls[-1] = Call(calls[-1].name, calls[-1].arguments + event.text)
            else:
                assert isinstance(event, CallEnd)
                open_ = None
    return content, calls, events


def whole(text: str) -> tuple[str, str, list]:
    """A text that is no call and stays as it is."""
    return text, text, []


def alone(name: str, arguments: dict) -> tuple[str, str, list]:
    return call(name, arguments), "", [(name, arguments)]


TEXTS = {
    "plain": whole("Hello\n\nthere\n"),
    "one": alone("f", {"x": 1}),
    "content first": ("Let me look.\n" + call("f", {}), "Let me look.", [("f", {})]),
    "two": (call("f", {"x": 1}) + "\n" + call("g", {"y": [{}, None]}), "", [("f", {"x": 1}), ("g", {"y": [{}, None]})]),
    "tag in a string": alone("f", {"x": "</tool_call>\n<tool_call>{}"}),
    "quotes and braces": alone("f", {"x": 'a"}{\\"', "ü": "😀\n"}),
    "other order": ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", {"a": 1})]),
    "no arguments": ('<tool_call>\n{"name": "f"}\n</tool_call>', "", [("f", {})]),
    "no closing tag": ('<tool_call>\n{"name": "f", "arguments": {}}', "", [("f", {})]),
    "text after": (call("f", {}) + "\nDone.", "\nDone.", [("f", {})]),
    "not closed": whole('a\n<tool_call>\n{"name": "f", "arguments": {"x'),
    "no object": whole("<tool_call>hello</tool_call>"),
    "nothing": whole("<tool_call>"),
    "not JSON": whole('<tool_call>\n{"name": f}\n</tool_call>'),
    "comma": whole('<tool_call>\n{"name": "f",}\n</tool_call>'),
    "control sign": whole('<tool_call>{"name": "f\n"}'),
    "list": whole("<tool_call>[1]</tool_call>"),
    "name": whole('<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    "arguments": whole('<tool_call>{"name": "f", "arguments": "x"}'),
    "NaN": whole('<tool_call>{"name": "f", "arguments": {"x": NaN}}'),
    "good after bad": ('<tool_call>{"name" <tool_call>{"name": "f"}', '<tool_call>{"name" ', [("f", {})]),
    "part of a tag": whole("if a <tool"),
    "deep": whole('<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 80),
    "far away": whole("<tool_call>" + " " * 20 + '{"name": "f"}'),
}


@pytest.mark.parametrize("name", TEXTS)
def test_whole_and_split(name):
    text, content, calls = TEXTS[name]
    said = parse(text)
    assert said[0] == content
    assert [(c.name, json.loads(c.arguments)) for c in said[1]] == calls
    for cut in range(len(text) + 1):
        assert streamed([text[:cut], text[cut:]])[:2] == said
    assert streamed(list(text))[:2] == said


def test_the_template_writes_what_is_read_back():
    calls = [("get_weather", {"city": "Øslo </tool_call>", "days": 2}), ("clock", {})]
    message = {
        "role": "assistant",
        "content": "One moment.",
        "tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls],
    }
    text = template().render([{"role": "user", "content": "Hi"}, message], TOOLS, add_generation_prompt=False)
    answer = text.split("</think>\n\n")[-1].removesuffix("<|im_end|>\n")
    content, said = parse(answer, names=["get_weather", "clock"])
    assert content == "One moment."
    assert [(c.name, json.loads(c.arguments)) for c in said] == calls


def test_calls_of_unknown_functions_are_text():
    text = call("f", {}) + call("g", {})
    assert parse(text, names=["g"]) == (call("f", {}), [Call("g", "{}")])


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "\n", "{", "}", '"', "\\", '{"name": "f", "arguments": ', '{"a": 1}', "<", "x", "[",
    "]", "1", ",", ":", "true", "\u2028", "é", " ", '"name"', '"arguments"', call("f", {"k": "v"}), call("g", {}),
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.randoms(use_true_random=False))
def test_any_split_of_anything_gives_the_same(fragments, rng):
    text = "".join(fragments)
    cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), 6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls = parse(text)
    assert streamed(pieces)[:2] == (content, calls)
    assert all(isinstance(json.loads(c.arguments), dict) for c in calls)
    if not calls:
        assert content == text
    streamed(pieces, eager=True)  # raises nothing, in order


def test_eager_streams_let_arguments_out_as_they_grow():
    text = "Hm.\n" + call("f", {"x": "a long text", "y": {"z": [1, 2]}}) + "\n" + call("g", {})
    whole = parse(text)
    content, calls, events = streamed(list(text), eager=True)
    assert (content, calls) == whole
    assert sum(isinstance(e, CallArguments) for e in events) > 20
    first = next(i for i, e in enumerate(events) if isinstance(e, CallArguments))
    assert isinstance(events[first - 1], CallStart)
    other = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'  # held until the name is there
    assert streamed(list(other), eager=True)[:2] == parse(other)
    cut = streamed(list(call("f", {"x": "abc"})[:-20]), eager=True)
    assert cut[1][0].name == "f"
    assert not any(isinstance(e, CallEnd) for e in cut[2])


@pytest.mark.parametrize(
    "unit", ["<tool_call>", "\n", '<tool_call>{"name": "', "<", '<tool_call>{"a":[', "\\", '<tool_call>{"name":"f"}\n']
)
def test_work_grows_with_the_text_and_no_faster(unit):
    """Fed sign by sign, little is ever read again."""

    def count(n: int) -> int:
        stream, steps = ToolStream(), 0
        for sign in unit * n:
            stream.feed(sign)
            steps += len(stream._held)
        return steps + len(stream.finish())

    n = 3000 // len(unit)
    assert count(2 * n) <= 2.2 * count(n) + 100


# --- Forced calls -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    return Constraints(ours(), 2048)


def draw(constraints: Constraints, constraint, rng: random.Random, limit: int = 600) -> str:
    """Draw as an untrained model does: any allowed id, uniformly."""
    assert constraint is not None
    matcher, ids = constraints.compile(constraint).start(), []
    out = np.zeros(2048 // 32, np.uint32)
    for _ in range(limit):
        matcher.mask(out)
        allowed = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little"))
        token = int(rng.choice(list(allowed)))
        assert matcher.accept(token)
        if token in ours().stop_ids:
            break
        ids.append(token)
    return ours().decode(ids, skip_special_tokens=True)


SCHEMAS = {t["function"]["name"]: t["function"].get("parameters", {"type": "object"}) for t in TOOLS}


@pytest.mark.parametrize(
    ("choice", "parallel", "names"),
    [
        ("required", True, {"get_weather", "clock"}),
        ("required", False, {"get_weather", "clock"}),
        ({"type": "function", "function": {"name": "get_weather"}}, True, {"get_weather"}),
    ],
)
def test_forced_calls_are_valid(constraints, choice, parallel, names):
    constraint = constrain(TOOLS, choice, parallel)
    seen = set()
    for seed in range(12):
        text = draw(constraints, constraint, random.Random(seed))
        content, calls, _ = streamed(list(text), eager=True, names=list(SCHEMAS))
        assert (content, calls) == parse(text)
        assert content == ""
        assert calls
        assert len(calls) == 1 or (parallel and choice == "required")
        for made in calls:
            jsonschema.Draft202012Validator(SCHEMAS[made.name]).validate(json.loads(made.arguments))
            seen.add(made.name)
    assert seen == names


def test_auto_constrains_only_strict_tools(constraints):
    assert constrain(TOOLS, "auto") is None
    assert constrain(TOOLS, "none") is None
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    constraint = constrain([strict, CLOCK], "auto")
    matcher = constraints.compile(constraint).start()
    free = "Hm, <b>.\n"
    for call_ in (call("clock", {"any": [1]}), call("get_weather", {"city": "Oslo"})):
        assert all(matcher.accept(token) for token in ours().encode(free + call_))
    bad = ours().encode(call("get_weather", {"town": "Oslo"}))
    assert not all(matcher.accept(token) for token in bad)
    for seed in range(6):
        text = draw(constraints, constraint, random.Random(seed), limit=300)
        content, calls = parse(text)
        for made in calls:
            jsonschema.Draft202012Validator(SCHEMAS[made.name]).validate(json.loads(made.arguments))
        assert calls or content == text
        assert not re.search(r"<tool_call>\n\{.*\}\n</tool_call>", content)


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "required", "must not be empty"),
        (TOOLS, {"type": "function", "function": {"name": "g"}}, "tool_choice names 'g', tools has get_weather, clock"),
        (TOOLS, {}, "tool_choice names 'None'"),
        (TOOLS, "any", "tool_choice is 'any'"),
        ([CLOCK, CLOCK], "required", "two functions named 'clock'"),
        ([{"type": "function"}], "auto", "must be a function with a name"),
        ([{"type": "function", "function": {"name": 'a"b'}}], "required", "must be a function with a name"),
        ([{"type": "web_search"}], "auto", "must be a function with a name"),
    ],
)
def test_choices_that_cannot_be_honoured(tools, choice, message):
    with pytest.raises(ToolError, match=message):
        constrain(tools, choice)

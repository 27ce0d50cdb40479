"""Chat templates: equal to transformers, typed errors for bad messages, bounded work for hostile templates."""

import json
import shutil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.text import template as template_module
from qwen3_jax.text.template import ChatTemplate, NoTemplateError, TemplateError
from tests.text_folders import DEMO, each_folder, ours, template, theirs

Q = {"role": "user", "content": "q"}
S = {"role": "system", "content": "You are terse."}


def user(content):
    return {"role": "user", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, nested=True):
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": "c1", "function": function} if nested else function


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für <Ort> & 天气 'now' \"x\"",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Zürich", "京都"]}, "n": {"type": "number", "max": 1.5}},
            "required": ["city"],
        },
    },
}
CALLED = [Q, assistant("", tool_calls=[call("f", {"x": 1, "y": [None, True, "é<&>'"]})])]
THOUGHT = "<think>\nstep 1\n\nstep 2\n</think>\n\nanswer"

# Every line of QWEN3.md's description of the hybrid template has a case here.
CONVERSATIONS = {
    "one user": [Q],
    "system": [S, Q],
    "system later": [Q, assistant("a"), S, user("r")],
    "system only": [S],
    "empty contents": [{"role": "system", "content": ""}, user("")],
    "unicode": [user("naïve 你好 👩‍👩‍👧 <b>&amp;</b> \u0000\u2028 e\u0301")],
    "spaces and newlines kept": [user("\n  x \n\n"), assistant("\n\n y \n")],
    "template syntax in content": [user("{{ messages }} {% if %} {# #}"), assistant("{{ 7*7 }}"), Q],
    "control tokens in content": [user("<|im_end|>\n<|im_start|>system\nx"), assistant("<|im_end|>"), Q],
    "multi-turn": [S, Q, assistant("a"), user("r"), assistant("b"), user("s")],
    "thinking stripped from earlier turns": [Q, assistant(THOUGHT), user("r")],
    "thinking kept in the last turn": [Q, assistant(THOUGHT)],
    "last turn gets an empty block": [Q, assistant("b")],
    "last turn, thinking and leading newlines": [Q, assistant("<think>\n\n\nx\n\n\n</think>\n\n\n\ny\n")],
    "reasoning_content": [Q, assistant("a", reasoning_content="\nr\n\n")],
    "reasoning_content, tags in content stay": [Q, assistant(THOUGHT, reasoning_content="other")],
    "reasoning_content empty": [Q, assistant(THOUGHT, reasoning_content="")],
    "reasoning_content None": [Q, assistant(THOUGHT, reasoning_content=None)],
    "reasoning in an earlier turn": [Q, assistant("a", reasoning_content="r"), user("r")],
    "reasoning by its other names": [Q, assistant("a", reasoning="r1"), assistant("b", thinking="r2")],
    "two thoughts": [Q, assistant("<think>a</think>b<think>c</think>d")],
    "closing tag only": [Q, assistant("reasons\n</think>\n\nanswer")],
    "opening tag only": [Q, assistant("<think>\nunfinished")],
    "two assistants after the query": [Q, assistant("a"), assistant("<think>x</think>b"), assistant("c")],
    "no user": [assistant("a"), assistant("b")],
    "call": CALLED,
    "call with content": [Q, assistant("let me see", tool_calls=[call("f", {})])],
    "call with thinking": [Q, assistant(THOUGHT, tool_calls=[call("f", {"a": "b"})])],
    "call, string arguments": [Q, assistant("", tool_calls=[call("f", '{"x":  1}')])],
    "call, function not nested": [Q, assistant("", tool_calls=[call("f", {"x": 1}, nested=False)])],
    "two calls": [
        Q,
        assistant("", tool_calls=[call("f", {"x": 1}), call("g", {"y": {"z": []}})]),
        tool("1"),
        tool("2"),
    ],
    "empty list of calls": [Q, assistant("a", tool_calls=[])],
    "tool result": [*CALLED, tool("42")],
    "consecutive tool results": [*CALLED, tool("1"), tool(""), tool("é\n"), assistant("a")],
    "tool results in two groups": [*CALLED, tool("1"), assistant("x"), tool("2"), tool("3"), user("r")],
    "thinking kept across tool results": [
        Q,
        assistant(THOUGHT, tool_calls=[call("f", {"x": 1})]),
        tool("1"),
        assistant("", reasoning_content="more", tool_calls=[call("g", {})]),
        tool("2"),
        assistant("done"),
    ],
    "tool result in a user turn": [Q, assistant(THOUGHT), user("<tool_response>\n1\n</tool_response>"), assistant("b")],
    "user turn only begins like one": [Q, assistant(THOUGHT), user("<tool_response> and more"), assistant("b")],
    "tool first": [tool("1"), Q],
}
OPTIONS = [
    {},
    {"enable_thinking": True},
    {"enable_thinking": False},
    {"add_generation_prompt": False},
    {"tools": [WEATHER]},
    {"tools": [WEATHER, WEATHER["function"]], "enable_thinking": False},
    {"tools": []},
]


def reference(folder, messages, tools=None, add_generation_prompt=True, **more):
    hf = theirs(folder)
    return hf.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=add_generation_prompt, **more)


@each_folder
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_equals_transformers(folder, messages):
    for options in OPTIONS:
        assert template(folder).render(messages, **options) == reference(folder, messages, **options)


@each_folder
@pytest.mark.parametrize("name", [n for n, c in CONVERSATIONS.items() if c[-1]["role"] == "assistant"])
def test_a_final_message_is_continued_as_by_transformers(folder, name):
    """Or refused, where transformers refuses it: the template prints another text than the message's."""
    messages = CONVERSATIONS[name]
    for more in ({}, {"enable_thinking": False}, {"tools": [WEATHER]}):
        options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True} | more
        try:
            expected = reference(folder, messages, **options)
        except (ValueError, TypeError):
            with pytest.raises(TemplateError, match="changes the final message"):
                template(folder).render(messages, **options)
        else:
            assert template(folder).render(messages, **options) == expected


def test_a_message_is_continued_or_another_is_begun():
    with pytest.raises(TemplateError, match="exclude each other"):
        template(DEMO).render([Q, assistant("a")], continue_final_message=True)
    with pytest.raises(TemplateError, match="changes the final message"):
        ChatTemplate("{{ messages[0].role }}").render([Q], add_generation_prompt=False, continue_final_message=True)
    stripped = ChatTemplate("{% for m in messages %}{{ m.content | trim }}!{% endfor %}")
    assert stripped.render([user("a b ")], add_generation_prompt=False, continue_final_message=True) == "a b"


TEXT = st.text(max_size=12) | st.lists(
    st.sampled_from(["<think>", "</think>", "<tool_response>", "</tool_response>", "\n", "x", " ", "<|im_end|>"]),
    max_size=6,
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.builds(call, st.text(max_size=5), st.dictionaries(TEXT, JSON, max_size=3) | TEXT, st.booleans()), max_size=2
)
MESSAGE = (
    st.builds(user, TEXT)
    | st.builds(tool, TEXT)
    | st.builds(lambda t: {"role": "system", "content": t}, TEXT)
    | st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXT},
        optional={"reasoning_content": TEXT | st.none(), "tool_calls": CALLS, "name": TEXT},
    )
)


@given(
    messages=st.lists(MESSAGE, min_size=1, max_size=6),
    tools=st.none() | st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=2),
    prompt=st.booleans(),
    thinking=st.sampled_from([None, True, False]),
)
@settings(max_examples=300, deadline=None)
def test_equals_transformers_on_any_conversation(messages, tools, prompt, thinking):
    thinks = {} if thinking is None else {"enable_thinking": thinking}
    expected = reference(DEMO, messages, tools, prompt, **thinks)
    assert template().render(messages, tools, add_generation_prompt=prompt, enable_thinking=thinking) == expected


def test_the_prompt_of_a_plain_question():
    """With thinking off, the prompt holds the empty block already; unknown variables change nothing."""
    text = template().render([user("Hi")], enable_thinking=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ids = ours().encode(text)
    assert (
        ids == theirs().apply_chat_template([user("Hi")], add_generation_prompt=True, enable_thinking=False).input_ids
    )
    assert text == template().render([user("Hi")], enable_thinking=False, tokenize=True, chat_template="x", n=3)


def test_messages_are_not_changed():
    messages = [Q, assistant(None, reasoning="r", tool_calls=[call("f", {"x": (1, 2)})])]
    before = json.dumps(messages)
    template().render(messages)
    assert json.dumps(messages) == before


def test_missing_assistant_content_and_text_parts():
    calls = [call("f", {"x": 1})]
    expected = template().render([Q, assistant("", tool_calls=calls), tool("1")])
    assert template().render([Q, {"role": "assistant", "tool_calls": calls}, tool("1")]) == expected
    assert template().render([Q, assistant(None, tool_calls=calls), tool("1")]) == expected
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template().render([user(parts)]) == template().render([user("a\nb")])


LOOP: list = []
LOOP.append(LOOP)
BAD_MESSAGES = {
    "empty": ([], "non-empty list"),
    "text": ("hello", "non-empty list"),
    "one message": (Q, "non-empty list"),
    "not a dict": ([Q, "x"], "message 1 is a str"),
    "no role": ([{"content": "x"}], "message 0 has role None"),
    "unknown role": ([Q, {"role": "developer", "content": "x"}], "message 1 has role 'developer'"),
    "role not text": ([{"role": ["user"], "content": "x"}], "message 0 has role"),
    "no content": ([{"role": "user"}], r"message 0 \(user\) has content NoneType"),
    "content None": ([user(None)], r"message 0 \(user\) has content NoneType"),
    "content number": ([user(3)], r"message 0 \(user\) has content int"),
    "image": ([user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}])], "part 1 .* 'image_url'"),
    "part without text": ([user([{"type": "text"}])], "part 0"),
    "part is text": ([user(["x"])], "part 0"),
    "reasoning number": ([Q, assistant("x", reasoning_content=3)], "has reasoning int"),
    "calls not a list": ([Q, assistant("x", tool_calls="f")], "tool_calls"),
    "calls of text": ([Q, assistant("x", tool_calls=["f"])], "tool_calls"),
    "an object": ([user("x") | {"extra": object()}], "plain JSON data, found a object"),
    "bytes": ([user("x") | {"extra": b"x"}], "plain JSON data, found a bytes"),
    "endless": ([user("x") | {"extra": LOOP}], "nests too deeply"),
}


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_bad_messages(messages, reason):
    with pytest.raises(TemplateError, match=reason) as e:
        template().render(messages)
    assert "\n" not in str(e.value)


def test_bad_tools_and_variables():
    with pytest.raises(TemplateError, match="tool 1 is a str"):
        template().render([Q], [WEATHER, "f"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TemplateError, match="found a type"):
        template().render([Q], variable=object)


# ---- where templates come from


def folder_with(path, chat_template=None, **files):
    shutil.copytree(DEMO, path)
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "additional_chat_templates").mkdir()
    for name, text in files.items():
        where = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (path / where).write_text(text, encoding="utf-8")
    return path


NAMED = [{"name": "default", "template": "D{{ eos_token }}"}, {"name": "tool_use", "template": "T{{ tools|length }}"}]
SOURCES = {
    "string": ("A{{ eos_token }}{{ pad_token }}{{ bos_token is defined }}", {}),
    "file": (None, {"default": "é{{ messages[0].content }}\n"}),
    "file before config": ("A", {"default": "B"}),
    "named": (NAMED, {}),
    "named, no tool_use": (NAMED[:1], {}),
    "named files": (None, {"default": "B", "tool_use": "U{{ tools|length }}", "rag": "R"}),
    "extra files hide the config": ("A", {"tool_use": "U"}),
}


@pytest.mark.parametrize(("chat_template", "files"), SOURCES.values(), ids=SOURCES.keys())
def test_template_sources(tmp_path, chat_template, files):
    from transformers import AutoTokenizer

    folder = folder_with(tmp_path / "m", chat_template, **files)
    hf, mine = AutoTokenizer.from_pretrained(folder), ChatTemplate.from_folder(folder)
    for tools in (None, [WEATHER]):
        try:
            expected = hf.apply_chat_template([Q], tools, tokenize=False)
        except ValueError:
            with pytest.raises(TemplateError, match="no chat template is named 'default'"):
                mine.render([Q], tools)
        else:
            assert mine.render([Q], tools) == expected


def test_saved_again_by_transformers(tmp_path):
    """transformers 5 moves the template into chat_template.jinja."""
    theirs().save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    assert ChatTemplate.from_folder(tmp_path).render([Q], [WEATHER]) == template().render([Q], [WEATHER])
    assert ours(tmp_path).encode("a<think>é") == ours().encode("a<think>é")
    assert ours(tmp_path).special == ours().special


@pytest.mark.parametrize("chat_template", [None, 3, [], ["x"], [{"name": "default"}], "{% if %}", "{{ x|nothing }}"])
def test_unusable_templates(tmp_path, chat_template):
    folder = folder_with(tmp_path / "m", chat_template)
    with pytest.raises(TemplateError if chat_template else NoTemplateError, match="template") as e:
        ChatTemplate.from_folder(folder)
    assert str(folder) in str(e.value)
    assert "\n" not in str(e.value)


def test_template_that_is_not_text(tmp_path):
    folder = folder_with(tmp_path / "m")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TemplateError, match="UTF-8"):
        ChatTemplate.from_folder(folder)


@pytest.mark.parametrize(
    ("source", "reason"),
    {
        "{{ raise_exception('roles must\nalternate') }}": "roles must alternate",
        "{{ messages[7].content }}": "list object has no element 7",
        "{{ nothing.at.all }}": "'nothing' is undefined",
        "{{ 1 // 0 }}": "ZeroDivisionError",
        "{{ 'a' + 1 }}": "TypeError",
        "{% include 'x' %}": "no loader",
        "{% for m in messages %}{{ m.missing + 'x' }}{% endfor %}": "has no attribute 'missing'",
        "{{ messages | tojson(indent=100) }}": "indent",
        "{% autoescape true %}{% endautoescape %}": "autoescape",
        "{{ 'a'|urlize }}": "No filter named 'urlize'",
        "{{ ('{}'|safe).format('<') }}": "marked safe",
    }.items(),
)
def test_template_errors(source, reason):
    with pytest.raises(TemplateError, match=reason) as e:
        ChatTemplate(source).render([Q])
    assert "\n" not in str(e.value)


# ---- the language: what is metered still means what it means in transformers

LANGUAGE = [
    "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{{ m.role }}{% else %}none{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ loop.index }}/{{ loop.length }}/{{ loop.revindex }}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem is defined }}>{{ m.role }}>{{ (loop.nextitem|d(m)).role }};{% endfor %}",
    "{% for m in messages %}{% if loop.changed(m.role) %}{{ m.role }}{% endif %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }},{% endfor %}{% for x in nothing %}x{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth }}{% endfor %}",
    "{% for c in 'abc' %}{{ c }}{{ loop.index }}{% endfor %}{% for i in range(3, 9, 2) %}{{ i }}{% endfor %}",
    "{% macro f(m, n=2) %}<{{ m.role }}{{ n }}{{ caller() if caller }}>{% endmacro %}{{ f(messages[0]) }}"
    "{% call f(messages[1], n=3) %}body{% endcall %}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% set x %}a{{ messages[0].content }}{% endset %}{{ x }}{{ x|length }}{% filter upper %}b{{ x }}{% endfilter %}",
    "{% with a = 1, b = 'é' %}{{ a }}{{ b }}{% endwith %}{% generation %}{{ messages[1].content }}{% endgeneration %}",
    "{{ messages[::-1][0].role }}{{ messages[1:]|length }}{{ 'hello'[1:3] }}{{ messages[-1]['role'] }}",
    "{{ 1 + 2 * 3 - 4 / 5 }}{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ -3 }}{{ 'a' * 3 }}{{ [1] * 2 }}{{ [1] + [2] }}",
    "{{ 'a' ~ 1 ~ none ~ [1, 'x'] ~ {'k': 2} }}{{ 'a' + 'b' }}{{ '%s-%05.1f-%d%%' % ('x', 2.5, 3) }}{{ '%s' % 'x' }}",
    "{{ 1 < 2 <= 2 }}{{ 'a' in 'abc' }}{{ 'x' not in ['y'] }}{{ messages[0] == messages[0] }}{{ 1 == 1.0 and not 0 }}",
    "{{ 'k' in {'k': 1} }}{{ (1, 2) == (1, 2) }}{{ {'a': [1, {'b': none}]}['a'][1] }}{{ ('x',)[0] }}",
    "{{ 'yes' if messages else 'no' }}{{ 'x' if false }}{{ nothing }}{{ nothing is defined }}{{ none }}{{ true }}",
    "{{ '{}-{:>4}-{n:.2f}'.format('a', 'b', n=1.5) }}",
    "{{ '{a}{b[0]}'.format_map({'a': 1, 'b': [2]}) }}{{ '%(a)s' % {'a': 5} }}{{ 'x%sy' | format(messages|length) }}",
    "{{ ' aXb '.strip().lower().split('x') }}{{ 'a,b,c'.split(',', 1) }}{{ 'a b  c'.split() }}",
    "{{ 'axbxc'.rsplit('x', 1) }}",
    "{{ 'abcabc'.replace('b', 'XY') }}{{ 'abcabc'.replace('b', '', 1) }}{{ ''.join(['a', 'b']) }}{{ '-'.join('abc') }}",
    "{{ 'abc'.startswith('a') }}{{ 'abc'.endswith(('x', 'c')) }}{{ 'abc'.find('c') }}{{ 'aXbX'.rfind('X') }}",
    "{{ 'xxabxx'.strip('x') }}{{ 'xxab'.lstrip('x') }}{{ 'abxx'.rstrip('x') }}{{ 'a-b'.partition('-') }}",
    "{{ 'ab'.upper() }}{{ 'a b'.title() }}{{ 'ab'.capitalize() }}{{ 'ßA'.casefold() }}{{ 'aB'.swapcase() }}",
    "{{ 'a1'.isalnum() }}{{ '1'.isdigit() }}{{ 'a\nb'.splitlines() }}",
    "{{ 'preab'.removeprefix('pre') }}{{ 'aa'.count('a') }}",
    "{{ messages[0].get('role') }}{{ messages[0].get('x', 'd') }}{{ messages[0].keys()|list }}",
    "{{ messages[0].values()|list }}",
    "{{ [3, 1, 2].index(1) }}{{ [1, 1].count(1) }}{{ dict(a=1, b=2) }}{{ dict([('k', 'v')]) }}{{ (1.0).is_integer() }}",
    "{{ ' x '|trim }}{{ '-x-'|trim('-') }}{{ 'x'|upper }}{{ 'X'|lower }}{{ 'a b'|title }}{{ 'ab'|capitalize }}",
    "{{ '3'|int + 1 }}{{ '2.5'|float }}",
    "{{ messages|length }}{{ messages|count }}{{ [1, 2]|first }}{{ [1, 2]|last }}",
    "{{ [1, 2]|reverse|list }}{{ 'ab'|reverse }}",
    "{{ [3, 1, 2]|sort }}{{ ['b', 'A']|sort(case_sensitive=true, reverse=true) }}{{ {'b': 1, 'a': 2}|dictsort }}",
    "{{ messages|map(attribute='role')|join(', ') }}{{ ['a', 'b']|map('upper')|list }}",
    "{{ messages|join('|', attribute='role') }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "{{ messages|rejectattr('role', 'eq', 'user')|list }}",
    "{{ [0, 1, 2]|select('odd')|list }}{{ [0, 1, none]|reject('none')|list }}",
    "{{ messages|selectattr('content')|list|length }}",
    "{{ nothing|default('d') }}{{ ''|d('e', true) }}{{ 'a<b'|e }}{{ '<'|safe + '<' }}",
    "{{ 'a&b'|forceescape }}{{ -3|abs }}",
    "{{ {'é': [1, 2.5, none, true, '<&>']}|tojson }}{{ {'b': 1, 'a': 2}|tojson(indent=2, sort_keys=true) }}",
    "{{ [1]|tojson(separators=(',', ':'), ensure_ascii=true) }}{{ 'é'|tojson(ensure_ascii=true) }}",
    "{{ 'a\nb'|indent(2) }}{{ 'a\nb'|indent('> ', first=true) }}{{ [1, 2]|string }}{{ [1, 3]|max }}{{ [1, 3]|min }}",
    "{{ {'a': 1}|items|list }}{{ messages[0]|attr('nothing') }}{{ 'aXb'|replace('X', '-') }}",
    "{{ 'aaa'|replace('a', 'b', 2) }}",
    "{{ 'x' is string }}{{ 1 is number }}{{ {} is mapping }}{{ [] is iterable }}{{ [] is sequence }}{{ 3 is odd }}",
    "{{ none is none }}{{ true is true }}{{ 1 is boolean }}{{ 1.5 is float }}{{ 4 is divisibleby 2 }}{{ 1 is in [1] }}",
    "{{ 'a' is eq 'a' }}{{ 2 is gt 1 }}{{ 'a' is lower }}{{ 'A' is upper }}{{ messages is sameas messages }}",
    "{{ cycler('a', 'b').next() }}{% set j = joiner(';') %}{{ j() }}a{{ j() }}b{{ loop }}{{ strftime_now('%%') }}",
    "  {%- if messages %}\n    yes\n  {% endif %}\n  {#- c #}\n{%+ if true %} x{% endif +%}\n\n end\n",
    "{{ 'since 2024 *x %s %% %(' % 'a' if false }}{{ 'since 2024, 50000*x: %s %%' % 'a' }}{{ '2000%('|length }}",
    "{{ '%(a(b))5s|%(12345)-3d' % {'a(b)': 1, '12345': 2} }}{{ '%+.3e %#x %c%r' % (1.5, 255, 'c', 'r') }}",
    "{{ strftime_now('20000 %%') }}{{ '%s' % messages[0] }}{{ '%s %s' % messages[0].items()|list if false }}",
    "{% raw %}{{ raw }}{% endraw %}{% block b %}B{{ messages[0].role }}{% endblock %}{{ self.b() }}",
    "{{ messages[0].content|tojson|safe }}{{ ('<'|safe) ~ '<' }}{{ ('%s<'|safe) % '<' }}",
    "{{ '<'|safe|replace('<', '>') }}",
]
TURNS = [user("hé <x>"), assistant("b", extra={"n": [1, 2.5, None]}), user("c")]


@pytest.mark.parametrize("source", LANGUAGE)
def test_the_language_equals_transformers(source):
    expected = theirs().apply_chat_template(TURNS, chat_template=source, tokenize=False)
    assert ChatTemplate(source, theirs().special_tokens_map).render(TURNS, add_generation_prompt=False) == expected


@each_folder
def test_qwens_template_is_far_from_the_limit(folder, monkeypatch):
    """Its work is linear in the conversation: the proportional part of the allowance is enough by itself."""
    monkeypatch.setattr(template_module, "BASE_UNITS", 0)
    turn = [user("q" * 300), assistant(THOUGHT, tool_calls=[call("f", {"x": 1})]), tool("1"), tool("2")]
    for messages in ([*turn * 200, Q], [user("x" * 2_000_000), Q], [Q, assistant("x" + THOUGHT * 20_000)]):
        assert template(folder).render(messages, [WEATHER] * 30).endswith("<|im_start|>assistant\n")

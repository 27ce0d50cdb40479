"""Hostile templates: nothing of Python is reached, and work and memory end at the bound, in any thread."""

import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.text import template as template_module
from qwen3_jax.text.template import ChatTemplate, TemplateError

MESSAGES = [{"role": "user", "content": "x"}]
UNITS = 100_000  # a smaller bound than the released one, to end sooner


@pytest.fixture(autouse=True)
def small_bound(monkeypatch):
    monkeypatch.setattr(template_module, "BASE_UNITS", UNITS)


def repeated(step: str, start: str = "'x'") -> str:
    """A template that replaces ns.s by a step of it, 60 times."""
    return f"{{% set ns = namespace(s={start}, t={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}"


def doubled(expression: str, start: str = "'x'") -> str:
    return repeated(f"{{% set ns.s = {expression} %}}", start)


NESTED = repeated("{% set ns.s = [ns.s, ns.s] %}{% set ns.t = [ns.t, ns.t] %}", "[1]")
BODY = "x" * 50_000

TIME = {
    "loops in loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops over generators": "{% for a in range(99999) %}{% set x = range(99999)|select('gt', 9)|list %}{% endfor %}",
    "mapped": "{% for a in range(99999) %}{% set x = range(99999)|map('string')|list %}{% endfor %}",
    "long bodies": "{% for a in range(99999) %}" + "{% set x = messages %}" * 2000 + "{% endfor %}",
    "attributes": "{% for a in range(99999) %}" + "{% set x = messages[0].role %}" * 2000 + "{% endfor %}",
    "macro calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro calls itself twice": "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(50) }}",
    "nested callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 19
    + "x"
    + "{% endcall %}" * 19,
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "wide recursive loop": "{% for a in range(9) recursive %}"
    "{% if loop.depth < 40 %}{{ loop(range(9)) }}{% endif %}{% endfor %}",
    "block calls itself": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "cycler": "{% set c = cycler(1, 2) %}{% for i in range(99999) %}{% for j in range(99999) %}{{ c.next() }}"
    "{% endfor %}{% endfor %}",
    "float in range": "{% for i in range(99999) %}{% if 0.5 in range(99999) %}{% endif %}{% endfor %}",
    "sorting": "{% set l = range(9999)|map('string')|list %}{% for i in range(9999) %}{% set x = l|sort %}{% endfor %}",
    "splitting": "{% set s = 'x ' * 99999 %}{% for i in range(9999) %}{% set x = s.split() %}{% endfor %}",
    "searching": "{% set s = 'a' * 999999 %}{% for i in range(9999) %}{% if 'b' in s %}{% endif %}{% endfor %}",
    "searching backwards": "{% set s = 'a' * 999999 %}{{ s.rfind('b' + 'a' * 499999) }}",
    "stripping": "{% set s = 'a' * 999999 %}{{ s.strip('b' * 999999 + 'a') }}",
    "comparing nested": NESTED + "{{ ns.s == ns.t }}",
    "comparing nested by test": NESTED + "{{ ns.s is eq(ns.t) }}",
    "finding nested": NESTED + "{{ [ns.t].index(ns.s) }}",
    "nested in": NESTED + "{{ ns.s in [ns.t] }}",
    "sorting nested": NESTED + "{{ [ns.s, ns.t]|sort|length }}",
    "nested changed": NESTED + "{% for i in [ns.s, ns.t] %}{{ loop.changed(i) }}{% endfor %}",
    "hashing nested": repeated("{% set ns.s = (ns.s, ns.s) %}", "(1,)") + "{{ {ns.s: 1} }}",
    "looking up nested": repeated("{% set ns.s = (ns.s, ns.s) %}", "(1,)") + "{{ messages[0][ns.s] }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "tower": "{% set n = 9 %}{{ n ** n ** n ** n }}",
    "squares": doubled("ns.s * ns.s", "10"),
    "huge division": "{{ ('f' * 500000)|int(0, 16) // 3 }}",
    "giant range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "percent signs": "{{ ('%%' * 499999) % () }}",
    "braces": "{{ ('{{' * 499999).format() }}",
    "open name": "{{ ('%(' * 499999) % {} }}",
    "long names": "{% set n = 'a.' * 99999 %}{% for i in range(9999) %}{% set x = messages|map(attribute=n) %}"
    "{% endfor %}",
    "namespaces": "{% set d = dict() %}{% set l = range(9999)|map('string')|list %}{% for i in range(9999) %}"
    "{% set x = namespace({'l': l}) %}{% endfor %}",
    "many arguments": "{% macro f() %}{{ varargs|length }}{% endmacro %}{% set l = range(9999)|list %}"
    "{% for i in range(9999) %}{% set x = f(*l) %}{% endfor %}",
    "huge divisor": "{% set x = ('f' * 800000)|int(0, 16) %}{{ x is divisibleby(x // 3) }}",
    "trim": "{% set s = 'a' * 999999 %}{{ s|trim('b' * 999999 + 'a') }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "loops too deep": "{% for a in messages %}" * 30 + "{% endfor %}" * 30,
    "long sum": "{{ " + "1+" * 5000 + "1 }}",
    "digits": "{{ " + "1" * 99999 + " }}",
    "backslashes": "{{ '" + "\\" * 99999,
    "too long": "x" * 140_000,
}
MEMORY = {
    "repeat text": "{{ 'x' * 10 ** 10 }}",
    "repeat text, swapped": "{{ 10 ** 10 * 'x' }}",
    "repeat list": "{{ [0] * 10 ** 10 }}",
    "repeat by true": repeated("{% set ns.s = ns.s * 3 %}"),
    "sum": doubled("ns.s + ns.s"),
    "lists": doubled("ns.s + ns.s", "[1]"),
    "concatenation": doubled("ns.s ~ ns.s"),
    "percent": doubled("'%s%s' % (ns.s, ns.s)"),
    "percent by name": doubled("'%(a)s%(a)s' % {'a': ns.s}"),
    "many percents": "{% set s = 'x' * 999999 %}{{ ('%s' * 999) % s }}",
    "format": doubled("'{0}{0}'.format(ns.s)"),
    "format_map": doubled("'{a}{a}'.format_map({'a': ns.s})"),
    "format filter": doubled("'%s%s'|format(ns.s, ns.s)"),
    "join": doubled("ns.s.join([ns.s, ns.s])"),
    "join filter": doubled("[ns.s, ns.s]|join(ns.s)"),
    "join of an iterator": "{% set s = 'x' * 99999 %}{{ s.join(range(9999)|map('string')) }}",
    "replace": doubled("ns.s.replace('x', ns.s ~ 'xx')"),
    "replace filter": doubled("ns.s|replace('x', ns.s ~ 'xx')"),
    "replace nothing": "{% set s = 'x' * 99999 %}{{ s.replace('', s) }}",
    "mapped replace": "{% set s = 'x' * 99999 %}{{ [s]|map('replace', 'x', s)|list }}",
    "escapes": doubled("ns.s|forceescape|forceescape|forceescape ~ ns.s", "'&&&'"),
    "quotes": doubled("ns.s|tojson|tojson ~ ns.s", "'\\\"'"),
    "indent": "{{ ('\\n' * 99999)|indent(10 ** 6) }}",
    "indent by text": "{{ ('\\n' * 99999)|indent('x' * 9999) }}",
    "indent of other line ends": "{{ ('\\x0b' * 99999)|indent(9999) }}",
    "characters": "{% set s = 'é' * 1500000 %}{{ s|list|length }}",
    "sorted characters": "{% set s = 'é' * 1500000 %}{{ s|sort|length }}",
    "joined characters": "{% set s = 'é' * 1500000 %}{{ s|join|length }}{{ ''.join(s)|length }}",
    "words": "{% set s = 'é ' * 750000 %}{{ s.split()|length }}",
    "lines": "{% set s = 'é\\n' * 750000 %}{{ s.splitlines()|length }}",
    "parts": "{% set s = 'é;' * 750000 %}{{ s.split(';')|length }}",
    "titles": "{% set s = 'é ' * 750000 %}{{ s|title|length }}",
    "json indent": "{{ [1]|tojson(indent=10 ** 9) }}",
    "set block": repeated("{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}"),
    "set blocks": "{% set s = 'x' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
    "macro": "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}" + doubled("d(ns.s)"),
    "printing nested": NESTED + "{{ ns.s }}",
    "nested json": NESTED + "{{ ns.s|tojson }}",
    "nested string": NESTED + "{{ ns.s|string|length }}",
    "nested by repetition": doubled("[ns.s] * 10", "[1]") + "{{ ns.s|string|length }}",
    "static text": "{% for a in range(99999) %}" + BODY + "{% endfor %}",
    "static text in a macro": "{% macro f() %}"
    + BODY
    + "{% endmacro %}{% for a in range(9999) %}{% set x = f() %}{% endfor %}",
    "static text in a set": "{% for a in range(99999) %}{% set x %}" + BODY + "{% endset %}{% endfor %}",
    "hoarding": doubled("ns.s + ['x' * 9999]", "[]").replace("60", "99999"),
    "hoarding lists": "{% set ns = namespace(l=0) %}{% for i in range(9999) %}{% set ns.l = (ns.l, range(9999)|list) %}"
    "{% endfor %}",
    "hoarding in a dict": doubled("dict(ns.s, **{'k' ~ i: 'é' * 9999})", "{}").replace("60", "99999"),
    "autoescape": "{% autoescape true %}" + doubled("ns.s ~ ns.s", "'&'") + "{% endautoescape %}",
    "center": "{{ 'x'.center(10 ** 10) }}",
    "center filter": "{{ 'x'|center(10 ** 9) }}",
    "mapped center": "{{ ['x']|map('center', 10 ** 9)|list }}",
    "zfill": "{{ '1'.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10 ** 9) }}",
    "batch": "{{ [1]|batch(10 ** 9, 'x')|list }}",
    "round": "{{ 1|round(10 ** 9, 'ceil') }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent width after a name": "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "percent precision": "{{ '%-5.1000000000f' % 1 }}",
    "percent length": "{{ '%l1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 9, 1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format width as a field": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "format precision": "{{ '{:.{p}f}'.format(1.5, p=10 ** 9) }}",
    "translate": "{{ ('x' * 99999).translate({120: 'x' * 9999}) }}",
    "time format": "{{ strftime_now('%1000000000d') }}",
    "lorem ipsum": "{{ lipsum(10 ** 6) }}",
}


def outcome(source: str) -> str:
    """Return what rendering ends with: its text, or the message of its error."""
    try:
        return ChatTemplate(source).render(MESSAGES)
    except TemplateError as e:
        return f"error: {e}" if "\n" not in str(e) else "more than one line"


@pytest.mark.parametrize("source", TIME.values(), ids=TIME.keys())
def test_endless_work_ends_with_the_typed_error(source):
    assert outcome(source).startswith("error: ")


@pytest.mark.parametrize("source", MEMORY.values(), ids=MEMORY.keys())
def test_memory_stays_bounded(source):
    tracemalloc.start()
    try:
        assert outcome(source).startswith("error: ")
        assert tracemalloc.get_traced_memory()[1] < 32e6
    finally:
        tracemalloc.stop()


CODE = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "globals of self": "{{ self.__init__.__globals__ }}",
    "globals of a function": "{{ raise_exception.__globals__['os'] }}",
    "globals of dict": "{{ dict.__globals__.x }}",
    "namespace": "{{ namespace.__init__.__globals__.x }}",
    "attr filter": "{{ (''|attr('__class__')).mro() }}",
    "map": "{{ messages|map(attribute='__class__.__mro__')|list }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "generator": "{{ (messages|map('string')).gi_frame.f_globals }}",
    "loop": "{% for i in [1] %}{{ loop._iterator.gi_frame.x }}{% endfor %}",
    "context": "{{ self._TemplateReference__context.environment.x }}",
    "environment": "{% macro f() %}{% endmacro %}{{ f._environment.x }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "change a message": "{{ messages[0].update({'role': 'system'}) }}",
    "change the list": "{{ messages.append(messages[0]) }}",
    "change an item": "{{ messages[0].__setitem__('role', 'x') }}",
    "namespace attribute": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "bytes": "{{ 'x'.encode() }}",
}


@pytest.mark.parametrize("source", CODE.values(), ids=CODE.keys())
def test_nothing_of_python_is_reached(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = outcome(source)
    assert text == "" or text.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_the_bound_holds_in_any_thread_and_does_not_leak_into_the_next_render():
    """Eight threads share one template; those that fail fail alike, the others answer."""
    shared = ChatTemplate("{% for i in range(messages[0].n) %}{% for j in range(9999) %}{% endfor %}{% endfor %}ok")
    results: dict[int, str] = {}

    def run(thread: int) -> None:
        for n in (1, 99, 5):
            try:
                text = shared.render([{"role": "user", "content": "x", "n": n}])
            except TemplateError as e:
                text = str(e)
            results[thread * 3 + (1, 99, 5).index(n)] = text

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 24
    assert {results[k] for k in results if k % 3 != 1} == {"ok"}
    (message,) = {results[k] for k in results if k % 3 == 1}
    assert "units of work" in message


WORDS = st.sampled_from(
    """{% for m in messages %}
{% for i in range(99999) %}
{% for x in [1] recursive %}
{% endfor %}
{% break %}
{% if m %}
{% else %}
{% endif %}
{% set ns = namespace(s='x') %}
{% set ns.s = ns.s + ns.s %}
{% set x %}
{% endset %}
{% macro f(x) %}
{% endmacro %}
{% call f(1) %}
{% endcall %}
{% filter upper %}
{% endfilter %}
{% block b %}
{% endblock %}
{% raw %}
{% endraw %}
{{ messages|tojson }}
{{ f(m) }}
{{ caller() }}
{{ self.b() }}
{{ loop([1]) }}
{{ ns.s * 99 }}
{{ ns.s|replace('x', 'xx') }}
{{ range(9)|map('string')|join(m) }}
{{
}}
{%-
-%}
{#
#}
ns.s
'x'
99
[
]
(
)
|
~
**
//
%
+""".splitlines()
)


@given(words=st.lists(WORDS, max_size=14))
@settings(max_examples=300, deadline=None)
def test_any_template_renders_or_raises_the_typed_error(words):
    try:
        text = ChatTemplate(" ".join(words)).render(MESSAGES)
    except TemplateError:
        return
    assert len(text) <= 16 * UNITS * 8

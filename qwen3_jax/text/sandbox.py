"""A Jinja environment for templates nobody vouches for: no code, no files, and a bound on work and memory.

jinja2's `ImmutableSandboxedEnvironment` keeps a template away from Python. It does not keep it from running for a week
(loops in loops) or from filling memory (`'x' * 10**10`, `ns.s = ns.s + ns.s`). Here every render has a `Meter`: loop
turns, calls, filters, tests, operators, literals and outputs pay from it in proportion to the data they touch or make,
those whose result may outgrow their inputs before they run, and the render ends with `WorkLimit` when it is empty.
Counting work instead of seconds makes the answer independent of the machine's load, and needs no signal, thread or
child process, so it holds in any thread.

The language is cut to what can be priced: `METHODS` and `FILTERS` are lists. What they leave out pads or repeats by a
number (`center`, `batch`), is random, or makes HTML; no released chat template uses it.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import jinja2
from jinja2 import filters, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

# A unit is one turn, call or list element, or CHARS_PER_UNIT characters of text.
CHARS_PER_UNIT = 16
MAX_SOURCE = 65_536  # characters of a template; Qwen3's has 4,116
MAX_BITS = 256  # of an integer that takes part in arithmetic or is read from text

METHODS = {
    str: "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit "
    "islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind "
    "rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper",
    dict: "copy get items keys values",
    list: "count index",
    tuple: "count index",
    int: "",
    float: "is_integer",
}
FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float forceescape format indent int items join last "
    "length list lower map max min reject rejectattr replace reverse safe select selectattr sort string title tojson "
    "trim upper"
)
# Filters and tests whose work does not grow with their arguments, beyond reading names and making their result.
SHALLOW_FILTERS = "attr count d default first items last length map reject rejectattr reverse safe select selectattr"
SHALLOW_TESTS = (
    "boolean callable defined divisibleby escaped even false filter float integer iterable mapping none number odd "
    "sameas sequence string test true undefined"
)
CONTAINERS = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))


class WorkLimit(jinja2.TemplateRuntimeError):
    """The template asked for more work or memory than its input allows."""


class Meter:
    """The work one render may still do, in units."""

    def __init__(self, units: int):
        self.units = self.left = units

    def pay(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise WorkLimit(f"it needs more than the {self.units} units of work its input allows")

    def weigh(self, value: Any) -> None:
        """Pay for every element and character of a value; shared parts count as often as they are reached."""
        stack = [value]
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                self.pay(len(value) // CHARS_PER_UNIT)
            elif isinstance(value, dict):
                self.pay(len(value))
                stack.extend(value.keys())
                stack.extend(value.values())
            elif isinstance(value, CONTAINERS):
                self.pay(len(value))
                stack.extend(value)
            elif isinstance(value, range):
                self.pay(len(value))


_current: ContextVar[Meter] = ContextVar("meter")


@contextmanager
def metered(units: int) -> Iterator[Meter]:
    """Give the template work inside this block, in this thread or task, a budget."""
    meter = Meter(units)
    token = _current.set(meter)
    try:
        yield meter
    finally:
        _current.reset(token)


# ---- the hooks that instrumented templates call


def _tick(units: int) -> None:
    _current.get().pay(units)


def _weigh(value: Any) -> Any:
    """Pay for what is about to be read through (printed, compared, hashed), down to its leaves."""
    meter = _current.get()
    meter.pay(1)
    meter.weigh(value)
    return value


def _made(value: Any) -> Any:
    """Pay for a new value, whose parts are paid for already; an iterator pays turn by turn."""
    meter = _current.get()
    if isinstance(value, str):
        meter.pay(1 + len(value) // CHARS_PER_UNIT)
    elif isinstance(value, CONTAINERS):
        meter.pay(1 + len(value))
    elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
        return _turns(value)
    else:
        meter.pay(1)
        if isinstance(value, int) and value.bit_length() > 2 * MAX_BITS:
            raise SecurityError(f"integers above {2 * MAX_BITS} bits are not allowed")
    return value


def _turns(iterable: Iterable[Any], units: int = 1) -> Iterator[Any]:
    pay = _current.get().pay
    for item in iterable:
        pay(units)
        yield item


def _concat(*values: Any) -> str:
    return "".join([_made(str(_weigh(value))) for value in values])


HOOKS = {"tick": _tick, "weigh": _weigh, "made": _made, "turns": _turns, "concat_values": _concat}


class _Instrument(NodeTransformer):
    """Put hooks where jinja2 compiles to plain Python: loops, bodies, literals, slices, `~` and comparisons."""

    @staticmethod
    def _hook(name: str, *args: Any) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)

    @staticmethod
    def _cost(body: Iterable[nodes.Node]) -> int:
        """Price one straight pass: its nodes and static text, which are free outside of loops and macros."""
        parts = [n for part in body for n in (part, *part.find_all(nodes.Node))]
        return 1 + sum(1 + len(n.data) if isinstance(n, nodes.TemplateData) else 1 for n in parts) // CHARS_PER_UNIT

    def visit_For(self, node: nodes.For) -> nodes.Node:
        cost = self._cost([*node.body, *([node.test] if node.test else [])])
        self.generic_visit(node)
        node.iter = self._hook("turns", node.iter, nodes.Const(cost))
        return node

    def _body(self, node: Any) -> nodes.Node:
        cost = self._cost(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._hook("tick", nodes.Const(cost))))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._hook("made", node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._hook("made", node) if isinstance(node.arg, nodes.Slice) else node

    def _hashed(self, node: Any) -> nodes.Node:  # a tuple may become a key; its hash reads it through
        self.generic_visit(node)
        return self._hook("weigh", node) if getattr(node, "ctx", "load") == "load" else node

    visit_Dict = visit_Tuple = _hashed

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("autoescape is for HTML and not supported in chat templates", node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._hook("concat_values", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for side in (node, *node.ops):
            if not isinstance(side.expr, nodes.Const):
                side.expr = self._hook("weigh", side.expr)
        return node


# ---- prices of what makes large results of small inputs, or takes more than linear time


def _pay_text(characters: int) -> None:
    _current.get().pay(max(characters, 0) // CHARS_PER_UNIT)


def _spread(value: Any) -> Any:
    """Pay for reading a value, and for taking a text apart into many small ones."""
    if isinstance(value, str):
        _current.get().pay(len(value) // 2)
    return _weigh(value)


def _check_width(spec: str) -> None:
    if "*" in spec or re.search(r"\d{4}", spec):
        raise SecurityError(f"a width or precision above 999 in the format {spec[:40]!r} is not allowed")


def _pay_percent(template: str, values: Any) -> None:
    """Price `template % values`: each field may print all of the values."""
    meter = _current.get()
    before = meter.left
    meter.weigh(values)
    field = 1 + before - meter.left
    _spread(template)
    at = template.find("%")
    while at >= 0:
        meter.pay(field)
        at += 1
        if template[at : at + 1] == "(":  # the name of a value, in balanced parentheses
            depth = 0
            while at < len(template):
                depth += {"(": 1, ")": -1}.get(template[at], 0)
                at += 1
                if not depth:
                    break
        end = at
        while template[end : end + 1] and template[end] in "-#0 +123456789.*hlL":
            end += 1
        _check_width(template[at:end])
        at = template.find("%", end + 1)


def _pay_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    """Price a method of a string."""
    meter = _current.get()
    meter.weigh((text, args))
    first = args[0] if args else None
    if name == "replace" and len(args) >= 2:
        _pay_text(text.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        _spread(first)
        _pay_text(len(args[0]) * len(text))
    elif name in ("split", "rsplit") and isinstance(first, str) and first:
        meter.pay(text.count(first))
    elif name in ("split", "rsplit", "splitlines"):
        _spread(text)
    if name in ("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit") and isinstance(first, str):
        meter.pay(len(text) * len(first) // 256)  # CPython compares every pair in the worst case


def _pay_operator(op: str, left: Any, right: Any) -> None:
    if op == "%" and isinstance(left, str):
        _pay_percent(left, right)
    elif isinstance(left, int | float) and isinstance(right, int | float):
        bits = sum(v.bit_length() for v in (left, right) if isinstance(v, int))
        if bits > MAX_BITS or (op == "**" and isinstance(right, int) and abs(right) * bits > MAX_BITS):
            raise SecurityError(f"arithmetic ({op}) on integers above {MAX_BITS} bits is not allowed")
    elif op == "*":
        sequence, times = (left, right) if isinstance(right, int) else (right, left)
        if isinstance(times, int) and isinstance(sequence, str):
            _pay_text(times * len(sequence))
        elif isinstance(times, int) and isinstance(sequence, list | tuple):
            _tick(max(times, 0) * len(sequence))
    _made(left)
    _made(right)


# ---- what a template may call


def _range(*args: int) -> range:
    made = range(*args)
    if len(made) > 100_000:
        raise SecurityError(f"range() of {len(made)} items is not allowed, at most 100000")
    return made


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace`, without underscore names as in transformers."""

    def __init__(*args: Any, **kwargs: Any):
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute may not start with an underscore, got {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if re.search(r"%[-_^#+EO]*\d", format) or len(format) > 256:
        raise SecurityError("strftime_now takes a format without widths, of at most 256 characters")
    return datetime.datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Write JSON as transformers does: json.dumps without HTML escapes, non-ASCII kept."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > 16:
        raise SecurityError("tojson indent above 16 is not allowed")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@jinja2.pass_eval_context
def _replace(eval_ctx: Any, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    _pay_method(str(s), "replace", (str(old), str(new)))
    return filters.do_replace(eval_ctx, s, old, new, count)


@jinja2.pass_eval_context
def _join(eval_ctx: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(_spread(value))
    _pay_method(str(d), "join", (items,))
    return filters.sync_do_join(eval_ctx, items, d, attribute)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    lines = len(str(_spread(s)).splitlines()) + 1
    _pay_text(lines * (width if isinstance(width, int) else len(width)))
    return filters.do_indent(s, width, first, blank)


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _pay_percent(str(value), (args, kwargs))
    return filters.do_format(value, *args, **kwargs)


def _list(value: Iterable[Any]) -> list[Any]:
    return list(_spread(value))


@jinja2.pass_environment
def _sort(environment: Any, value: Iterable[Any], *args: Any, **kwargs: Any) -> list[Any]:
    return filters.do_sort(environment, _spread(value), *args, **kwargs)


def _title(s: str) -> str:
    return filters.do_title(_spread(s))


def _trim(value: str, chars: str | None = None) -> str:
    _pay_method(str(value), "strip", (chars,))
    return filters.do_trim(value, chars)


class _Formatter(SandboxedFormatter):
    """str.format that pays for every field."""

    def format_field(self, value: Any, format_spec: str) -> str:
        _check_width(format_spec)
        return _made(super().format_field(_weigh(value), format_spec))


def _skim(value: Any) -> Any:
    """Pay for a text, but not for a container."""
    return _weigh(value) if isinstance(value, str) else value


def _priced(function: Callable[..., Any], read: Callable[[Any], Any]) -> Callable[..., Any]:
    """Make a filter or test pay for its arguments and its result."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return _made(function(*map(read, args), **{k: read(v) for k, v in kwargs.items()}))

    return run


class _GenerationTag(Extension):
    """`{% generation %}`: transformers' mark for training masks, transparent when rendering."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The Jinja dialect of transformers' chat templates, sandboxed; compile and render inside `metered`."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            finalize=_weigh,
            optimized=False,  # else constant expressions run while compiling
        )
        self.__dict__.update(HOOKS)
        self.filters |= {"tojson": _tojson, "replace": _replace, "join": _join, "indent": _indent, "format": _format}
        self.filters |= {"list": _list, "sort": _sort, "title": _title, "trim": _trim}
        shallow = SHALLOW_FILTERS.split()
        self.filters = {
            name: _priced(self.filters[name], _skim if name in shallow else _weigh) for name in FILTERS.split()
        }
        shallow = SHALLOW_TESTS.split()
        self.tests = {name: test if name in shallow else _priced(test, _weigh) for name, test in self.tests.items()}
        self.globals |= {
            "range": _range,
            "dict": _dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise jinja2.TemplateSyntaxError(f"it has {len(source)} characters, at most {MAX_SOURCE} are allowed", 1)
        return _Instrument().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow the listed methods of plain data, and of jinja2's own objects what its sandbox allows."""
        for kind, names in METHODS.items():
            if isinstance(obj, kind):
                return attr in names.split()
        return super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _tick(1)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, _weigh(argument))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _pay_operator(operator, left, right)
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(__obj, FunctionType) and __obj in HOOKS.values():
            return __obj(*args)
        _tick(1 + len(args) + len(kwargs))
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "join" and args and isinstance(args[0], Iterator):
                args = (list(args[0]), *args[1:])
            _pay_method(owner, __obj.__name__, args)
        elif isinstance(__obj, LoopContext):  # recursive loop: its new items take turns too
            args = tuple(map(_turns, args))
        elif not isinstance(__obj, Macro):  # a macro only passes its arguments on, a namespace those with names
            if isinstance(owner, list | tuple):
                _weigh(owner)
            named = () if __obj is _Namespace else (v for k, v in kwargs.items() if not k.startswith("_"))
            for value in (*args, *named):  # jinja2's own _loop_vars and _block_vars are not arguments
                _weigh(value)
        return _made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Price `str.format` and `format_map`, which read attributes and pad by numbers inside their strings."""
        text = getattr(value, "__self__", None)
        name = getattr(value, "__name__", None)
        if not isinstance(text, str) or name not in ("format", "format_map"):
            return None
        if isinstance(text, Markup):
            raise SecurityError("format of text marked safe is not supported")

        def run(*args: Any, **kwargs: Any) -> str:
            if name == "format_map":
                (kwargs,), args = args, ()
            return _Formatter(self).vformat(_spread(text), args, kwargs)

        return run

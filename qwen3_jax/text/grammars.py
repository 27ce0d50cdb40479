"""What a constraint may say, checked, and its translation into llguidance's grammar form. No llguidance state here.

Kinds and values:
    json_object       None
    json_schema       a schema: dict, bool or JSON text. What llguidance cannot enforce is refused, never ignored.
    regex             the text matches it as a whole; Rust's syntax (no look-around, no back references)
    choice            a list of strings
    grammar           a context-free grammar, as Lark or as GBNF/EBNF (`root ::= …`)
    structural_tag    {"structures": [{begin, schema, end}], "triggers": [...]} or {"format": {...}} with the formats
                      const_string, json_schema, regex, grammar, any_text, sequence, or, tag, triggered_tags,
                      tags_with_separator
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"]
KINDS: tuple[Kind, ...] = ("json_object", "json_schema", "regex", "choice", "grammar", "structural_tag")

SOURCE_CHARS = 128 * 1024
NESTING = 64
REFERENCES = 256
CHOICES = 10_000
# As Qwen3 writes JSON: at most one blank after a sign. More would let an untrained model fill its limit with blanks.
JSON_OPTIONS = {"whitespace_pattern": " ?"}


class ConstraintError(ValueError):
    """A constraint that cannot be honoured."""


@dataclass(frozen=True)
class Constraint:
    """What a text must look like; see the module docstring for kinds and values."""

    kind: Kind
    value: Any = None


@dataclass(frozen=True)
class Source:
    """A grammar in llguidance's form. `tags` are the added tokens it names; `plain`: harmless, no need to try it."""

    text: str
    tags: tuple[int, ...] = ()
    plain: bool = False


def one_line(error: object) -> str:
    """Return the first telling lines of a message as one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not re.fullmatch(r"[\^~\s|]+|\d+ \|.*|<non-verbose/>", line)]
    return " ".join(kept)[:200]


def source(constraint: Constraint, tags: Mapping[str, int]) -> Source:
    """Check a constraint and translate it.

    Args:
        tags: added tokens that structural tags may be made of, as `<tool_call>`.

    Raises ConstraintError.
    """
    kind, value = constraint.kind, constraint.value
    if kind == "json_object":
        return Source(_grammars({"json_schema": _schema({"type": "object"})}), plain=True)
    if kind == "json_schema":
        return Source(_grammars({"json_schema": _schema(value)}))
    if kind == "regex":
        return Source(_grammars({"lark_grammar": _regex(value)}))
    if kind == "choice":
        return Source(_grammars({"lark_grammar": _choice(value)}), plain=True)
    if kind == "grammar":
        return Source(_grammars({"lark_grammar": _lark(value)}))
    if kind == "structural_tag":
        parts = _Parts(tags)
        lark = parts.translate(_json(value, "structural_tag"))
        return Source(_grammars({"lark_grammar": lark}, *parts.side), tuple(sorted(parts.used)))
    raise ConstraintError(f"unknown kind of constraint {kind!r}: give one of {', '.join(KINDS)}")


def _grammars(first: dict[str, Any], *others: dict[str, Any]) -> str:
    return json.dumps({"grammars": [first, *others], "max_tokens": None})


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConstraintError(f"{name} must be a non-empty string")
    if len(value) > SOURCE_CHARS:
        raise ConstraintError(f"{name} has {len(value)} characters, at most {SOURCE_CHARS} are allowed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConstraintError(f"{name} holds a lone surrogate") from None
    return value


# --- JSON schemas -----------------------------------------------------------------------------------------------------


def _json(value: Any, name: str) -> Any:
    """Parse JSON text and bound depth and size of what it holds."""
    if isinstance(value, str):
        try:
            value = json.loads(_text(value, name))
        except (ValueError, RecursionError) as e:
            raise ConstraintError(f"{name} is not JSON: {one_line(e)}") from None
    level = [value]
    for _ in range(NESTING + 1):
        if not level:
            break
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    else:
        raise ConstraintError(f"{name} is nested deeper than {NESTING} levels")
    try:
        _text(json.dumps(value, allow_nan=False), name)
    except (TypeError, ValueError) as e:
        raise e if isinstance(e, ConstraintError) else ConstraintError(f"{name}: {one_line(e)}") from None
    return value


def _schema(value: Any) -> dict[str, Any]:
    """Check a schema and add our way of writing JSON."""
    schema = _json(value, "the JSON schema")
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise ConstraintError("the JSON schema must be an object")
    if "x-guidance" in schema:
        raise ConstraintError("x-guidance in the JSON schema is not supported: leave it out")
    if schema == {"not": {}} or not _Finite(schema).holds(schema):
        raise ConstraintError("no finite document satisfies the JSON schema")
    return {**schema, "x-guidance": JSON_OPTIONS}


class _Finite:
    """Tells whether a schema has a finite document, which required properties that refer back can rule out.

    The least fixed point: a reference counts as finite once its target has been shown to be, given those before it.
    """

    def __init__(self, root: dict[str, Any]):
        self._root = root
        self._shown: set[str] = set()
        open_ = self._references()
        if len(open_) > REFERENCES:
            raise ConstraintError(f"the JSON schema refers to {len(open_)} places, at most {REFERENCES} are allowed")
        while True:
            new = {ref for ref, target in open_.items() if self.holds(target)} - self._shown
            if not new:
                break
            self._shown |= new

    def holds(self, schema: Any) -> bool:
        """Apply what has been shown to one schema; whatever is malformed is left to the compiler."""
        if not isinstance(schema, dict):
            return schema is not False
        ref = schema.get("$ref")
        if isinstance(ref, str) and self._target(ref) is not None and ref not in self._shown:
            return False
        for key, rule in (("allOf", all), ("anyOf", any), ("oneOf", any)):
            branches = schema.get(key)
            if isinstance(branches, list) and branches and not rule(self.holds(b) for b in branches):
                return False
        types = schema.get("type")
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, list) or set(map(str, types)) - {"object", "array"}:
            return True
        return ("object" in types and self._object(schema)) or ("array" in types and self._array(schema))

    def _object(self, schema: dict[str, Any]) -> bool:
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, dict) or not isinstance(required, list):
            return True
        return all(self.holds(properties.get(str(name), True)) for name in required)

    def _array(self, schema: dict[str, Any]) -> bool:
        least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
        if not isinstance(least, int | float) or not isinstance(first, list):
            return True
        needed = first[: math.ceil(min(least, len(first)))]
        return all(map(self.holds, needed)) and (least <= len(first) or self.holds(schema.get("items", True)))

    def _references(self) -> dict[str, Any]:
        found, todo = {}, [self._root]
        while todo:
            value: Any = todo.pop()
            if isinstance(value, dict):
                ref = value.get("$ref")
                if isinstance(ref, str) and (target := self._target(ref)) is not None:
                    found[ref] = target
                todo += value.values()
            elif isinstance(value, list):
                todo += value
        return found

    def _target(self, ref: str) -> Any:
        """Follow a local JSON pointer; None if it is none or leads nowhere."""
        if ref != "#" and not ref.startswith("#/"):
            return None
        at: Any = self._root
        for step in ref[2:].split("/") if ref != "#" else ():
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(at, dict) and name in at:
                at = at[name]
            elif isinstance(at, list) and name.isdecimal() and int(name) < len(at):
                at = at[int(name)]
            else:
                return None
        return at


# --- Texts ------------------------------------------------------------------------------------------------------------


def _regex(value: Any) -> str:
    """Write a regular expression as a Lark grammar."""
    escaped = re.sub(r"(\\.)|/", lambda m: m[1] or r"\/", _text(value, "regex"), flags=re.S).replace("\n", r"\n")
    return f"start: TEXT\nTEXT: /{escaped}/\n"


def _choice(value: Any) -> str:
    """Write a list of strings as a Lark grammar."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) for v in value):
        raise ConstraintError("choice must be a non-empty list of strings")
    if len(value) > CHOICES:
        raise ConstraintError(f"choice has {len(value)} strings, at most {CHOICES} are allowed")
    _text("".join(value) or " ", "choice")
    return _regex("|".join(_escaped(v) for v in dict.fromkeys(value)) or "()")


def _escaped(text: str) -> str:
    """Spell a text as a regular expression."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):x}}}" for c in text)


# What `<` may stand in without naming a token: strings, regular expressions, comments.
_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*')


def _lark(value: Any) -> str:
    """Take a Lark grammar, or translate GBNF into one."""
    text = _text(value, "grammar")
    bare = _QUOTED.sub(" ", text)
    if "::=" in bare:
        try:
            from llguidance.gbnf_to_lark import any_to_lark

            return any_to_lark(text)
        except ImportError:
            raise ConstraintError("structured output needs llguidance: pip install 'qwen3-jax[serve]'") from None
        except Exception as e:  # the translator raises bare Exception, and RecursionError on deep nesting
            raise ConstraintError(f"grammar: {one_line(e) or type(e).__name__}") from None
    if "<" in bare or "%llguidance" in bare or re.search(r"(?<!\w)@\w", bare):
        raise ConstraintError("grammar: special tokens, %llguidance and @ are not supported: leave them out")
    return text


# --- Structural tags --------------------------------------------------------------------------------------------------


class _Parts:
    """Writes the formats of a structural tag as Lark rules; schemas and the like become grammars of their own."""

    def __init__(self, tags: Mapping[str, int]):
        self.side: list[dict[str, Any]] = []
        self.used: set[int] = set()
        self._tags = tags
        self._split = re.compile("|".join(map(re.escape, tags)) or r"(?!)")
        self._rules: list[str] = []

    def translate(self, value: Any) -> str:
        if not isinstance(value, dict):
            raise ConstraintError("structural_tag must be an object")
        value = {k: v for k, v in value.items() if k != "type"}
        if value.keys() == {"structures", "triggers"}:
            tags = [
                {
                    "begin": self._of(s, "begin"),
                    "content": {"type": "json_schema", "json_schema": self._of(s, "schema")},
                    "end": self._of(s, "end"),
                }
                for s in self._list(value, "structures")
            ]
            form = {"type": "triggered_tags", "triggers": value["triggers"], "tags": tags}
        elif value.keys() == {"format"}:
            form = value["format"]
        else:
            raise ConstraintError('structural_tag must hold "format", or "structures" and "triggers"')
        start = self._format(form, last=True)
        return f"start: {start}\n" + "".join(f"{rule}\n" for rule in self._rules) + "TEXT: /(.|\\n)*/\n"

    def _format(self, form: Any, *, last: bool) -> str:
        """Return the expression of a format; `last`: nothing follows it."""
        kind = self._of(form, "type")
        if kind == "const_string":
            return self._literal(self._of(form, "value"))
        if kind == "json_schema":
            return self._grammar({"json_schema": _schema(self._of(form, "json_schema"))})
        if kind == "regex":
            return self._grammar({"lark_grammar": _regex(self._of(form, "pattern"))})
        if kind == "grammar":
            return self._grammar({"lark_grammar": _lark(self._of(form, "grammar"))})
        if kind == "any_text" and last:
            return "TEXT"
        if kind == "sequence":
            elements = self._list(form, "elements")
            return " ".join(self._format(e, last=last and i == len(elements) - 1) for i, e in enumerate(elements))
        if kind == "or":
            return f"({' | '.join(self._format(e, last=last) for e in self._list(form, 'elements'))})"
        if kind == "tag":
            return self._tag(form, self._of(form, "begin"))
        if kind == "tags_with_separator":
            one = self._rule(" | ".join(self._tag(t, self._of(t, "begin")) for t in self._list(form, "tags")))
            more = "" if form.get("stop_after_first") else f" ({self._literal(self._of(form, 'separator'))} {one})*"
            return f"({one}{more})" if form.get("at_least_one") else f"({one}{more})?"
        if kind == "triggered_tags" and last:
            one = self._rule(" | ".join(self._triggered(t, form) for t in self._list(form, "tags")))
            if form.get("stop_after_first"):
                return one if form.get("at_least_one") else f"({one} | TEXT)"
            return f"{one}{'+' if form.get('at_least_one') else '*'} TEXT"
        raise ConstraintError(f"structural_tag: format {str(kind)[:40]!r} is not supported here")

    def _triggered(self, tag: Any, form: Any) -> str:
        begin = self._of(tag, "begin")
        trigger = next((t for t in self._list(form, "triggers") if begin.startswith(str(t)) and t), None)
        if trigger is None:
            raise ConstraintError(f"structural_tag: begin {begin[:40]!r} starts with none of the triggers")
        found = self._split.match(begin)
        if found:
            return f"TEXT {self._literal(found[0])} {self._tag(tag, begin[found.end() :])}"
        head = self._rule(f"TEXT {self._literal(trigger)}", "[lazy]")
        return f"{head} {self._tag(tag, begin[len(trigger) :])}"

    def _tag(self, tag: Any, begin: str) -> str:
        content = self._format(self._of(tag, "content"), last=False)
        return f"{self._literal(begin)} {content} {self._literal(self._of(tag, 'end'))}".strip()

    def _literal(self, text: Any) -> str:
        """Write a fixed text, the added tokens in it as such."""
        if not isinstance(text, str) or re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
            raise ConstraintError("structural_tag: begin, end and the like must be strings without control characters")
        parts, at = [], 0
        for found in self._split.finditer(text):
            parts += [json.dumps(text[at : found.start()], ensure_ascii=False), self._token(found[0])]
            at = found.end()
        parts.append(json.dumps(text[at:], ensure_ascii=False))
        return " ".join(part for part in parts if part != '""')

    def _token(self, tag: str) -> str:
        self.used.add(self._tags[tag])
        return f"<[{self._tags[tag]}]>"

    def _grammar(self, grammar: dict[str, Any]) -> str:
        self.side.append({"name": f"part_{len(self.side)}", **grammar})
        return f"@part_{len(self.side) - 1}"

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    @staticmethod
    def _of(form: Any, key: str) -> Any:
        if not isinstance(form, dict) or key not in form:
            raise ConstraintError(f"structural_tag: {key!r} is missing")
        return form[key]

    def _list(self, form: Any, key: str) -> Sequence[Any]:
        value = self._of(form, key)
        if not isinstance(value, list) or not value:
            raise ConstraintError(f"structural_tag: {key!r} must be a non-empty list")
        return value

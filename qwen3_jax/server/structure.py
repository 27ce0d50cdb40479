"""The form of the answer: response_format, structured_outputs and the older guided_* fields → one constraint."""

from typing import Any, NamedTuple

from qwen3_jax.server.errors import ApiError, refuse
from qwen3_jax.server.schema import Generating
from qwen3_jax.text.grammars import Kind


class Wanted(NamedTuple):
    """A form, the field that asks for it, and what it is in `text.constraints`."""

    field: str
    kind: Kind
    value: Any = None


def wanted(body: Generating) -> Wanted | None:
    """Return the form that a request asks for, if any.

    Raises:
        ApiError: two forms at once.
    """
    found = [*_response_format(body), *_structured_outputs(body), *_guided(body)]
    if len(found) > 1:
        names = [name for name, _, _ in found]
        raise ApiError(400, f"{' and '.join(names)} ask for different forms: give one of them", param=names[0])
    return Wanted(*found[0]) if found else None


def _response_format(body: Generating) -> list[tuple[str, Kind, Any]]:
    asked = body.response_format
    if asked is None or asked.type == "text":
        return []
    if asked.type == "json_schema" and asked.json_schema is not None:
        return [("response_format", "json_schema", asked.json_schema.schema_)]
    if asked.type == "structural_tag":
        return [("response_format", "structural_tag", {"type": "structural_tag", **(asked.model_extra or {})})]
    return [("response_format", "json_object", None)]


def _structured_outputs(body: Generating) -> list[tuple[str, Kind, Any]]:
    asked = body.structured_outputs
    if asked is None:
        return []
    kinds: dict[Kind, Any] = {
        "json_schema": asked.json_,
        "regex": asked.regex,
        "choice": asked.choice,
        "grammar": asked.grammar,
        "json_object": asked.json_object or None,
        "structural_tag": asked.structural_tag,
    }
    given: list[tuple[str, Kind, Any]] = [("structured_outputs", k, v) for k, v in kinds.items() if v is not None]
    if len(given) != 1:
        raise refuse("structured_outputs", f"structured_outputs has {len(given)} forms: give exactly one")
    return given


def _guided(body: Generating) -> list[tuple[str, Kind, Any]]:
    fields: tuple[tuple[str, Kind, Any], ...] = (
        ("guided_json", "json_schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choice", body.guided_choice),
        ("guided_grammar", "grammar", body.guided_grammar),
        ("guided_json_object", "json_object", body.guided_json_object or None),
    )
    return [field for field in fields if field[2] is not None]

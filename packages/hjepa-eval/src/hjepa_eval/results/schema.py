"""A checker for the part of JSON Schema that schema.json uses, so that the published file is what is enforced."""

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


@cache
def results_schema() -> dict[str, Any]:
    """The published schema of a results file."""
    content: dict[str, Any] = json.loads((files("hjepa_eval.results") / "schema.json").read_text("utf-8"))
    return content


def check(content: object, schema: dict[str, Any], where: str = "results") -> None:
    """Refuse content that does not follow a schema, naming the place.

    Args:
        content: What json gives.
        schema: Keys type, const, enum, minLength, minimum, required, properties, additionalProperties and items.
        where: Path of the content, for the message.

    Raises:
        ValueError: One line: place, value, what is wrong.
    """
    if "const" in schema and content != schema["const"]:
        raise ValueError(f"{where}={content!r}: it must be {schema['const']!r}; another version of hjepa-eval wrote it")
    if "enum" in schema and content not in schema["enum"]:
        raise ValueError(f"{where}={content!r}: unknown; allowed: {', '.join(map(str, schema['enum']))}")
    if "type" in schema:
        _check_type(content, schema["type"], where)
    if isinstance(content, str) and len(content) < schema.get("minLength", 0):
        raise ValueError(f"{where}='': it must not be empty")
    if isinstance(content, int | float) and content < schema.get("minimum", -math.inf):
        raise ValueError(f"{where}={content}: it must be at least {schema['minimum']}")
    if isinstance(content, dict):
        _check_object(content, schema, where)
    if isinstance(content, list) and "items" in schema:
        for number, item in enumerate(content):
            check(item, schema["items"], f"{where}[{number}]")


def _check_type(content: object, allowed: str | list[str], where: str) -> None:
    names = [allowed] if isinstance(allowed, str) else allowed
    # bool is a kind of int for Python and none for JSON.
    fits = any(isinstance(content, _TYPES[n]) and (n == "boolean" or not isinstance(content, bool)) for n in names)
    if not fits or (isinstance(content, float) and not math.isfinite(content)):
        raise ValueError(f"{where}={content!r}: it must be {' or '.join(names)}")


def _check_object(content: dict[str, Any], schema: dict[str, Any], where: str) -> None:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key in schema.get("required", ()):
        if key not in content:
            raise ValueError(f"{where}.{key}: missing; allowed: {', '.join(known)}")
    for key, value in content.items():
        if key in known:
            check(value, known[key], f"{where}.{key}")
        elif others is False:
            raise ValueError(f"{where}.{key}: unknown; allowed: {', '.join(known)}")
        elif isinstance(others, dict):
            check(value, others, f"{where}.{key}")

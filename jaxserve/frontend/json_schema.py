"""JSON schemas as they come from users: limits, and what makes them ready for a grammar.

The limits keep hostile schemas from costing anything before the grammar compiler, which has limits
of its own, sees them. Walks are loops, because a schema may be nested deeper than Python's stack.
"""

import json
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 64  # nested objects and arrays; vLLM's limit, too
MAX_ENUM_VALUES = 10_000  # of one enum
# Keywords by what their value is: a schema, a list of them, or an object of them.
_ONE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains")
_ONE += ("propertyNames", "unevaluatedItems", "unevaluatedProperties")
_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


class SchemaError(ValueError):
    """A schema is not allowed; the message says why and what to do."""


def read_schema(schema: str | dict[str, Any], *, max_bytes: int, closed: bool) -> str:
    """Check a schema and return it as the JSON text to compile.

    Args:
        max_bytes: Of the text.
        closed: Objects that name properties have no others, unless they say so.

    Raises:
        SchemaError: It is not JSON, no object, too large, too deep, or refers to another document.
    """
    value = _parse(schema, max_bytes) if isinstance(schema, str) else schema
    if not isinstance(value, dict):
        raise SchemaError(f"the schema is a JSON {type(value).__name__}; use an object")
    _check_size(value, max_bytes)  # before the copy: a dict of Python's may even hold itself
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"the schema is not JSON ({error}); use JSON values only") from None
    if len(text.encode()) > max_bytes:
        raise _too_large(max_bytes)
    # Options of the grammar compiler, by which a schema could switch its own checks off.
    value.pop("x-guidance", None)
    for part in list(_subschemas(value)):
        _check_part(part)
        _discriminate(part, value)
        if closed and ("properties" in part or "patternProperties" in part):
            part.setdefault("additionalProperties", False)
    return json.dumps(value, ensure_ascii=False)


def _too_large(max_bytes: int) -> SchemaError:
    return SchemaError(f"the schema is larger than {max_bytes} bytes; use a smaller one")


def _parse(text: str, max_bytes: int) -> Any:
    if len(text) > max_bytes:
        raise _too_large(max_bytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(
            f"the schema is not valid JSON ({error or 'too deeply nested'}); correct it"
        ) from None


def _check_size(root: Any, max_bytes: int) -> None:
    """Depth, and number of values: each takes at least a byte."""
    stack: list[tuple[Any, int]] = [(root, 1)]
    num_values = 0
    while stack:
        value, depth = stack.pop()
        num_values += 1
        if num_values > max_bytes:
            raise _too_large(max_bytes)
        if isinstance(value, dict | list | tuple):
            if depth > MAX_DEPTH:
                raise SchemaError(
                    f"the schema is nested deeper than {MAX_DEPTH} levels; flatten it, or name "
                    "parts in $defs and refer to them with $ref"
                )
            children = value.values() if isinstance(value, dict) else value
            stack.extend((child, depth + 1) for child in children)


def _subschemas(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and every one within it; data (const, enum, examples) may look like one."""
    stack: list[Any] = [root]
    while stack:
        schema = stack.pop()
        if not isinstance(schema, dict):
            continue
        yield schema
        stack.extend(schema[key] for key in _ONE if key in schema)
        for key in _LIST:
            if isinstance(schema.get(key), list):
                stack.extend(schema[key])
        for key in _NAMED:
            if isinstance(schema.get(key), dict):
                stack.extend(schema[key].values())


def _check_part(part: dict[str, Any]) -> None:
    reference = part.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise SchemaError(
            f"$ref {reference[:80]!r} refers to another document, and none is fetched; put it "
            "under $defs and use '#/$defs/...'"
        )
    values = part.get("enum")
    if isinstance(values, list) and len(values) > MAX_ENUM_VALUES:
        raise SchemaError(
            f"an enum has {len(values)} values; at most {MAX_ENUM_VALUES} are allowed, use a "
            "pattern instead"
        )


def _discriminate(part: dict[str, Any], root: dict[str, Any]) -> None:
    """Writes oneOf as anyOf where a required property tells its branches apart: the same then.

    The grammar compiler has no general oneOf. Pydantic's tagged unions have this form.
    """
    branches = part.get("oneOf")
    if not isinstance(branches, list) or "anyOf" in part:
        return
    tags = [_tags(_resolve(branch, root)) for branch in branches]
    common = set.intersection(*(set(found) for found in tags)) if tags else set()
    for name in common:
        values = [json.dumps(value) for found in tags for value in found[name]]
        if len(set(values)) == len(values):
            part["anyOf"] = part.pop("oneOf")
            part.pop("discriminator", None)
            return


def _resolve(schema: Any, root: dict[str, Any]) -> Any:
    """What a local reference means; one that leads nowhere is left to the compiler."""
    for _ in range(MAX_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            return schema
        schema = root
        for key in reference.removeprefix("#").split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            schema = schema.get(key) if isinstance(schema, dict) else None
    return None


def _tags(schema: Any) -> dict[str, list[str]]:
    """The strings that each required property of an object's schema may have, where listed."""
    if not isinstance(schema, dict) or schema.get("type") != "object":
        return {}
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    found: dict[str, list[str]] = {}
    for name, own in properties.items():
        if name in required and isinstance(own, dict):
            values = [own["const"]] if "const" in own else own.get("enum")
            if isinstance(values, list) and all(isinstance(value, str) for value in values):
                found[name] = list(dict.fromkeys(values))
    return found

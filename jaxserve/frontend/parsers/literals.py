"""Values that are written as text: Python literals, and values typed by a JSON schema."""

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

_JSON_NAMES = {"null": None, "true": True, "false": False}
_MAX_DEPTH = 64  # brackets in a literal
_BRACKETS = re.compile(r"[()\[\]{}]")
_MAX_REFS = 8  # a $ref to a $ref ...


def literal_json(text: str) -> str:
    """The JSON of a Python literal; null, true and false are literals too.

    Raises:
        ValueError: It is none, has no JSON, or is nested too deeply.
    """
    return _json(_literal(text))


def typed_json(text: str, types: list[str]) -> str:
    """The JSON of what `text` means by the first of the JSON `types` that fits, else of itself."""
    is_null = text.lower() in ("null", "none")  # templates show a model its own null as either
    if is_null and (types[0] != "string" or "null" in types):
        return "null"
    for kind in types:
        try:
            return _json(_READERS[kind](text))
        except (KeyError, ValueError):
            continue
    return _json(text)


def escaped(text: str) -> str:
    """Text as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def parameter_types(schema: Mapping[str, Any], name: str) -> list[str]:
    """The JSON types of a tool's parameter, in the order of its schema; string if it has none."""
    properties = schema.get("properties")
    types = _types(properties.get(name) if isinstance(properties, Mapping) else None, schema)
    return list(dict.fromkeys(types)) or ["string"]


def _types(part: Any, root: Mapping[str, Any], num_refs: int = 0) -> list[str]:
    if not isinstance(part, Mapping) or num_refs > _MAX_REFS:
        return []
    if isinstance(kind := part.get("type"), str):
        return [kind]
    if isinstance(kind, list):
        return [each for each in kind if isinstance(each, str)]
    for key in ("anyOf", "oneOf"):
        if isinstance(options := part.get(key), list):
            return [kind for option in options for kind in _types(option, root, num_refs + 1)]
    if isinstance(reference := part.get("$ref"), str) and reference.startswith("#/"):
        target: Any = root
        for step in reference[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, Mapping) else None
        return _types(target, root, num_refs + 1)
    return []


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair can be sent as an escape only.
    return text if text.isascii() or _is_unicode(text) else json.dumps(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_depth(text: str) -> None:
    """Refuse what is nested so deeply that a recursive reader might fail; strings count as well."""
    depth = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in "([{" else -1
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def _literal(text: str) -> Any:
    _check_depth(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | str() | int() | None as value):
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -_value(node.operand)
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case _:
            raise ValueError(f"no literal that JSON can hold: {type(node).__name__}")


def _key(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str() as key):
            return key
        case ast.Constant(value=bool() | int() | None as key):
            return json.dumps(key)
        case _:
            raise ValueError("the key of a dict is no string")


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"not finite: {text}")
    return int(value) if value.is_integer() else value


def _boolean(text: str) -> bool:
    if (lower := text.strip().lower()) not in ("true", "false"):
        raise ValueError(f"neither true nor false: {text}")
    return lower == "true"


def _structure(text: str) -> Any:
    _check_depth(text)
    try:
        value = json.loads(text)
    except ValueError:
        value = _literal(text)
    return _literal(value) if isinstance(value, str) else value  # a model may encode it twice


_READERS = {
    "string": str,
    "integer": int,
    "number": _number,
    "boolean": _boolean,
    "object": _structure,
    "array": _structure,
}

"""A request's body as JSON, strictly: RFC 8259 without what its readers disagree on.

NaN, Infinity, numbers too large for a double, duplicate keys and lone surrogates are refused, for
they mean different things to different parsers, or none.
"""

import json
import math
import re
from typing import Any, Never

from jaxserve.server.errors import APIError

MAX_DIGITS = 400  # of an integer; a double ends at 309


class _BadJSON(ValueError):
    pass


def parse_json(body: bytes, *, max_depth: int) -> Any:
    """The value of a body.

    Raises:
        APIError: 400 invalid_json.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _invalid(f"it is not UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise _invalid("it is empty")
    _check_depth(text, max_depth)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except _BadJSON as error:
        raise _invalid(str(error)) from None
    # Only an escape can bring one in: UTF-8 has none.
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(value)
    return value


def parse_object(body: bytes, *, max_depth: int) -> dict[str, Any]:
    """The same for a body that must be an object."""
    value = parse_json(body, max_depth=max_depth)
    if not isinstance(value, dict):
        raise _invalid(f"it is {_kind(value)}; send an object")
    return value


def _invalid(why: str) -> APIError:
    return APIError(400, f"the body is not valid JSON: {why}", code="invalid_json")


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a string"
        case list():
            return "an array"
    return "a number"


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _BadJSON(f"the key {twice[:40]!r} comes twice")
    return result


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _BadJSON(f"an integer has {len(digits)} digits; at most {MAX_DIGITS} are allowed")
    return int(digits)


def _double(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _BadJSON(f"the number {digits[:40]} is too large")
    return value


def _constant(name: str) -> Never:
    raise _BadJSON(f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_int=_integer, parse_float=_double, parse_constant=_constant
)


# Strings are taken whole, so that brackets in them do not count; possessive, so linear in time.
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[{\]}]', re.DOTALL)


def _check_depth(text: str, max_depth: int) -> None:
    """Refuses deep nesting before a recursive parser sees it."""
    if text.count("[") + text.count("{") <= max_depth:
        return
    depth = 0
    for match in _BRACKETS.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
            if depth > max_depth:
                raise _invalid(f"it is nested more than {max_depth} deep")
        elif token in "]}":
            depth -= 1


def _check_surrogates(value: Any) -> None:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise _invalid("a string holds a lone surrogate") from None
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())

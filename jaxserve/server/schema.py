"""A JSON object as a msgspec struct, with errors that name the field in OpenAI's way."""

import difflib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec

from jaxserve.server.errors import APIError, invalid

_WHERE = re.compile(r"(.*?)(?: - at `(.*)`)?", re.DOTALL)
_CODES = (
    (re.compile(r"Expected `int` >=? -?\d"), "integer_below_min_value"),
    (re.compile(r"Expected `int` <=? -?\d"), "integer_above_max_value"),
    (re.compile(r"Expected `float` >=? "), "decimal_below_min_value"),
    (re.compile(r"Expected `float` <=? "), "decimal_above_max_value"),
    (re.compile(r"Number out of range"), "decimal_above_max_value"),
    (re.compile(r"Integer value out of range"), "integer_above_max_value"),
    (re.compile(r"Expected `array` of length >= 1"), "empty_array"),
    (re.compile(r"Expected `array` of length"), "array_above_max_length"),
    (re.compile(r"Expected `object` of length"), "object_above_max_length"),
    (re.compile(r"Expected `str` of length <="), "string_above_max_length"),
    (re.compile(r"Invalid enum value"), "invalid_value"),
    (re.compile(r"Invalid value"), "invalid_value"),
    (re.compile(r"Expected `str` "), "invalid_value"),  # too short, or of another pattern
    (re.compile(r"Expected `"), "invalid_type"),
)


def read[T](
    kind: type[T], data: dict[str, Any], *, allow_unknown: bool = False, prefix: str = ""
) -> T:
    """The object as `kind`, without coercion: "10", true and 1.5 are no integers.

    Args:
        allow_unknown: Leave out fields at the top that `kind` does not have.
        prefix: In front of the field's name in an error, such as "messages[0]".

    Raises:
        APIError: 400; the first thing that is wrong.
    """
    if allow_unknown:
        known = _known(kind)
        data = {name: value for name, value in data.items() if name in known}
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), _known(kind), prefix) from None


@lru_cache
def _known(kind: type) -> tuple[str, ...]:
    return tuple(field.encode_name for field in msgspec.structs.fields(kind))


def _explain(text: str, known: Sequence[str], prefix: str) -> APIError:
    match = _WHERE.fullmatch(text)
    what, where = (match[1], match[2]) if match else (text, None)
    path = (where or "$").removeprefix("$").removeprefix(".").removesuffix(".")
    path = ".".join(part for part in (prefix, path) if part)
    if found := re.match(r"Object missing required field `(.*)`", what):
        param = f"{path}.{found[1]}".removeprefix(".")
        return invalid(f"{param} is missing; send it", param, "missing_required_parameter")
    if found := re.match(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        param = f"{path}.{found[1]}".removeprefix(".")
        near = [] if path else difflib.get_close_matches(found[1], known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        if found[1].startswith("guided_"):  # vLLM's names until 0.11
            hint = "use structured_outputs"
        return invalid(f"unknown field {param[:100]!r}; {hint}", param[:100], "unknown_parameter")
    code = next((code for pattern, code in _CODES if pattern.match(what)), "invalid_value")
    what = what[0].lower() + what[1:].replace("`", "")
    return invalid(f"{path or 'the body'}: {what}", path or None, code)

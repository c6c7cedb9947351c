"""The fields of structural tags: which there are, and reading them."""

from typing import Any

_FIELDS = {  # of each type: those that must be there, and those that may
    "const_string": ("value", ""),
    "json_schema": ("json_schema", "style any_order"),
    "grammar": ("grammar", ""),
    "regex": ("pattern", ""),
    "any_text": ("", "excludes max_chars max_tokens"),
    "sequence": ("elements", ""),
    "or": ("elements", ""),
    "optional": ("content", ""),
    "plus": ("content", ""),
    "star": ("content", ""),
    "repeat": ("content min max", ""),
    "tag": ("begin content end", ""),
    "triggered_tags": ("triggers tags", "at_least_one stop_after_first excludes"),
    "tags_with_separator": ("tags separator", "at_least_one stop_after_first"),
    "dispatch": ("rules", "loop excludes"),
    "token": ("token", ""),
    "exclude_token": ("", "exclude_tokens"),
    "any_tokens": ("", "exclude_tokens max_tokens"),
    "token_triggered_tags": (
        "trigger_tokens tags", "exclude_tokens at_least_one stop_after_first"
    ),
    "token_dispatch": ("rules", "loop exclude_tokens"),
}  # fmt: skip
_FREE = {"any_text", "any_tokens", "triggered_tags", "token_triggered_tags", "dispatch",
         "token_dispatch"}  # fmt: skip


class StructuralTagError(ValueError):
    """A structural tag is not allowed; the message says where and why."""


def fail(where: str, why: str) -> StructuralTagError:
    """An error that says where."""
    return StructuralTagError(f"{where} {why}")


def kind_of(given: Any, where: str) -> str:
    """A format's type; its fields are known then."""
    kind = given.get("type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise fail(where, f"has the type {kind!r:.40}; use one of {', '.join(_FIELDS)}")
    needed, allowed = (set(names.split()) for names in _FIELDS[kind])
    if missing := needed - given.keys():
        raise fail(where, f"({kind}) lacks {', '.join(sorted(missing))}")
    if unknown := given.keys() - needed - allowed - {"type"}:
        raise fail(where, f"({kind}) has the unknown field {min(map(str, unknown)):.40}")
    for name in ("at_least_one", "stop_after_first", "loop", "any_order"):
        if not isinstance(given.get(name, False), bool):
            raise fail(f"{where}.{name}", "is neither true nor false")
    return kind


def string(given: dict[str, Any], name: str, where: str) -> str:
    """A field that is a string."""
    if not isinstance(given[name], str):
        raise fail(f"{where}.{name}", "is not a string")
    return given[name]


def items(given: dict[str, Any], name: str, where: str) -> list[Any]:
    """A field that is a list, not empty."""
    if not isinstance(given[name], list) or not given[name]:
        raise fail(f"{where}.{name}", "is not a list with something in it")
    return given[name]


def strings(given: dict[str, Any], name: str, where: str) -> list[str]:
    """A field that is a list of strings; absent: none."""
    values = given.get(name) or []
    if not isinstance(values, list) or any(not isinstance(v, str) or not v for v in values):
        raise fail(f"{where}.{name}", "is not a list of strings that are not empty")
    return list(dict.fromkeys(values))


def whole(given: dict[str, Any], name: str, where: str, low: int = -1) -> int:
    """A field that is a whole number."""
    value = given[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
        raise fail(f"{where}.{name}", f"is not a whole number from {low} on")
    return value


def is_free(given: Any) -> bool:
    """Whether nothing in a format says where it ends."""
    if not isinstance(given, dict):
        return False
    match given.get("type"):
        case "sequence" | "or":
            elements = given.get("elements")
            if not isinstance(elements, list):
                return False
            return any(map(is_free, elements if given["type"] == "or" else elements[-1:]))
        case "optional":
            return is_free(given.get("content"))
        case "tag":
            return given.get("end") in ("", [""]) and is_free(given.get("content"))
        case kind:
            return isinstance(kind, str) and kind in _FREE

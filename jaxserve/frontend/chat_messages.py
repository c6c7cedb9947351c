"""A conversation as plain data, checked, in the form that chat templates expect."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_REASONING = ("reasoning_content", "thinking", "reasoning")


def plain_messages(
    messages: Sequence[Mapping[str, Any]], *, keep_parts: bool
) -> list[dict[str, Any]]:
    """A fresh copy of plain data, in the form that templates expect."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            "messages must be a list of objects with role and content, not "
            f"{type(messages).__name__}",
            param="messages",
        )
    if not messages:
        raise RequestError("messages is empty; send at least one message", param="messages")
    return [_message(i, message, keep_parts) for i, message in enumerate(messages)]


def _message(index: int, message: Mapping[str, Any], keep_parts: bool) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(
            f"{where} is a {type(message).__name__}; use an object with role and content",
            param="messages",
        )
    if not isinstance(message.get("role"), str):
        raise RequestError(
            f"{where} has no role; use system, user, assistant or tool", param="messages"
        )
    # APIs write content=None or tool_calls=None, on which many templates fail or print "None".
    result = {str(key): plain_data(value) for key, value in message.items() if value is not None}
    content = result.get("content")
    if isinstance(content, list | tuple):
        texts = [_part_text(where, part) for part in content]
        if keep_parts:
            result["content"] = [{"type": "text", "text": text} for text in texts]
        else:
            result["content"] = "\n".join(texts)
    elif content is not None and not isinstance(content, str):
        raise RequestError(
            f"{where}.content is a {type(content).__name__}; use a string or a list of text parts",
            param="messages",
        )
    reasoning = next((result[key] for key in _REASONING if key in result), None)
    if reasoning is not None:
        result = {"thinking": reasoning, "reasoning": reasoning, **result}
        result["reasoning_content"] = reasoning
    if "tool_calls" in result:
        result["tool_calls"] = _tool_calls(where, result["tool_calls"])
        result.setdefault("content", "")  # templates read it, though APIs leave it out then
    return result


def _part_text(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text", part.get("refusal")) if kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        came = repr(kind) if isinstance(part, dict) else type(part).__name__
        raise RequestError(
            f"{where}.content has a part of type {came}; only text parts are supported: "
            '{"type": "text", "text": "..."}',
            param="messages",
            code="unsupported_parameter" if isinstance(kind, str) else None,
        )
    return text


def _tool_calls(where: str, calls: Any) -> list[Any]:
    """OpenAI sends a call's arguments as a string of JSON; templates expect the object."""
    if not isinstance(calls, list | tuple) or any(not isinstance(call, dict) for call in calls):
        raise RequestError(f"{where}.tool_calls must be a list of objects", param="messages")
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                raise RequestError(
                    f"{where}.tool_calls has arguments that are not valid JSON", param="messages"
                ) from None
    return list(calls)


def plain_objects(name: str, values: Sequence[Mapping[str, Any]]) -> list[Any]:
    if isinstance(values, str | Mapping) or any(not isinstance(v, Mapping) for v in values):
        raise RequestError(f"{name} must be a list of objects", param=name)
    return [plain_data(value) for value in values]


def plain_data(value: Any) -> Any:
    """Plain JSON types only: other objects have methods that a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    # Subclasses (enums, numpy scalars) carry more methods than their base types.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    dump = getattr(value, "model_dump", None)
    if callable(dump):  # the OpenAI client's message objects
        return plain_data(dump())
    return f"<{type(value).__name__}>"

"""The messages and tools of a chat request, checked before a template sees them."""

import re
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from jaxserve.server.errors import invalid
from jaxserve.server_config import RequestLimits

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class FunctionDefinition(Struct, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str


class NamedToolChoice(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"] = "function"
    function: FunctionName


type ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


def check_messages(messages: list[dict[str, Any]], limits: RequestLimits) -> None:
    """Raises APIError with the place of the first message that is malformed."""
    if not messages:
        raise invalid("messages is empty; send at least one message", "messages", "empty_array")
    if len(messages) > limits.max_messages:
        raise invalid(
            f"messages has {len(messages)} entries; use at most {limits.max_messages}",
            "messages",
            "array_above_max_length",
        )
    call_ids: set[str] = set()
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role")
        if role not in ROLES:
            code = "missing_required_parameter" if role is None else "invalid_value"
            raise invalid(
                f"{where}.role={role!r:.60} is unknown; use {', '.join(ROLES)}",
                f"{where}.role",
                code,
            )
        _check_content(where, message)
        _check_calls(where, message, call_ids)


def _check_content(where: str, message: dict[str, Any]) -> None:
    content = message.get("content")
    if content is None:
        if message.get("tool_calls") or message.get("function_call") or message.get("refusal"):
            return
        raise invalid(f"{where} has no content", f"{where}.content")
    if not isinstance(content, str | list):
        raise invalid(
            f"{where}.content is neither a string nor a list of parts",
            f"{where}.content",
            "invalid_type",
        )
    if isinstance(content, str):
        return
    for j, part in enumerate(content):
        _check_part(f"{where}.content[{j}]", part)


def _check_part(where: str, part: Any) -> None:
    if isinstance(part, str):
        return
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text", "refusal", "thinking"):
        return
    if kind in ("image_url", "input_image", "image"):
        raise invalid(
            "this model takes text only; leave images out",
            f"{where}.image_url.url" if kind == "image_url" else where,
            "invalid_image_url" if kind == "image_url" else "unsupported_value",
        )
    raise invalid(
        f"{where} is a part of type {kind!r:.40}; only text parts are supported: "
        '{"type": "text", "text": "..."}',
        f"{where}.type",
        "unsupported_value" if isinstance(kind, str) else "invalid_type",
    )


def _check_calls(where: str, message: dict[str, Any], call_ids: set[str]) -> None:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or any(not isinstance(call, dict) for call in calls):
        raise invalid(
            f"{where}.tool_calls is not a list of objects", f"{where}.tool_calls", "invalid_type"
        )
    call_ids.update(call["id"] for call in calls if isinstance(call.get("id"), str))
    given = message.get("tool_call_id")
    if message["role"] == "tool" and not (isinstance(given, str) and given in call_ids):
        raise invalid(
            f"{where}.tool_call_id={given!r:.60} answers no call of an earlier message",
            f"{where}.tool_call_id",
        )


def check_tools(tools: list[Tool], choice: ToolChoice | None, limits: RequestLimits) -> None:
    """Raises APIError for what is wrong with the tools of a request."""
    if not tools:
        raise invalid("tools is empty; leave it out, or name functions", "tools", "empty_array")
    if len(tools) > limits.max_tools:
        raise invalid(
            f"tools has {len(tools)} entries; use at most {limits.max_tools}",
            "tools",
            "array_above_max_length",
        )
    names: set[str] = set()
    for i, tool in enumerate(tools):
        name = tool.function.name
        where = f"tools[{i}].function.name"
        if not _TOOL_NAME.fullmatch(name):
            raise invalid(
                f"{where}={name!r:.80} is not allowed; use letters, digits, _ . and -, 64 at most",
                where,
            )
        if name in names:
            raise invalid(f"{where}={name!r} comes twice; name each function once", where)
        names.add(name)
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise invalid(
            f"tool_choice names {choice.function.name!r:.80}, which is not among the tools",
            "tool_choice",
        )

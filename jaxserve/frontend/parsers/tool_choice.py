"""The JSON schema that an output must follow when tool_choice is "required" or names a tool."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError

_DATA = {"const", "default", "enum", "examples"}  # hold values, not schemas
_SCHEMAS_BY_NAME = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}


def tool_choice_schema(
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str | Mapping[str, Any] | None,
    parallel_tool_calls: bool = True,
) -> dict[str, Any] | None:
    """The schema to constrain the output with; None if tool_choice leaves the model free.

    Args:
        tools: OpenAI's `{"type": "function", "function": {"name", "parameters"}}`.
        tool_choice: OpenAI's: "none", "auto", "required" or
            `{"type": "function", "function": {"name"}}`.
        parallel_tool_calls: Whether "required" allows more than one call.

    Returns:
        For "required" what `JsonListParser` reads, for a named tool what `NamedToolParser` reads.

    Raises:
        RequestError: The named tool is not among `tools`, or there are none.
    """
    if tool_choice in (None, "none", "auto"):
        return None
    schemas = {tool["function"]["name"]: _parameters(tool["function"]) for tool in tools}
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or name not in schemas:
            raise RequestError(
                f"tool_choice names the tool {name!r}, which is not in tools: "
                f"{', '.join(schemas) or 'there are none'}. Name one of them.",
                param="tool_choice",
            )
        return schemas[name]
    if tool_choice != "required":
        raise RequestError(
            f"tool_choice is {tool_choice!r}; it must be 'none', 'auto', 'required' or "
            "{'type': 'function', 'function': {'name': ...}}.",
            param="tool_choice",
        )
    if not schemas:
        raise RequestError(
            "tool_choice is 'required', but tools is empty. Give at least one tool.",
            param="tool_choice",
        )
    definitions: dict[str, Any] = {}
    calls = [_call(name, schema, definitions) for name, schema in schemas.items()]
    result: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
    if not parallel_tool_calls:
        result["maxItems"] = 1
    if definitions:
        result["$defs"] = definitions
    return result


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, always an object; none given: it takes none."""
    given = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    return {"type": "object", **given}


def _call(name: str, schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """One element of the array. A schema with references moves to `definitions`, whole."""
    path = "#/$defs/" + name.replace("~", "~0").replace("/", "~1")
    moved = _move_references(schema, path)
    if moved != schema:
        definitions[name] = moved
        moved = {"$ref": path}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": moved},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _move_references(schema: Any, path: str) -> Any:
    """The schema as it must be when its root is at `path` of another."""
    if isinstance(schema, list):
        return [_move_references(each, path) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _DATA:
            moved[key] = value
        elif key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            moved[key] = {name: _move_references(each, path) for name, each in value.items()}
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = path + value[1:]
        else:
            moved[key] = _move_references(value, path)
    return moved

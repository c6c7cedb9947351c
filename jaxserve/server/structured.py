"""`response_format` and `structured_outputs` as the engine's constraint."""

import json
from typing import Any, Literal

import msgspec
from msgspec import Struct

from jaxserve.server.errors import invalid
from jaxserve.server.schema import read
from jaxserve.structured_outputs import StructuredOutputsParams


class JSONSchemaFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    """What the output must look like."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: dict[str, Any] | None = None
    format: dict[str, Any] | None = None  # of a structural tag
    structures: list[dict[str, Any]] | None = None  # of its older form
    triggers: list[str] | None = None


class StructuredOutputs(Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's form of it: exactly one of the first six."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


def structured_outputs(
    response_format: dict[str, Any] | None,
    given: dict[str, Any] | None,
) -> StructuredOutputsParams | None:
    """The constraint that a request asks for; None: free text.

    Raises:
        APIError: It is malformed, or there are two.
        RequestError: The engine does not take it.
    """
    found = _of_response_format(response_format)
    if given is None:
        return found
    if found is not None:
        raise invalid(
            "response_format and structured_outputs exclude each other; send one of them",
            "structured_outputs",
        )
    values = msgspec.structs.asdict(read(StructuredOutputs, given, prefix="structured_outputs"))
    return StructuredOutputsParams(**{k: v for k, v in values.items() if v is not None})


def _of_response_format(
    data: dict[str, Any] | None,
) -> StructuredOutputsParams | None:
    if data is None:
        return None
    form = read(ResponseFormat, data, prefix="response_format")
    match form.type:
        case "text":
            return None
        case "json_object":
            return StructuredOutputsParams(json_object=True)
        case "structural_tag":
            return StructuredOutputsParams(structural_tag=json.dumps(_structural_tag(form)))
    if form.json_schema is None:
        raise invalid(
            "response_format.json_schema is missing; send its name and schema",
            "response_format.json_schema",
            "missing_required_parameter",
        )
    spec = read(JSONSchemaFormat, form.json_schema, prefix="response_format.json_schema")
    return StructuredOutputsParams(json=spec.schema)


def _structural_tag(form: ResponseFormat) -> dict[str, Any]:
    """A structural tag in one of its two forms."""
    older = {"structures": form.structures, "triggers": form.triggers}
    if form.format is not None and form.structures is None and form.triggers is None:
        return {"format": form.format}
    if form.format is None and form.structures is not None and form.triggers is not None:
        return older
    raise invalid(
        "response_format of type structural_tag has either format, or structures and triggers",
        "response_format.format",
        "missing_required_parameter",
    )

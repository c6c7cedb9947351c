"""GET /openapi.json: the routes as an OpenAPI 3.1 document, made from their structs.

Source: spec.openapis.org/oas/v3.1.1.
"""

import dataclasses
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxserve.server.auth import open_paths
from jaxserve.server.context import Context
from jaxserve.server.error_shapes import AnthropicErrorResponse
from jaxserve.server.errors import ErrorResponse
from jaxserve.server.openapi_fields import MEANING, bounds
from jaxserve.server.openapi_routes import OPERATIONS, Operation
from jaxserve.server.routes_health import own_version
from jaxserve.server_config import RequestLimits, ServerConfig

JSON = "application/json"
REF = "#/components/schemas/{name}"
ALWAYS = (400, 405, 408, 431, 500)  # any request may meet them
EARLY = (400, 408, 431)  # may come before the path is known, so in OpenAI's shape
WITH_BODY = (413, 415)
WITH_KEYS = (401, 429)
_ERRORS = {
    400: "The request is malformed, a value is not allowed, or a field is unknown.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or route.",
    405: "The method is not allowed here.",
    408: "The request did not come in time.",
    413: "The body is too large.",
    415: "The body is not JSON, or is compressed.",
    429: "The key has too many requests running; come back after Retry-After seconds.",
    431: "The headers are too large.",
    500: "The server made a mistake, or the engine has stopped.",
    503: "The server is full or shutting down; come back after Retry-After seconds.",
    504: "The request took longer than the server allows.",
}
_PARAMETER = re.compile(r"\{(\w+)(:\w+)?\}")


def openapi_route(routes: Sequence[Route]) -> Callable[[Request], Awaitable[Response]]:
    """The handler of GET /openapi.json; the document is made once, when it is first asked for.

    Args:
        routes: Of the application; those that are added later count, too.
    """
    made: list[bytes] = []

    async def openapi(request: Request) -> Response:
        if not made:
            made.append(msgspec.json.encode(document(routes, Context.of(request))))
        return Response(made[0], media_type=JSON)

    return openapi


def document(routes: Sequence[Route], context: Context) -> dict[str, Any]:
    """The OpenAPI document of the routes that `OPERATIONS` knows."""
    config = context.config
    served = {
        (method, _PARAMETER.sub(r"{\1}", route.path))
        for route in routes
        for method in route.methods or ()
    }
    known = {key: operation for key, operation in OPERATIONS.items() if key in served}
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in known.items():
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, operation, config)
    result = {
        "openapi": "3.1.1",
        "info": {
            "title": "jaxserve",
            "version": own_version(),
            "summary": "The HTTP API of jaxserve: OpenAI's, with vLLM's additions.",
            "description": _limits_in_words(config.limits),
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(list(known.values()), context),
            "responses": {
                _name(status, error): _error(status, error)
                for error in {operation.error: None for operation in known.values()}
                for status in _ERRORS
            },
            "securitySchemes": {"Bearer": {"type": "http", "scheme": "bearer"}},
        },
        "x-request-limits": dataclasses.asdict(config.limits),
    }
    if config.root_path:
        result["servers"] = [{"url": config.root_path}]
    return result


def _operation(
    method: str, path: str, operation: Operation, config: ServerConfig
) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "Done."}
    content: dict[str, Any] = {}
    if operation.answer is dict:
        content[JSON] = {"schema": {"type": "object"}}
    elif operation.answer is not None:
        content |= _content(JSON, operation.answer)
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _event(operation.event)}
    for media in operation.media:
        content[media] = {"schema": {"type": "string"}}
    if content:
        answer["content"] = content
    statuses = {*ALWAYS, *operation.statuses}
    if operation.body is not None:
        statuses |= set(WITH_BODY)
    is_open = method == "GET" and path in open_paths(protect_metrics=config.protect_metrics)
    locked = bool(config.api_keys) and not is_open
    if locked:
        statuses |= set(WITH_KEYS)
    result: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{method.lower()}_{re.sub(r'\W+', '_', path).strip('_') or 'root'}",
        "tags": [operation.tag],
        "responses": {
            **({"200": answer} if operation.succeeds else {}),
            **{
                str(status): {"$ref": f"#/components/responses/{_name(status, operation.error)}"}
                for status in sorted(statuses)
            },
        },
        "security": [{"Bearer": []}] if locked else [],
    }
    if names := _PARAMETER.findall(path):
        result["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name, _ in names
        ]
    if operation.body is not None:
        result["requestBody"] = {"required": True, "content": _content(JSON, operation.body)}
    return result


def _content(media: str, kind: type) -> dict[str, Any]:
    return {media: {"schema": {"$ref": REF.format(name=kind.__name__)}}}


def _event(kind: type) -> dict[str, Any]:
    """A server-sent event; before OpenAPI 3.2, the schema of a stream is that of each event."""
    refs: list[dict[str, Any]] = [{"type": "object"}]
    if kind is not dict:
        refs = [{"$ref": REF.format(name=each.__name__)} for each in (kind, ErrorResponse)]
    return {
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {
                "type": "string",
                "anyOf": [
                    {"const": "[DONE]"},
                    {"contentMediaType": JSON, "contentSchema": {"anyOf": refs}},
                ],
            }
        },
    }


def _error(status: int, kind: type) -> dict[str, Any]:
    content = _content(JSON, kind)
    if kind is AnthropicErrorResponse and status in EARLY:
        refs = [{"$ref": REF.format(name=each.__name__)} for each in (kind, ErrorResponse)]
        content = {JSON: {"schema": {"anyOf": refs}}}
    return {"description": _ERRORS[status], "content": content}


def _name(status: int, kind: type) -> str:
    owner = "Anthropic" if kind is AnthropicErrorResponse else ""
    return owner + HTTPStatus(status).phrase.title().replace(" ", "")


def _schemas(operations: Sequence[Operation], context: Context) -> dict[str, Any]:
    """The structs as JSON schemas, their request fields explained and bounded."""
    kinds: set[type] = {ErrorResponse}
    for each in operations:
        found = (each.body, each.answer, each.event, each.error, *each.parts.values())
        kinds.update(kind for kind in found if kind is not None and kind is not dict)
    listed = sorted(kinds, key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(listed, ref_template=REF)
    limits = bounds(context)
    for each in operations:
        if each.body is not None:
            schema = schemas[each.body.__name__]
            schema["required"] = [*each.required, *schema.get("required", ())]
            for name, field in schema["properties"].items():
                _explain(name, field, each, limits.get(name, {}))
    return schemas


def _explain(
    name: str, field: dict[str, Any], operation: Operation, limits: Mapping[str, dict[str, Any]]
) -> None:
    if name in operation.refused:
        field.clear()
        field["enum"] = list(operation.refused[name])
        field["description"] = "Known, but not supported: leave it out."
        return
    if name in MEANING:
        field["description"] = MEANING[name]
    if name in operation.required and "anyOf" in field:
        field["anyOf"].remove({"type": "null"})
        field.pop("default", None)
    part = operation.parts.get(name)
    for variant in field.get("anyOf", [field]):
        variant |= limits.get(variant.get("type", ""), {})
        if part is None:
            continue
        ref = {"$ref": REF.format(name=part.__name__)}
        if variant.get("type") == "array":
            variant["items"] = ref
        elif variant.get("type") == "object":
            del variant["type"]
            variant |= ref


def _limits_in_words(limits: RequestLimits) -> str:
    listed = "\n".join(f"- `{name}`: {value}" for name, value in dataclasses.asdict(limits).items())
    return (
        "Every error has the shape of `ErrorResponse`. Unknown fields are refused, and nothing is "
        'coerced: `"10"` is no integer.\n\nLimits of a request, each with a flag of its name '
        f"(`--max-body-bytes`):\n\n{listed}"
    )

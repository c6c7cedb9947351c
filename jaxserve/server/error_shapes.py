"""Errors in the shape of the API that the request's path belongs to: OpenAI's, or Anthropic's."""

import msgspec
from msgspec import Struct
from starlette.responses import Response
from starlette.types import Scope

from jaxserve.server.errors import APIError

ANTHROPIC_PATH = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicErrorBody(Struct, kw_only=True):
    type: str
    message: str


class AnthropicErrorResponse(Struct, kw_only=True, tag_field="type", tag="error"):
    """The body of errors below /v1/messages, and of an `error` event in their streams."""

    error: AnthropicErrorBody
    request_id: str


def anthropic_error(error: APIError, request_id: str) -> AnthropicErrorResponse:
    return AnthropicErrorResponse(
        error=AnthropicErrorBody(
            type=_TYPES.get(error.status, "invalid_request_error"),
            message=error.body().error.message,
        ),
        request_id=request_id,
    )


def error_response(error: APIError, scope: Scope) -> Response:
    """The answer to a request; its id must be in the scope's state."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if path != ANTHROPIC_PATH and not path.startswith(f"{ANTHROPIC_PATH}/"):
        return error.response()
    name = scope["state"]["request_id"]
    return Response(
        msgspec.json.encode(anthropic_error(error, name)),
        status_code=error.status,
        headers=error.headers | {"request-id": name},
        media_type="application/json",
    )

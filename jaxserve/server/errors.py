"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}}."""

import math
from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from jaxserve.errors import EngineDeadError, JaxserveError, RequestError, UnsupportedError

MAX_MESSAGE_CHARS = 1000
INVALID_REQUEST = "invalid_request_error"
OVERLOADED = "server_overloaded"
SHUTTING_DOWN = "server_shutting_down"
_TYPES = {
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ErrorBody(msgspec.Struct, kw_only=True):
    """What went wrong, for people (`message`) and for programs (`type`, `param`, `code`)."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, kw_only=True):
    """The body of every answer with a status of 400 or more."""

    error: ErrorBody


class APIError(JaxserveError):
    """A request is answered with an error.

    Args:
        status: HTTP status.
        message: What came, what is allowed, what to do.
        param: The field at fault, such as `messages[0].role`.
        code: Machine-readable reason.
        retry_after_s: When to come back, for 429 and 503.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))

    def body(self) -> ErrorResponse:
        return ErrorResponse(
            error=ErrorBody(
                message=_printable(str(self)),
                type=_TYPES.get(self.status, INVALID_REQUEST),
                param=None if self.param is None else _printable(self.param)[:200],
                code=self.code,
            )
        )

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body()),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> APIError:
    """A 400."""
    return APIError(400, message, param=param, code=code)


def overloaded(message: str, code: str = OVERLOADED) -> APIError:
    """A 503 that asks to come back in a second."""
    return APIError(503, message, code=code, retry_after_s=1)


def as_api_error(error: Exception) -> APIError | None:
    """How a known exception is told to the client; None: it is a bug of ours."""
    match error:
        case APIError():
            return error
        case RequestError(code="server_overloaded"):
            return overloaded(str(error))
        case RequestError():
            return invalid(str(error), error.param, error.code or "invalid_value")
        case UnsupportedError():
            return invalid(str(error), None, "unsupported_parameter")
        case EngineDeadError():
            return APIError(500, "the engine has stopped; try again later", code="engine_error")
    return None


def internal_error(request_id: str) -> APIError:
    """For a bug: says nothing of the inside, and names the log's lines."""
    return APIError(
        500, f"the server made a mistake; its log says more of {request_id}", code="internal_error"
    )


def _printable(text: str) -> str:
    """Bounded, and whole as UTF-8 whatever came in."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[: MAX_MESSAGE_CHARS - 3]}..."

"""Reads a request's body within its limits."""

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from jaxserve.server.errors import APIError
from jaxserve.server.json_body import parse_object
from jaxserve.server_config import RequestLimits

LONG_BODY_BYTES = 256 << 10  # parsed in a thread, for it would hold up the event loop


async def read_object(request: Request, limits: RequestLimits) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        APIError: 415 for another type, 413 for too much, 408 for too slow, 400 for bad JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise APIError(
            415,
            f"content-type {kind[:80]!r} is not supported; send application/json",
            code="unsupported_media_type",
        )
    body = await read_bytes(request, limits.max_body_bytes, limits.body_timeout_s)
    if len(body) > LONG_BODY_BYTES:
        return await asyncio.to_thread(parse_object, body, max_depth=limits.max_json_depth)
    return parse_object(body, max_depth=limits.max_json_depth)


async def read_bytes(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The body; refused before it is read when its length says so, else at the limit.

    Raises:
        APIError: 415 for compressed bodies, 413, 408.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise APIError(
            415,
            "a compressed body is not supported; send it as it is",
            code="unsupported_media_type",
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise APIError(
            408,
            f"the body did not come within {timeout_s:g} s",
            code="timeout",
            headers={"connection": "close"},
        ) from None
    except ClientDisconnect:
        raise APIError(
            400, "the client left before its body was whole", code="bad_request"
        ) from None
    return bytes(body)


def _too_large(max_bytes: int) -> APIError:
    return APIError(
        413,
        f"the body is too large; at most {max_bytes} bytes are allowed (--max-body-bytes)",
        code="request_too_large",
    )

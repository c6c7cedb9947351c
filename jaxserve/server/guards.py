"""What every request passes: a check of its Host, and an answer to whatever is raised."""

import logging
import re

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.server.error_shapes import error_response
from jaxserve.server.errors import APIError, as_api_error, internal_error, invalid

logger = logging.getLogger(__name__)

# RFC 3986: a name, an IPv4 address or a bracketed IPv6 address, and a port.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")


class Guard:
    """No exception of a handler passes it, but one in the middle of an answer.

    Args:
        allowed_hosts: Host headers without their port; none: every well-formed one.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: tuple[str, ...] = ()) -> None:
        self._app = app
        self._hosts = {host.lower().encode() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no WebSocket route
            await send({"type": "websocket.close", "code": 1008})
            return
        name = scope["state"]["request_id"]
        started = False

        async def send_safely(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            self._check_host(scope)
            await self._app(scope, receive, send_safely)
        except Exception as error:  # ours or a bug: the client gets an answer, the log the trace
            if isinstance(error, HTTPException):
                answer = _of_router(error, scope)
            else:
                answer = as_api_error(error)
            if answer is None:
                logger.exception("request %s failed", name)
                answer = internal_error(name)
            if started:
                raise  # the connection breaks, so that a cut answer does not look whole
            await error_response(answer, scope)(scope, receive, send_safely)

    def _check_host(self, scope: Scope) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if scope.get("http_version") == "1.0" and not hosts:
            return
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            raise invalid("the Host header is missing, repeated or malformed", None, "bad_request")
        if self._hosts and re.sub(rb":\d+$", b"", hosts[0]).lower() not in self._hosts:
            raise APIError(
                400, "the Host header names another server; see --allowed-hosts", code="bad_request"
            )


def _of_router(error: HTTPException, scope: Scope) -> APIError:
    """The router's refusals in our shape."""
    path = scope["path"][:100]
    if error.status_code == 404:
        return APIError(404, f"there is no {path!r} here", code="unknown_url")
    allowed = (error.headers or {}).get("Allow", "")
    return APIError(
        error.status_code,
        f"{scope['method'][:20]} is not allowed for {path!r}; use {allowed}",
        code="method_not_allowed",
        headers={"allow": allowed} if allowed else None,
    )

"""Is it alive, is it ready, which version is it."""

from importlib.metadata import PackageNotFoundError, version

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.answers import json_response
from jaxserve.server.context import Context
from jaxserve.server.errors import SHUTTING_DOWN, APIError, overloaded


class Version(Struct, kw_only=True):
    version: str


async def health(request: Request) -> Response:
    """Alive: 200 with no body. 503 when the engine is dead, or has work and makes no progress."""
    context = Context.of(request)
    if not context.llm.is_running:
        raise APIError(503, "the engine has stopped; start the server again", code="engine_error")
    if not context.telemetry.watchdog.healthy():
        raise APIError(
            503, "the engine makes no progress; start the server again", code="engine_stalled"
        )
    return Response(status_code=200)


async def ready(request: Request) -> Response:
    """Ready for traffic: 503 while draining, or when not alive."""
    if Context.of(request).not_ready:
        raise overloaded("the server is shutting down", SHUTTING_DOWN)
    return await health(request)


async def show_version(request: Request) -> Response:
    return json_response(Version(version=own_version()))


def own_version() -> str:
    try:
        return version("jaxserve-llm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"

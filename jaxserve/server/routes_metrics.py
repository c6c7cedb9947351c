"""GET /metrics: Prometheus' text format."""

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.context import Context


async def metrics(request: Request) -> Response:
    context = Context.of(request)
    body, kind = context.telemetry.metrics.render(request.headers.get("accept"))
    return Response(body, headers={"content-type": kind})

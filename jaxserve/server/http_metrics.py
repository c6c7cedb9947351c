"""Prometheus metrics of HTTP requests: prometheus-fastapi-instrumentator's, which vLLM shows.

Every label comes from a fixed set, so that no client can make series grow.
"""

import asyncio
import time
from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EXCLUDED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", "/server_info"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"
FEW_BUCKETS = (0.1, 0.5, 1.0)
MANY_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5),
    *(3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0),
)


class HTTPMetrics:
    """ASGI middleware that counts and times requests, by the template of their route.

    The time runs until the last byte is sent. A stream that its client leaves keeps its status; a
    client that leaves before there is a status counts as 4xx.

    Args:
        app: The application with the routes.
        registry: Gets the metrics.
        excluded: Templates that are not counted.
    """

    def __init__(
        self,
        app: ASGIApp,
        registry: CollectorRegistry,
        excluded: Collection[str] = EXCLUDED,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app, self._excluded, self._clock = app, frozenset(excluded), clock
        self._requests = Counter(
            "http_requests",
            "HTTP requests.",
            ("method", "status", "handler"),
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Time until the last byte of the answer, by route.",
            ("method", "handler"),
            buckets=FEW_BUCKETS,
            registry=registry,
        )
        self._all_seconds = Histogram(
            "http_request_duration_highr_seconds",
            "Time until the last byte of the answer.",
            buckets=MANY_BUCKETS,
            registry=registry,
        )
        self._request_bytes = Summary(
            "http_request_size_bytes", "Bodies by Content-Length.", ("handler",), registry=registry
        )
        self._response_bytes = Summary(
            "http_response_size_bytes", "Bodies as sent.", ("handler",), registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, num_bytes = self._clock(), 0
        status: int | None = None

        async def count(message: Message) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                num_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, count)
        except asyncio.CancelledError:
            status = status or 499
            raise
        finally:
            self._observe(scope, status or 500, num_bytes, self._clock() - start)

    def _observe(self, scope: Scope, status: int, num_bytes: int, seconds: float) -> None:
        handler = str(getattr(scope.get("route"), "path", None) or OTHER)  # set by the router
        if handler in self._excluded:
            return
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._requests.labels(method, f"{status // 100}xx", handler).inc()
        self._seconds.labels(method, handler).observe(seconds)
        self._all_seconds.observe(seconds)
        self._request_bytes.labels(handler).observe(_content_length(scope))
        self._response_bytes.labels(handler).observe(num_bytes)


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return min(int(value[:20]), 1 << 62)
    return 0

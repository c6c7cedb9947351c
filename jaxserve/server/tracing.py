"""OpenTelemetry traces: one span a request of the engine, with vLLM's attributes; no texts."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jaxserve.errors import ConfigError
from jaxserve.frontend.observers import Observers
from jaxserve.frontend.request_state import RequestState
from jaxserve.request import RequestTimes
from jaxserve.server.logs import escape
from jaxserve.server.request_log import current

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

SPAN = "llm_request"


class Tracing:
    """Sends a span to an OTLP collector, over HTTP, for each request that ends.

    A request that came with a W3C traceparent continues that trace (`AccessLog` takes it from the
    headers). Spans are sent in batches by a thread of the SDK. What OpenTelemetry reads from the
    environment holds: OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, ...

    Args:
        endpoint: Of the collector, such as http://localhost:4318/v1/traces; without a path, that
            one.
        model_name: An attribute of every span.
        clock: Of the kind that `Request.arrival_s` was read from.

    Raises:
        ConfigError: OpenTelemetry is not installed, or the endpoint is not an http(s) URL.
    """

    def __init__(
        self, endpoint: str, *, model_name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._provider = _provider(_traces_url(endpoint))
        self._tracer = self._provider.get_tracer("jaxserve")
        self._model_name, self._clock = model_name, clock
        self._parents: dict[str, Context | None] = {}  # by the engine's id
        self._lock = threading.Lock()

    def watch(self, observers: Observers) -> None:
        """Trace what these see from now on."""
        observers.submitted.append(self._on_submitted)
        observers.refused.append(self._on_refused)
        observers.finished.append(self._on_finished)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _on_submitted(self, state: RequestState) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        http = current.get()
        headers = {} if http is None else http.trace_headers
        parent = TraceContextTextMapPropagator().extract(headers) if headers else None
        with self._lock:
            self._parents[state.request.request_id] = parent

    def _on_refused(self, error: BaseException, state: RequestState | None) -> None:
        if state is not None:
            with self._lock:
                self._parents.pop(state.request.request_id, None)

    def _on_finished(self, states: Sequence[RequestState]) -> None:
        for state in states:
            self._send(state)

    def _send(self, state: RequestState) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode

        with self._lock:
            parent = self._parents.pop(state.request.request_id, None)
        seconds = max(0.0, self._clock() - state.request.arrival_s)
        end_ns = time.time_ns()
        span = self._tracer.start_span(
            SPAN,
            context=parent if parent is not None else Context(),
            kind=SpanKind.SERVER,
            start_time=end_ns - int(seconds * 1e9),
            attributes=self._attributes(state, seconds),
        )
        if any(choice.finish_reason == "error" for choice in state.summaries()):
            span.set_status(StatusCode.ERROR)
        span.end(end_ns)

    def _attributes(
        self, state: RequestState, seconds: float
    ) -> dict[str, str | int | float | list[str]]:
        request, sampling, choices = state.request, state.request.sampling, state.summaries()
        return {
            "gen_ai.response.model": self._model_name,
            "gen_ai.request.id": escape(state.request_id),  # half characters would lose the batch
            "gen_ai.request.n": sampling.n,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.response.finish_reasons": [c.finish_reason or "error" for c in choices],
            "gen_ai.usage.prompt_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.completion_tokens": sum(choice.num_tokens for choice in choices),
            "gen_ai.usage.num_sequences": len(choices),
            "gen_ai.latency.e2e": seconds,
            **_latencies(state.times),
        }


def _latencies(times: RequestTimes | None) -> dict[str, float]:
    """Seconds of each phase; nothing of a request that got no token."""
    if times is None or not times.first_token_s:
        return {}
    arrival_s, scheduled_s, first_token_s, last_token_s = times
    spans = {
        "time_in_queue": scheduled_s - arrival_s,
        "time_to_first_token": first_token_s - arrival_s,
        "time_in_model_prefill": first_token_s - scheduled_s,
        "time_in_model_decode": last_token_s - first_token_s,
        "time_in_model_inference": last_token_s - scheduled_s,
    }
    return {f"gen_ai.latency.{name}": max(0.0, value) for name, value in spans.items()}


def _traces_url(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"otlp_traces_endpoint={endpoint!r} is not an http(s) URL; OTLP over HTTP is spoken, "
            "so give one such as http://localhost:4318/v1/traces"
        )
    return parts._replace(path="/v1/traces").geturl() if parts.path in ("", "/") else endpoint


def _provider(url: str) -> "TracerProvider":
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint is set, but OpenTelemetry is not installed ({error}); "
            "pip install 'jaxserve-llm[otel]', or leave it out"
        ) from None
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if named else {"service.name": "jaxserve"})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider

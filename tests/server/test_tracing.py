"""Spans as a collector gets them, over a real socket."""

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from jaxserve.client import Client
from jaxserve.errors import ConfigError, RequestError
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.request_log import HTTPRequest, current
from jaxserve.server.tracing import Tracing
from tests.server.observed import Clock, make_client, new_delta, new_state, run

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Keeps the spans that are posted to /v1/traces."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: list[str] = []
        keep = self._keep

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                keep(self.path, body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _keep(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services.extend(
                a.value.string_value
                for a in resource.resource.attributes
                if a.key == "service.name"
            )
            self.spans.extend(span for scope in resource.scope_spans for span in scope.spans)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def attributes(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(v) for v in value.array_value.values]
        return getattr(value, kind)

    return {a.key: plain(a.value) for a in span.attributes}


def submit(client: Client, *headers: tuple[str, str], **options: Any) -> Any:
    """As an HTTP handler does."""
    token = current.set(HTTPRequest("http", dict(headers)))
    try:
        return client.submit("Say canary", SamplingParams(**options), request_id="a")
    finally:
        current.reset(token)


def test_a_request_is_one_span_with_vllms_attributes(collector: Collector) -> None:
    clock = Clock(100.0)
    tracing = Tracing(collector.url, model_name="demo", clock=clock)
    state = new_state("a", prompt=5, n=2, temperature=0.5, top_p=0.9, max_tokens=8)
    tracing._on_submitted(state)
    new_delta(state, 101.0, 103.0, 103.0)
    new_delta(state, 101.0, 103.0, 106.0, reason="stop")
    new_delta(state, 101.0, 103.0, 107.0, choice=1, reason="length")
    clock.now = 108.0
    tracing._on_finished([state])
    tracing.close()
    (span,) = collector.spans
    assert (span.name, span.kind) == ("llm_request", 2)  # a server's
    assert span.end_time_unix_nano - span.start_time_unix_nano == 8_000_000_000
    assert attributes(span) == {
        "gen_ai.response.model": "demo",
        "gen_ai.request.id": "a",
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.response.finish_reasons": ["stop", "length"],
        "gen_ai.usage.prompt_tokens": 5,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.latency.e2e": 8.0,
        "gen_ai.latency.time_in_queue": 1.0,
        "gen_ai.latency.time_to_first_token": 3.0,
        "gen_ai.latency.time_in_model_prefill": 2.0,
        "gen_ai.latency.time_in_model_decode": 4.0,
        "gen_ai.latency.time_in_model_inference": 6.0,
    }
    assert collector.services == ["jaxserve"]


def test_a_trace_that_came_with_the_request_goes_on(collector: Collector) -> None:
    client, engine = make_client("one two three", refuse_after=4)
    tracing = Tracing(f"{collector.url}/v1/traces", model_name="demo")
    tracing.watch(client.observers)
    states = [
        submit(client, ("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "k=v")),
        submit(client),
        submit(client, ("traceparent", "00-nonsense")),
        submit(client, ("traceparent", f"00-{TRACE}-{PARENT}-00")),  # not sampled by its sender
    ]
    for prompt in ("x", ""):
        with pytest.raises(RequestError):
            client.submit(prompt, SamplingParams())
    run(client, engine, states)
    tracing.close()
    first, *others = collector.spans
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert first.trace_state == "k=v"
    assert len(others) == 2
    assert all(not span.parent_span_id and span.trace_id.hex() != TRACE for span in others)
    assert "canary" not in str(collector.spans)
    assert tracing._parents == {}


def test_aborts_and_errors_have_spans_too(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    client, engine = make_client("one")
    tracing = Tracing(collector.url + "/", model_name="demo")
    tracing.watch(client.observers)
    client.cancel(submit(client))
    submit(client)
    engine.die("boom")
    message = client.next_message(timeout_s=1)
    assert message is not None
    client.handle(message)
    tracing.close()
    reasons = [attributes(span)["gen_ai.response.finish_reasons"] for span in collector.spans]
    assert reasons == [["abort"], ["error"]]
    assert [span.status.code for span in collector.spans] == [0, 2]
    assert set(collector.services) == {"mine"}
    client.shutdown()


def test_an_id_that_is_no_utf8_loses_no_span(collector: Collector) -> None:
    client, engine = make_client("one")
    tracing = Tracing(collector.url, model_name="demo")
    tracing.watch(client.observers)
    names = ["a", "\ud800", "b"]
    states = [client.submit("Say", SamplingParams(), request_id=name) for name in names]
    run(client, engine, states)
    tracing.close()
    found = [attributes(span)["gen_ai.request.id"] for span in collector.spans]
    assert found == ["a", "\\ud800", "b"]


@pytest.mark.parametrize("endpoint", ["", "localhost:4317", "grpc://localhost:4317", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint"):
        Tracing(endpoint, model_name="demo")


def test_without_opentelemetry_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"jaxserve-llm\[otel\]"):
        Tracing("http://localhost:4318", model_name="demo")


def test_the_module_does_not_import_opentelemetry() -> None:
    code = "import sys, jaxserve.server.tracing; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What /metrics says after given traffic, in Prometheus's own reading."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from jaxserve.errors import ConfigError, EngineDeadError, RequestError
from jaxserve.frontend.observers import Observers
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.histogram import one_two_five
from jaxserve.server.http_metrics import HTTPMetrics
from jaxserve.server.metrics import Metrics
from jaxserve.server.stats_log import StatsLog
from tests.server.observed import (
    Clock,
    make_client,
    new_delta,
    new_state,
    new_stats,
    promtool,
    run,
)

TABLE = json.loads((Path(__file__).parent / "vllm_metrics.json").read_text())


def new_metrics(clock: Clock | None = None, **options: Any) -> Metrics:
    options = {"model_name": "m", "max_model_len": 2048, "clock": clock or Clock(), **options}
    return Metrics(**options)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """A sample of the engine's, or of the registry when the name has its own prefix."""
    if name.startswith("http_"):
        return metrics.registry.get_sample_value(name, labels)
    labels = {"model_name": "m", "engine": "0", **labels}
    return metrics.registry.get_sample_value(f"jaxserve:{name}", labels)


def summed(metrics: Metrics, name: str) -> tuple[float | None, float | None]:
    """A histogram's count and sum."""
    return value(metrics, f"{name}_count"), value(metrics, f"{name}_sum")


def traffic(metrics: Metrics, clock: Clock) -> None:
    """Two requests, one of them with two choices, and one that is aborted."""
    one = new_state("one", prompt=10)
    two = new_state("two", prompt=4, n=2, temperature=1.0, max_tokens=8)
    gone = new_state("gone")
    for state in (one, two, gone):
        metrics.on_submitted(state)
    clock.now = 103.0
    metrics.on_step(
        new_stats(
            num_running=4,
            num_waiting=1,
            num_prefill_tokens=18,
            num_used_blocks=3,
            num_free_blocks=9,
            num_allocated_slots=48,
            num_written_slots=22,
            num_prefix_queries=18,
            num_prefix_hits=8,
            num_preemptions=2,
            host_s=0.002,
            device_s=0.3,
        ),
        [
            new_delta(one, 101.0, 102.5, 102.5, cached=8),
            *(new_delta(two, 101.0, 102.5, 102.5, choice=i) for i in range(2)),
            new_delta(gone, 101.0, 102.5, 102.5),
        ],
    )
    gone.end("abort")
    metrics.on_finished([gone])
    clock.now = 105.0
    metrics.on_step(
        new_stats(num_running=1, num_decode_tokens=3, num_free_blocks=12),
        [
            new_delta(one, 101.0, 102.5, 104.5, tokens=2),
            new_delta(two, 101.0, 102.5, 104.5, choice=0, reason="stop"),
            new_delta(two, 101.0, 102.5, 104.5, choice=1, reason="length"),
        ],
    )
    metrics.on_finished([two])


def test_names_types_labels_and_buckets_are_those_of_vllm() -> None:
    families = {family.name: family for family in new_metrics(prefix="vllm").collect()}
    for row in TABLE:
        family = families[f"vllm:{row['name']}"]
        assert family.type == row["type"], row["name"]
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        assert sorted(labels) == row["labels"]
        if row["buckets"]:
            buckets = [s.labels["le"] for s in family.samples if s.name.endswith("_bucket")]
            assert [float(le) for le in buckets] == [*row["buckets"], float("inf")], row["name"]


def test_a_length_has_buckets_up_to_the_models() -> None:
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)
    assert one_two_five(4999) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


def test_tokens_and_times_are_counted() -> None:
    clock = Clock()
    metrics = new_metrics(clock)
    traffic(metrics, clock)
    assert value(metrics, "generation_tokens_total") == 8
    assert value(metrics, "prompt_tokens_total") == 18  # once a request
    assert value(metrics, "prompt_tokens_cached_total") == 8
    assert value(metrics, "prompt_tokens_by_source_total", source="local_compute") == 10
    assert summed(metrics, "time_to_first_token_seconds") == (4, 12.0)  # when it was handled
    assert summed(metrics, "inter_token_latency_seconds") == (3, 6.0)
    assert value(metrics, "inter_token_latency_seconds_bucket", le="1.0") == 0
    assert value(metrics, "inter_token_latency_seconds_bucket", le="2.5") == 3
    assert summed(metrics, "iteration_tokens_total") == (2, 21)
    assert summed(metrics, "step_host_seconds") == (2, 0.002)
    assert summed(metrics, "step_device_seconds") == (2, 0.3)


def test_a_request_that_ended_is_counted_with_its_phases() -> None:
    clock = Clock()
    metrics = new_metrics(clock)
    traffic(metrics, clock)
    reasons = {
        reason: value(metrics, "request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    }
    assert reasons == {"stop": 1, "length": 1, "abort": 1, "error": 0}
    for name, expected in {
        "e2e_request_latency_seconds": (2, 10.0),
        "request_queue_time_seconds": (2, 2.0),
        "request_prefill_time_seconds": (2, 3.0),
        "request_decode_time_seconds": (2, 4.0),
        "request_inference_time_seconds": (2, 7.0),
        "request_time_per_output_token_seconds": (2, 4.0),
        "request_generation_tokens": (2, 4),
        "request_prompt_tokens": (1, 4),
        "request_prefill_kv_computed_tokens": (1, 4),
        "request_max_num_generation_tokens": (1, 2),
        "request_params_n": (1, 2),
        "request_params_max_tokens": (1, 8),
    }.items():
        assert summed(metrics, name) == expected, name


def test_gauges_follow_the_steps_and_fall_to_0_when_nothing_is_left() -> None:
    clock = Clock()
    metrics = new_metrics(clock)
    state = new_state("a")
    metrics.on_submitted(state)
    step = new_stats(
        num_running=3,
        num_waiting=2,
        num_used_blocks=3,
        num_free_blocks=9,
        num_allocated_slots=48,
        num_written_slots=22,
        num_preemptions=5,
        num_prefix_queries=7,
        num_prefix_hits=6,
    )
    metrics.on_step(step, [])
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "kv_cache_allocated_slots": 48,
        "kv_cache_wasted_slots": 26,
    }
    assert {name: value(metrics, name) for name in expected} == expected
    assert value(metrics, "num_requests_waiting_by_reason", reason="capacity") == 2
    state.end("abort")  # after the engine's last word
    metrics.on_finished([state])
    assert {name: value(metrics, name) for name in expected} == dict.fromkeys(expected, 0)
    for name, total in {
        "num_preemptions_total": 5,
        "prefix_cache_queries_total": 7,
        "prefix_cache_hits_total": 6,
    }.items():
        assert value(metrics, name) == total


def test_refusals_are_counted_by_reason() -> None:
    metrics = new_metrics()
    state = new_state("a")
    metrics.on_submitted(state)
    metrics.on_refused(RequestError("full", code="server_overloaded"), state)
    metrics.on_refused(RequestError("bad"), None)
    metrics.on_refused(EngineDeadError("gone"), None)
    metrics.on_refused(RuntimeError("?"), None)
    metrics.reject("draining")
    metrics.reject("<script>")
    family = next(f for f in metrics.collect() if f.name == "jaxserve:admission_rejections")
    counts = {sample.labels["reason"]: sample.value for sample in family.samples}
    assert counts == {
        "max_num_queued_reqs": 1,
        "rate_limit": 0,
        "draining": 1,
        "engine_dead": 1,
        "invalid": 1,
        "other": 2,
    }
    assert metrics.totals().num_unfinished == 0
    assert value(metrics, "request_success_total", finished_reason="error") == 0


def test_a_client_feeds_them() -> None:
    client, engine = make_client("one two three", refuse_after=4)
    metrics = new_metrics(late_compiles=lambda: 3)
    metrics.watch(client.observers)
    states = [
        client.submit("Say it", SamplingParams()),
        client.submit("Say it", SamplingParams(n=2, temperature=1.0, stop=["two"])),
        client.submit("Say it", SamplingParams(max_tokens=1)),
        client.submit("Say it", SamplingParams(), request_id="gone"),
    ]
    client.abort("gone")
    for prompt in ("Say it", ""):
        with pytest.raises(RequestError):
            client.submit(prompt, SamplingParams())
    run(client, engine, states)
    tokens = [choice.num_tokens for state in states for choice in state.summaries()]
    assert tokens == [4, 2, 2, 1, 0]
    reasons = ("stop", "length", "abort", "error")
    found = [value(metrics, "request_success_total", finished_reason=r) for r in reasons]
    assert found == [3, 1, 1, 0]
    assert value(metrics, "generation_tokens_total") == sum(tokens)
    assert value(metrics, "request_generation_tokens_sum") == sum(tokens)
    assert value(metrics, "admission_rejections_total", reason="max_num_queued_reqs") == 1
    assert value(metrics, "admission_rejections_total", reason="invalid") == 1
    assert value(metrics, "late_compiles_total") == 3
    assert value(metrics, "num_requests_running") == 0
    engine.refuse_after = None
    client.submit("Say it", SamplingParams())
    client.shutdown()  # what still runs ends with an error
    assert value(metrics, "request_success_total", finished_reason="error") == 1
    assert metrics.totals().num_unfinished == 0


def test_an_observer_that_fails_costs_no_token(caplog: pytest.LogCaptureFixture) -> None:
    client, engine = make_client("one two three")
    told: list[str] = []

    def fail(*facts: object) -> None:
        raise RuntimeError("surprise")

    watch: Observers = client.observers
    for observers in (watch.submitted, watch.refused, watch.step, watch.finished):
        observers.append(fail)
    watch.finished.append(lambda states: told.extend(s.request_id for s in states))
    state = client.submit("Say", SamplingParams(), request_id="a")
    with pytest.raises(RequestError):
        client.submit("", SamplingParams())
    run(client, engine, [state])
    output = state.take()
    assert output is not None
    assert output.outputs[0].text == "one two three"
    assert told == ["a"]
    assert "surprise" in caplog.text


def test_every_request_is_told_of_once_from_start_to_end() -> None:
    client, engine = make_client("a b", refuse_after=3)
    events: list[tuple[str, str]] = []
    watch = client.observers
    watch.submitted.append(lambda state: events.append(("submitted", state.request_id)))
    watch.refused.append(
        lambda error, state: events.append(("refused", state.request_id if state else "-"))
    )
    watch.finished.append(lambda states: events.extend(("finished", s.request_id) for s in states))
    states = [client.submit("Say", SamplingParams(), request_id=name) for name in "abc"]
    with pytest.raises(RequestError):
        client.submit("Say", SamplingParams(), request_id="d")
    with pytest.raises(RequestError):
        client.submit("", SamplingParams(), request_id="e")
    client.cancel(states[0])
    client.cancel(states[0])
    run(client, engine, states[1:2])
    client.cancel(states[1])
    engine.die()
    client.shutdown()
    assert events == [
        *(("submitted", name) for name in "abcd"),
        ("refused", "d"),
        ("refused", "-"),
        *(("finished", name) for name in "abc"),
    ]


@pytest.mark.parametrize("prefix", ["jaxserve", "vllm"])
def test_prometheus_reads_the_exposition_after_traffic(prefix: str) -> None:
    clock = Clock()
    cache = {"block_size": 16, "cache_dtype": "auto", "num_gpu_blocks": 12}
    metrics = new_metrics(clock, prefix=prefix, model_name='a\\"b\n{}💥', cache_config=cache)
    traffic(metrics, clock)
    HTTPMetrics(Starlette(), metrics.registry)
    for accept, parse in (
        (None, parse_text),
        ("text/plain;version=abc", parse_text),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", parse_open),
    ):
        text, content_type = metrics.render(accept)
        assert ("openmetrics" in content_type) == (parse is parse_open)
        families = {family.name: family for family in parse(text.decode())}
        assert {f"{prefix}:{row['name']}" for row in TABLE} <= families.keys()
        assert families[f"{prefix}:request_params_n"].type == "histogram"
        info = families[f"{prefix}:cache_config_info"].samples[0]
        assert info.labels["model_name"] == 'a\\"b\n{}💥'
        assert info.labels["num_gpu_blocks"] == "12"
    names = {family.name for family in parse_text(metrics.render()[0].decode())}
    assert {"process_resident_memory_bytes", "python_info", "http_requests"} <= names


def test_promtool_finds_no_error() -> None:
    clock = Clock()
    metrics = new_metrics(clock)
    traffic(metrics, clock)
    HTTPMetrics(Starlette(), metrics.registry)
    done = promtool("check", "metrics", text=metrics.render()[0].decode())
    # Two habits of vLLM's names that promtool would have otherwise; all else is in order.
    allowed = ("should not contain ':'", "iteration_tokens_total non-counter metrics")
    said = (done.stderr + done.stdout).splitlines()
    assert [line for line in said if not any(words in line for words in allowed)] == []
    assert done.returncode in (0, 3)  # 3: there are such remarks


def test_a_prefix_that_no_name_can_have_is_refused() -> None:
    for prefix in ("", "a b", "9a", "a:b", "é"):
        with pytest.raises(ConfigError, match="metrics_prefix"):
            new_metrics(prefix=prefix)


def test_threads_lose_no_count_and_a_scrape_sees_whole_steps() -> None:
    metrics = new_metrics()
    num_threads, num_requests = 4, 60
    stop = threading.Event()
    torn: list[object] = []

    def serve(number: int) -> None:
        for i in range(num_requests):
            state = new_state(f"{number}-{i}")
            metrics.on_submitted(state)
            metrics.on_step(new_stats(num_decode_tokens=1), [new_delta(state, 1.0, 2.0, 2.0)])
            last = new_delta(state, 1.0, 2.0, 3.0, reason="stop")
            metrics.on_step(new_stats(num_decode_tokens=1), [last])
            metrics.on_finished([state])

    def scrape() -> None:
        while not stop.is_set():
            samples = {
                sample.name: sample.value
                for family in parse_text(metrics.render()[0].decode())
                for sample in family.samples
                if sample.name.startswith("jaxserve:") and "le" not in sample.labels
            }
            steps = samples["jaxserve:iteration_tokens_total_count"]
            if steps != samples["jaxserve:generation_tokens_total"]:
                torn.append(samples)

    scraper = threading.Thread(target=scrape)
    servers = [threading.Thread(target=serve, args=(i,)) for i in range(num_threads)]
    for thread in (scraper, *servers):
        thread.start()
    for thread in servers:
        thread.join()
    stop.set()
    scraper.join()
    assert torn == []
    total = num_threads * num_requests
    assert value(metrics, "generation_tokens_total") == 2 * total
    assert value(metrics, "request_success_total", finished_reason="stop") == total
    assert summed(metrics, "inter_token_latency_seconds") == (total, total)
    assert metrics.totals().num_unfinished == 0


def test_a_step_of_256_rows_costs_little() -> None:
    clock = Clock()
    metrics = new_metrics(clock)
    states = [new_state(str(i)) for i in range(256)]
    for state in states:
        metrics.on_submitted(state)
    best = float("inf")
    for i in range(30):
        deltas = [new_delta(state, 101.0, 102.0, 102.0 + i) for state in states]
        start = time.perf_counter()
        metrics.on_step(new_stats(num_decode_tokens=256), deltas)
        best = min(best, time.perf_counter() - start)
    assert best < 1.5e-3
    assert value(metrics, "generation_tokens_total") == 30 * 256


# --- HTTP ---


async def hello(request: HTTPRequest) -> Response:
    return PlainTextResponse("hello")


async def stream(request: HTTPRequest) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"part"

    return StreamingResponse(parts())


async def fail(request: HTTPRequest) -> Response:
    raise RuntimeError("surprise")


async def wait(request: HTTPRequest) -> Response:
    await asyncio.Event().wait()
    return PlainTextResponse("never")


def new_app(registry: CollectorRegistry) -> HTTPMetrics:
    routes = [
        Route("/v1/models/{name}", hello),
        Route("/v1/chat/completions", hello, methods=["POST"]),
        Route("/stream", stream),
        Route("/fail", fail),
        Route("/wait", wait),
        Route("/health", hello),
        Mount("/static", PlainTextResponse("file")),
    ]
    return HTTPMetrics(Starlette(routes=routes), registry)


async def call(app: Any, path: str, method: str = "GET", body: bytes = b"") -> int | None:
    """One request through ASGI; the status, None when there was none."""
    status: int | None = None
    sent = iter([{"type": "http.request", "body": body}])

    async def receive() -> Any:
        for message in sent:
            return message
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    headers = [(b"host", b"x"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    try:
        await app(scope, receive, send)
    except RuntimeError as error:
        assert str(error) == "surprise"
    return status


def test_http_requests_are_counted_by_the_template_of_their_route() -> None:
    registry = CollectorRegistry()
    app = new_app(registry)

    async def go() -> None:
        for name in ("a", "b", "%0a"):
            assert await call(app, f"/v1/models/{name}") == 200
        assert await call(app, "/v1/chat/completions", "POST", b"12345") == 200
        assert await call(app, "/v1/chat/completions") == 405
        assert await call(app, "/stream") == 200
        assert await call(app, "/fail") == 500
        assert await call(app, "/health") == 200
        assert await call(app, "/nowhere") == 404
        task = asyncio.create_task(call(app, "/wait"))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(go())
    family = next(f for f in registry.collect() if f.name == "http_requests")
    counts = {
        (s.labels["method"], s.labels["status"], s.labels["handler"]): s.value
        for s in family.samples
        if s.name == "http_requests_total"
    }
    assert counts == {
        ("GET", "2xx", "/v1/models/{name}"): 3,
        ("POST", "2xx", "/v1/chat/completions"): 1,
        ("GET", "4xx", "/v1/chat/completions"): 1,
        ("GET", "2xx", "/stream"): 1,
        ("GET", "5xx", "/fail"): 1,
        ("GET", "4xx", "other"): 1,
        ("GET", "4xx", "/wait"): 1,
    }
    sample = registry.get_sample_value
    assert sample("http_response_size_bytes_sum", {"handler": "/stream"}) == 12
    assert sample("http_request_size_bytes_sum", {"handler": "/v1/chat/completions"}) == 5
    labels = {"method": "GET", "handler": "/stream"}
    assert sample("http_request_duration_seconds_count", labels) == 1
    assert sample("http_request_duration_highr_seconds_count", {}) == 9


def test_no_client_can_make_series_grow() -> None:
    registry = CollectorRegistry()
    app = new_app(registry)

    def count() -> int:
        return sum(len(family.samples) for family in registry.collect())

    async def go() -> int:
        for method in ("GET", "BREW"):
            await call(app, "/x", method)
            await call(app, "/v1/models/x", method)
            await call(app, "/static/x", method)
        before = count()
        for i in range(300):
            await call(app, f"/{i}", f"M{i}")
            await call(app, f"/v1/models/{i}", f"M{i}")
            await call(app, f"/static/{i}", f"M{i}")
        return before

    assert asyncio.run(go()) == count()


# --- The line in the log ---


def test_the_line_is_written_only_when_something_happened(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    metrics = new_metrics(clock)
    log = StatsLog(metrics.totals, clock=clock)
    caplog.set_level("INFO", "jaxserve.server.stats_log")
    log.log()
    assert caplog.messages == []
    clock.now = 100.0
    traffic(metrics, clock)  # until second 105, with one request left
    log.log()
    assert caplog.messages == [
        "Engine 000: Avg prompt throughput: 3.6 tokens/s, "
        "Avg generation throughput: 1.6 tokens/s, Running: 1 reqs, Waiting: 0 reqs, "
        "Preemptions: 0, KV cache usage: 0.0%, Prefix cache hit rate: 0.0%"
    ]
    clock.now = 115.0
    log.log()
    assert len(caplog.messages) == 1
    step = new_stats(num_used_blocks=1, num_free_blocks=3, num_waiting=7, num_preemptions=2)
    metrics.on_step(step, [])
    log.log()
    assert "Waiting: 7 reqs, Preemptions: 2, KV cache usage: 25.0%" in caplog.messages[1]


def test_a_thread_writes_the_line_and_stops(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new_metrics()
    caplog.set_level("INFO", "jaxserve.server.stats_log")
    log = StatsLog(metrics.totals, interval_s=0.01)
    log.start()
    metrics.on_step(new_stats(), [])
    deadline = time.monotonic() + 5
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.005)
    metrics.on_step(new_stats(), [])
    log.stop()
    log.stop()
    assert len(caplog.messages) == 2

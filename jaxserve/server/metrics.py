"""Prometheus metrics of the engine: vLLM's names, types, labels and buckets, and our own.

A metric that vLLM has (v1/metrics/loggers.py) means here what it means there, with two differences.
The histograms of requests hold those that ended by themselves (stop, length), for the latency of a
request that its client gave up says nothing about the server. And the prompt of a request counts
once, however many choices share it.
"""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from jaxserve.errors import ConfigError, EngineDeadError, RequestError
from jaxserve.frontend.observers import Observers, TokenEvents
from jaxserve.frontend.request_state import RequestState
from jaxserve.request import RequestTimes
from jaxserve.server.families import Families
from jaxserve.server.histogram import HISTOGRAMS, Histogram, one_two_five
from jaxserve.step import StepStats

FINISH_REASONS = ("stop", "length", "abort", "error")
COMPLETED = ("stop", "length")
# Why a request was turned away: the first is vLLM's.
REJECTIONS = ("max_num_queued_reqs", "rate_limit", "draining", "engine_dead", "invalid", "other")

# The columns of what `on_finished` gathers.
BY_CHOICE = (
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_generation_tokens",
)
BY_REQUEST = (
    "request_prompt_tokens",
    "request_prefill_kv_computed_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
)

_IDLE = StepStats(
    num_running=0,
    num_waiting=0,
    num_prefill_tokens=0,
    num_decode_tokens=0,
    num_used_blocks=0,
    num_free_blocks=0,
    num_allocated_slots=0,
    num_written_slots=0,
    num_preemptions=0,
    num_prefix_queries=0,
    num_prefix_hits=0,
    host_s=0.0,
    device_s=0.0,
)


class Totals(NamedTuple):
    """What was counted so far."""

    stats: StepStats  # of the newest step
    num_unfinished: int  # requests
    num_prompt_tokens: int
    num_generation_tokens: int


class _Live:
    """What is kept of a request that runs: of each choice, the times of its newest token."""

    __slots__ = ("num_cached_tokens", "times")

    def __init__(self, num_choices: int) -> None:
        self.times: list[RequestTimes | None] = [None] * num_choices
        self.num_cached_tokens: int | None = None  # None: no token yet


class Metrics(Collector):
    """Counts what the observers of a client see, and writes it in Prometheus's format.

    Thread-safe. A step is taken in under one lock, so a scrape sees whole steps only.

    Args:
        model_name: Label of every metric of the engine, as `engine` is.
        max_model_len: Tokens; the largest bucket of the histograms of lengths.
        prefix: Before the colon of every name of the engine.
        cache_config: Facts about the KV cache, shown as labels of `cache_config_info`.
        late_compiles: The number of XLA compilations in live traffic.
        clock: Of the kind that `Request.arrival_s` was read from.

    Raises:
        ConfigError: The prefix cannot begin a metric's name.
    """

    def __init__(
        self,
        *,
        model_name: str,
        max_model_len: int,
        engine: str = "0",
        prefix: str = "jaxserve",
        cache_config: Mapping[str, object] | None = None,
        late_compiles: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", prefix):
            raise ConfigError(
                f"metrics_prefix={prefix!r} cannot begin a metric's name; use letters, digits and "
                "_, such as jaxserve or vllm"
            )
        self._families = Families(prefix, {"model_name": model_name, "engine": engine})
        self._cache_config = {k: str(v) for k, v in (cache_config or {}).items()}
        self._late_compiles = late_compiles
        self._clock = clock
        self._lock = threading.Lock()
        self._stats = _IDLE
        self._live: dict[str, _Live] = {}  # by the engine's id
        self._generation_tokens = 0
        self._prompt_tokens = 0
        self._prompt_tokens_cached = 0
        self._finished: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        lengths = one_two_five(max_model_len)
        self._histograms = {
            name: Histogram(bounds or lengths) for name, (bounds, _) in HISTOGRAMS.items()
        }
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def watch(self, observers: Observers) -> None:
        """Count what these see from now on."""
        observers.submitted.append(self.on_submitted)
        observers.refused.append(self.on_refused)
        observers.step.append(self.on_step)
        observers.finished.append(self.on_finished)

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics if an Accept header asks for it.

        Without escaping, for prometheus-client's default turns the colon of the names into "_".
        """
        if "application/openmetrics-text" in (accept or ""):
            text = openmetrics.generate_latest(self.registry, escaping=openmetrics.ALLOWUTF8)
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def totals(self) -> Totals:
        """For the log, as of one moment."""
        with self._lock:
            return Totals(
                self._stats, len(self._live), self._prompt_tokens, self._generation_tokens
            )

    def reject(self, reason: str) -> None:
        """Count a request that was turned away; unknown reasons are "other"."""
        with self._lock:
            self._rejected[reason if reason in REJECTIONS else "other"] += 1

    # What the observers tell

    def on_submitted(self, state: RequestState) -> None:
        with self._lock:
            self._live[state.request.request_id] = _Live(state.request.sampling.n)

    def on_refused(self, error: BaseException, state: RequestState | None) -> None:
        if state is not None:
            with self._lock:
                self._live.pop(state.request.request_id, None)
        if isinstance(error, EngineDeadError):
            self.reject("engine_dead")
        elif isinstance(error, RequestError) and error.code == "server_overloaded":
            self.reject("max_num_queued_reqs")
        else:
            self.reject("invalid" if isinstance(error, ValueError) else "other")

    def on_step(self, stats: StepStats | None, tokens: TokenEvents) -> None:
        now = self._clock()
        live, histograms = self._live, self._histograms
        gaps: dict[float, int] = {}  # seconds -> tokens
        firsts: list[float] = []  # seconds
        num_tokens = 0
        with self._lock:
            if stats is not None:
                self._stats = stats
                computed = stats.num_prefill_tokens + stats.num_decode_tokens
                histograms["iteration_tokens_total"].add(computed)
                histograms["step_host_seconds"].add(stats.host_s)
                histograms["step_device_seconds"].add(stats.device_s)
            for state, delta in tokens:
                if not delta.token_ids:
                    continue
                num_tokens += len(delta.token_ids)
                kept = live.get(delta.request_id)
                if kept is None:  # ended by another thread, or begun before we watched
                    continue
                times, before = delta.times, kept.times[delta.choice]
                kept.times[delta.choice] = times
                if before is not None:
                    gap = times.last_token_s - before.last_token_s
                    gaps[gap] = gaps.get(gap, 0) + 1
                    continue
                firsts.append(now - times.arrival_s)
                if kept.num_cached_tokens is None:  # choices share the prompt
                    kept.num_cached_tokens = delta.num_cached_tokens
                    self._prompt_tokens_cached += delta.num_cached_tokens
                    self._prompt_tokens += len(state.request.prompt_token_ids)
            self._generation_tokens += num_tokens
            histograms["time_to_first_token_seconds"].add_all(firsts)
            for gap, count in gaps.items():
                histograms["inter_token_latency_seconds"].add(gap, count)

    def on_finished(self, states: Sequence[RequestState]) -> None:
        now = self._clock()
        summaries = [state.summaries() for state in states]
        by_choice: list[tuple[float, ...]] = []
        by_request: list[tuple[float, ...]] = []
        per_token: list[float] = []
        with self._lock:
            for state, choices in zip(states, summaries, strict=True):
                request = state.request
                kept = self._live.pop(request.request_id, None)
                if kept is None:
                    continue
                longest = 0
                for (_, num_tokens, reason), times in zip(choices, kept.times, strict=True):
                    self._finished[reason if reason in FINISH_REASONS else "error"] += 1
                    if reason not in COMPLETED or times is None:
                        continue
                    longest = max(longest, num_tokens)
                    arrival_s, scheduled_s, first_s, last_s = times
                    by_choice.append(
                        (
                            now - arrival_s,
                            scheduled_s - arrival_s,
                            first_s - scheduled_s,
                            last_s - first_s,
                            last_s - scheduled_s,
                            num_tokens,
                        )
                    )
                    if num_tokens > 1:
                        per_token.append((last_s - first_s) / (num_tokens - 1))
                if longest:
                    num_prompt = len(request.prompt_token_ids)
                    by_request.append(
                        (
                            num_prompt,
                            num_prompt - (kept.num_cached_tokens or 0),
                            longest,
                            request.sampling.n,
                            request.max_tokens,
                        )
                    )
            self._add_columns(BY_CHOICE, by_choice)
            self._add_columns(BY_REQUEST, by_request)
            self._histograms["request_time_per_output_token_seconds"].add_all(per_token)

    def _add_columns(self, names: Sequence[str], rows: Sequence[tuple[float, ...]]) -> None:
        for name, column in zip(names, zip(*rows, strict=True), strict=False):  # no rows: nothing
            self._histograms[name].add_all(column)

    # What a scrape reads

    def collect(self) -> Iterator[Metric]:
        """Every metric of the engine, as of one moment."""
        late_compiles = self._late_compiles() if self._late_compiles is not None else 0
        with self._lock:
            families = [*self._gauges(), *self._counters(late_compiles), *self._all_histograms()]
        yield from families

    def _gauges(self) -> Iterator[Metric]:
        # The engine says nothing more once it is idle, and an abort can be what made it so.
        stats = self._stats if self._live else _IDLE
        waiting, used = stats.num_waiting, stats.num_used_blocks
        wasted = stats.num_allocated_slots - stats.num_written_slots
        gauge = self._families.gauge
        yield gauge("num_requests_running", "Sequences in the batch.", stats.num_running)
        yield gauge("num_requests_waiting", "Sequences that wait for a place in it.", waiting)
        yield gauge(
            "num_requests_waiting_by_reason",
            "Why sequences wait.",
            {"capacity": waiting, "deferred": 0},
            by="reason",
        )
        yield gauge(
            "kv_cache_usage_perc",
            "Share of the KV cache's pages in use; 1 is all.",
            used / max(1, used + stats.num_free_blocks),
        )
        yield gauge(
            "kv_cache_allocated_slots",
            "Token places in the pages that sequences hold.",
            stats.num_allocated_slots,
        )
        yield gauge("kv_cache_wasted_slots", "Of those, places without a token.", wasted)
        yield self._families.info(
            "cache_config_info", "Facts about the KV cache, as labels.", self._cache_config
        )

    def _counters(self, late_compiles: int) -> Iterator[Metric]:
        stats, cached, prompt = self._stats, self._prompt_tokens_cached, self._prompt_tokens
        counter = self._families.counter
        for name, help_text, value in (
            ("prefix_cache_queries", "Tokens looked up in the cache.", stats.num_prefix_queries),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", stats.num_prefix_hits),
            ("num_preemptions", "Sequences that gave up their pages.", stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens of requests that got a token.", prompt),
            ("prompt_tokens_cached", "Of those, tokens from the prefix cache.", cached),
            ("generation_tokens", "Tokens that were generated.", self._generation_tokens),
            ("late_compiles", "XLA compilations in live traffic; each stalls it.", late_compiles),
        ):
            yield counter(name, help_text, value)
        sources = {"local_compute": prompt - cached, "local_cache_hit": cached}
        yield counter("prompt_tokens_by_source", "Where prompts' KV came from.", sources, "source")
        yield counter(
            "request_success",
            "Choices that ended, by how.",
            {reason: self._finished[reason] for reason in FINISH_REASONS},
            by="finished_reason",
        )
        yield counter(
            "admission_rejections",
            "Requests that were turned away, by why.",
            {reason: self._rejected[reason] for reason in REJECTIONS},
            by="reason",
        )

    def _all_histograms(self) -> Iterator[Metric]:
        for name, values in self._histograms.items():
            yield self._families.histogram(name, HISTOGRAMS[name][1], values)

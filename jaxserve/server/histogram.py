"""A histogram that takes many values at once, and those of the engine, with vLLM's buckets."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.utils import floatToGoString

# The boundaries of vllm/v1/metrics/buckets.py, so that dashboards made for vLLM fit. Seconds.
TIME_TO_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_LATENCY = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
ITERATION_TOKENS = tuple(float(2**i) for i in (0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14))
REQUEST_N = (1.0, 2.0, 5.0, 10.0, 20.0)
# Ours: a step of a small model on a TPU takes some hundred microseconds.
STEP_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

# Boundaries, None: lengths up to the model's, in `one_two_five` steps; and help.
HISTOGRAMS: dict[str, tuple[tuple[float, ...] | None, str]] = {
    "time_to_first_token_seconds": (
        TIME_TO_FIRST_TOKEN,
        "From arrival to the first token of a choice.",
    ),
    "inter_token_latency_seconds": (
        INTER_TOKEN_LATENCY,
        "Between a choice's tokens, by the steps that made them.",
    ),
    "request_time_per_output_token_seconds": (
        INTER_TOKEN_LATENCY,
        "Mean time per token after a choice's first.",
    ),
    "e2e_request_latency_seconds": (REQUEST_LATENCY, "From arrival to the end of a choice."),
    "request_queue_time_seconds": (
        REQUEST_LATENCY,
        "From arrival to the first step that computed it.",
    ),
    "request_inference_time_seconds": (
        REQUEST_LATENCY,
        "From the first step that computed it to its last token.",
    ),
    "request_prefill_time_seconds": (
        REQUEST_LATENCY,
        "From the first step that computed it to its first token.",
    ),
    "request_decode_time_seconds": (
        REQUEST_LATENCY,
        "From a choice's first token to its last.",
    ),
    "request_prompt_tokens": (None, "Prompt tokens of a request."),
    "request_generation_tokens": (None, "Generated tokens of a choice."),
    "request_prefill_kv_computed_tokens": (
        None,
        "Prompt tokens that the prefix cache did not have.",
    ),
    "request_max_num_generation_tokens": (None, "Generated tokens of a request's longest choice."),
    "request_params_max_tokens": (None, "The request parameter max_tokens, after defaults."),
    "request_params_n": (REQUEST_N, "The request parameter n."),
    "iteration_tokens_total": (
        ITERATION_TOKENS,
        "Tokens that a step computed, of prompts and outputs.",
    ),
    "step_host_seconds": (
        STEP_SECONDS,
        "Time of the host for a step: scheduling, batch building, update.",
    ),
    "step_device_seconds": (
        STEP_SECONDS,
        "Time that the host waited for the device, or saw it work, on a step.",
    ),
}


def one_two_five(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to and including `largest`."""
    series: list[float] = []
    unit = 1
    while unit <= largest:
        series.extend(float(m * unit) for m in (1, 2, 5) if m * unit <= largest)
        unit *= 10
    return tuple(series)


class Histogram:
    """Counts by bucket. Not locked: its owner is.

    prometheus-client's own takes one value a call, and two locks for it; a step of 256 rows has 256
    values, of intervals nearly all of them equal.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.sum = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float, count: int = 1) -> None:
        """Take `value`, `count` times. Below 0 is 0, for what is measured cannot be."""
        if value < 0:
            value = 0.0
        self._counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def add_all(self, values: Sequence[float]) -> None:
        """Take many values."""
        bounds, counts = self.bounds, self._counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1  # below 0: the first
        self.sum += sum([value for value in values if value > 0])

    def buckets(self) -> Iterator[tuple[str, float]]:
        """Upper bounds as Prometheus writes them, each with the number of values up to it."""
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self._counts, strict=True):
            total += count
            yield floatToGoString(bound), float(total)

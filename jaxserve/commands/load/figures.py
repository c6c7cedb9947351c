"""The figures of a run, with vLLM's names in JSON and vLLM's block on the screen."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxserve.commands.load.run import Record

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors")
_WIDTH = 50


def figures(
    records: Sequence[Record],
    duration_s: float,
    *,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput: dict[str, float],
) -> dict[str, Any]:
    """All figures; those of requests that failed count in `failed` and `errors` only.

    Args:
        records: With token counts where the answer was whole.
        metrics: Of METRICS, to tell mean, median, std and percentiles of.
        goodput: Milliseconds that a request may take, by ttft, tpot, e2el.
    """
    whole = [r for r in records if not r.error]
    num_input = sum(r.num_input or 0 for r in whole)
    num_output = sum(r.num_output or 0 for r in whole)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(whole),
        "failed": len(records) - len(whole),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(whole) / duration_s,
        "request_goodput": (
            sum(_is_good(r, goodput) for r in whole) / duration_s if goodput else None
        ),
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "input_lens": [r.num_input or 0 for r in records],
        "output_lens": [r.num_output or 0 for r in records],
        "ttfts": [r.ttft_s for r in records],
        "itls": [r.itls_s for r in records],
        "generated_texts": [r.text for r in records],
        "errors": [r.error for r in records],
        "max_output_tokens_per_s": _peak_tokens(whole),
        "max_concurrent_requests": _peak_requests(whole),
        "max_send_delay_ms": 1e3 * max((r.delay_s for r in records), default=0.0),
    }
    for name in METRICS:
        if name in metrics:
            result |= _spread(name, samples_ms(name, whole), percentiles)
    return result


def block(
    result: dict[str, Any],
    *,
    rate: float,
    max_concurrency: int | None,
    percentiles: Sequence[float],
) -> str:
    """The text that people compare."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    lines += [f"{label:<40} {value:<10}" for label, value in _rows(result, rate, max_concurrency)]
    for name, title in METRICS.items():
        if f"mean_{name}_ms" in result:
            lines.append(f"{title:-^{_WIDTH}}")
            for label, key in [
                ("Mean", "mean"), ("Median", "median"),
                *((f"P{percent(p)}", f"p{percent(p)}") for p in percentiles),
            ]:  # fmt: skip
                value = result[f"{key}_{name}_ms"]
                lines.append(f"{f'{label} {name.upper()} (ms):':<40} {value:<10.2f}")
    return "\n".join([*lines, "=" * _WIDTH])


def percent(value: float) -> str:
    """`99`, `99.9`."""
    return f"{value:g}"


def _rows(
    result: dict[str, Any], rate: float, max_concurrency: int | None
) -> Iterator[tuple[str, object]]:
    yield "Successful requests:", result["completed"]
    yield "Failed requests:", result["failed"]
    if max_concurrency is not None:
        yield "Maximum request concurrency:", max_concurrency
    if rate != float("inf"):
        yield "Request rate configured (RPS):", f"{rate:.2f}"
    yield "Benchmark duration (s):", f"{result['duration']:.2f}"
    yield "Total input tokens:", result["total_input_tokens"]
    yield "Total generated tokens:", result["total_output_tokens"]
    yield "Request throughput (req/s):", f"{result['request_throughput']:.2f}"
    if result["request_goodput"] is not None:
        yield "Request goodput (req/s):", f"{result['request_goodput']:.2f}"
    yield "Output token throughput (tok/s):", f"{result['output_throughput']:.2f}"
    yield "Peak output token throughput (tok/s):", f"{result['max_output_tokens_per_s']:.2f}"
    yield "Peak concurrent requests:", f"{result['max_concurrent_requests']:.2f}"
    yield "Total token throughput (tok/s):", f"{result['total_token_throughput']:.2f}"


def samples_ms(name: str, records: Sequence[Record]) -> list[float]:
    """What was measured of one metric, over the requests that did not fail."""
    whole = [r for r in records if not r.error]
    match name:
        case "ttft":
            samples = [r.ttft_s for r in whole]
        case "tpot":
            samples = [value for r in whole if (value := r.tpot_s) is not None]
        case "itl":
            samples = [gap for r in whole for gap in r.itls_s]
        case _:
            samples = [r.e2el_s for r in whole]
    return [1e3 * sample for sample in samples]


def _spread(name: str, samples: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    import numpy as np

    ms = np.asarray(samples or [0.0])
    result = {
        f"mean_{name}_ms": float(ms.mean()),
        f"median_{name}_ms": float(np.median(ms)),
        f"std_{name}_ms": float(ms.std()),
    }
    for p in percentiles:
        result[f"p{percent(p)}_{name}_ms"] = float(np.percentile(ms, p))
    return result


def _is_good(record: Record, goodput: dict[str, float]) -> bool:
    took = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2el": record.e2el_s}
    return all(1e3 * took[name] <= limit for name, limit in goodput.items())


def _peak_tokens(records: Sequence[Record]) -> float:
    """Most output tokens within one second of the run; a chunk has its share of its answer's."""
    import numpy as np

    if not records:
        return 0.0
    start = min(r.start_s for r in records)
    seconds = [int(at - start) for r in records for at in r.chunks_s]
    weights = [(r.num_output or 0) / len(r.chunks_s) for r in records for _ in r.chunks_s]
    return float(np.bincount(seconds, weights).max()) if seconds else 0.0


def _peak_requests(records: Sequence[Record]) -> int:
    """Most requests under way at one moment."""
    events = [(r.start_s, 1) for r in records] + [(r.start_s + r.e2el_s, -1) for r in records]
    most = running = 0
    for _, change in sorted(events):
        running += change
        most = max(most, running)
    return most

"""What is kept of runs: JSON files with vLLM's keys, and a table of several."""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from jaxserve.commands.load.arguments import Plan
from jaxserve.commands.load.figures import DETAILS, METRICS
from jaxserve.commands.parser import UsageError


def head(
    args: argparse.Namespace, plan: Plan, model: str, rate: float, limit: int | None
) -> dict[str, Any]:
    """What was measured and how, to stand before the figures."""
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": model,
        "tokenizer_id": args.tokenizer,
        "num_prompts": args.num_prompts,
        "dataset_name": args.dataset_name,
        "seed": args.seed,
        **plan.metadata,
        "request_rate": "inf" if rate == math.inf else rate,
        "burstiness": args.burstiness,
        "max_concurrency": limit,
    }


def save(
    args: argparse.Namespace, plan: Plan, result: dict[str, Any], rate: float, limit: int | None
) -> Path:
    """Writes the figures of a run; where to.

    Raises:
        UsageError: That cannot be written.
    """
    load = f"{rate}qps" + (f"-concurrency{limit}" if limit is not None else "")
    base = str(result["model_id"]).rstrip("/").rpartition("/")[2]
    name = f"{args.label or args.backend}-{load}-{base}-{result['date']}.json"
    if args.result_filename:
        given = Path(args.result_filename)
        name = str(given)
        if len(plan.loads) > 1:
            name = str(given.with_name(f"{given.stem}-{load}{given.suffix}"))
    path = Path(args.result_dir or ".") / name
    kept = {key: value for key, value in result.items() if args.save_detailed or key not in DETAILS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the result cannot be written to {path} ({error.strerror})") from None
    return path


def print_sweep(results: list[dict[str, Any]]) -> None:
    """One line a run."""
    names = [name for name in METRICS if f"median_{name}_ms" in results[0]]
    columns = ["rate", "concurrency", "failed", "req/s", "out tok/s"]
    columns += [f"median {name.upper()} ms" for name in names]
    print("  ".join(f"{column:>14}" for column in columns))
    for result in results:
        limit = result["max_concurrency"]
        cells = [
            str(result["request_rate"]),
            "-" if limit is None else str(limit),
            str(result["failed"]),
            f"{result['request_throughput']:.2f}",
            f"{result['output_throughput']:.2f}",
            *(f"{result[f'median_{name}_ms']:.2f}" for name in names),
        ]
        print("  ".join(f"{cell:>14}" for cell in cells))

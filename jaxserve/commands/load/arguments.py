"""The flags of `jaxserve bench serve`, and what they ask for."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from jaxserve.commands.engine_args import json_object
from jaxserve.commands.load.figures import METRICS
from jaxserve.commands.load.requests import add_dataset_arguments
from jaxserve.commands.parser import UsageError, number, whole_number

PATHS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
    "repetition_penalty",
)  # fmt: skip


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, with vLLM's names."""
    _add_server(parser)
    add_dataset_arguments(parser)
    group = parser.add_argument_group("load")
    add = group.add_argument
    add("--request-rate", type=number, nargs="+", default=[math.inf], metavar="R",
        help="requests/s; inf sends all at once; several make a run each")  # fmt: skip
    add("--burstiness", type=number, default=1.0, metavar="B",
        help="shape of the gaps between requests: 1 is Poisson, less comes in bursts, more is "
        "steadier")  # fmt: skip
    add("--max-concurrency", type=whole_number, nargs="+", metavar="N",
        help="requests under way at most; several make a run each")  # fmt: skip
    add("--num-warmups", type=whole_number, default=0, metavar="N",
        help="requests before each run that are not measured")  # fmt: skip
    add("--seed", type=whole_number, default=0, metavar="N", help="of prompts and send times")
    add("--ignore-eos", action="store_true",
        help="let answers go on past their end (always with random)")  # fmt: skip
    for name in SAMPLING:
        kind = whole_number if name == "top_k" else number
        text = "in each request" + (" (default: 0)" if name == "temperature" else "")
        add(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)
    add("--extra-body", type=json_object, metavar="JSON", help="laid over each request")
    _add_figures(parser)


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--backend", "--endpoint-type", choices=list(PATHS), default="openai",
        help="completions, or chat completions")  # fmt: skip
    add("--base-url", metavar="URL", help="instead of --host and --port")
    add("--host", metavar="HOST", default="127.0.0.1", help="where the server is")
    add("--port", type=whole_number, metavar="PORT", default=8000, help="its port")
    add("--endpoint", metavar="PATH", help="path (default: by --backend)")
    add("--header", nargs="+", metavar="KEY=VALUE", default=[], help="header of each request; "
        "an API key is taken from JAXSERVE_API_KEY or OPENAI_API_KEY")  # fmt: skip
    add("--model", "-m", metavar="NAME", help="the model (default: the server's first)")
    add("--served-model-name", metavar="NAME", help="what to call it in requests")
    add("--tokenizer", metavar="MODEL", help="a model whose tokenizer counts tokens and makes "
        "random prompts (default: words; the server counts)")  # fmt: skip
    add("--ready-check-timeout-sec", type=number, default=0.0, metavar="S",
        help="seconds to wait for the server to answer")  # fmt: skip
    add("--request-id-prefix", metavar="X", default="bench-", help="of the X-Request-Id header")


def _add_figures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("figures")
    add = group.add_argument
    add("--percentile-metrics", metavar="NAMES", default="ttft,tpot,itl",
        help=f"which of {','.join(METRICS)} to show")  # fmt: skip
    add("--metric-percentiles", metavar="P", default="99", help="percentiles, such as 50,99,99.9")
    add("--goodput", nargs="+", metavar="NAME:MS", default=[],
        help="count requests within these: ttft:500 tpot:50 e2el:10000")  # fmt: skip
    add("--save-result", action="store_true", help="write the figures of each run as JSON")
    add("--save-detailed", action="store_true", help="with times, texts and errors of each request")
    add("--result-dir", metavar="FOLDER", help="where to (default: here)")
    add("--result-filename", metavar="FILE", help="name; of several runs each adds its own load")
    add("--label", metavar="X", help="first word of the name (default: the backend)")
    add("--metadata", nargs="+", metavar="KEY=VALUE", default=[], help="to stand in the JSON")
    add("--plot", metavar="FILE", help="draw the runs into a .png or .svg (needs matplotlib)")
    add("--disable-tqdm", action="store_true", help="no progress bar")


@dataclass(frozen=True, slots=True)
class Plan:
    """A command line that was understood."""

    loads: list[tuple[float, int | None]]  # request rate, concurrency
    metrics: list[str]
    percentiles: list[float]
    goodput: dict[str, float]
    headers: dict[str, str]
    metadata: dict[str, str]
    path: str

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Plan":
        """Checks everything that no server is needed for.

        Raises:
            UsageError: A value is not allowed.
        """
        if args.burstiness <= 0:
            raise UsageError(f"--burstiness {args.burstiness} is too small; use more than 0")
        for rate in args.request_rate:
            if not rate > 0:
                raise UsageError(f"--request-rate {rate} is too small; use more than 0, or inf")
        for limit in args.max_concurrency or []:
            if limit < 1:
                raise UsageError(f"--max-concurrency {limit} is too small; use 1 or more")
        if args.result_dir and Path(args.result_dir).is_file():
            raise UsageError(f"--result-dir {args.result_dir} is a file; name a folder")
        if args.plot:
            from jaxserve.commands.load.plot import check_plot

            check_plot(args.plot)
        limits: list[int | None] = args.max_concurrency or [None]
        endpoint = args.endpoint or PATHS[args.backend]
        return cls(
            loads=[(rate, limit) for rate in args.request_rate for limit in limits],
            metrics=_names(args.percentile_metrics),
            percentiles=_percentiles(args.metric_percentiles),
            goodput=_goodput(args.goodput),
            headers=_pairs("--header", args.header),
            metadata=_pairs("--metadata", args.metadata),
            path=f"/{endpoint.lstrip('/')}",
        )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise UsageError(f"--percentile-metrics {name!r} is unknown; use {', '.join(METRICS)}")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 100 for value in values):
        raise UsageError(f"--metric-percentiles {text!r}: use numbers from 0 to 100, such as 50,99")
    return values


def _goodput(pairs: list[str]) -> dict[str, float]:
    limits = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            limits[name] = float(text)
        except ValueError:
            limits[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not limits[name] >= 0:
            raise UsageError(
                f"--goodput {pair!r}: write ttft, tpot or e2el and milliseconds, such as ttft:500"
            )
    return limits


def _pairs(flag: str, items: list[str]) -> dict[str, str]:
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{flag} {item!r}: write KEY=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs

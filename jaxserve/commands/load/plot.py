"""Draws runs: one as distributions, several as latency over load."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.commands.parser import UsageError

SUFFIXES = (".png", ".svg")
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}


def check_plot(path: str) -> None:
    """Before any run.

    Raises:
        UsageError: The file has another kind or no folder, or matplotlib is not installed.
    """
    from importlib.util import find_spec

    if Path(path).suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: use a name that ends with {' or '.join(SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: its folder does not exist; make it first")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'jaxserve-llm[bench]'")


def plot(path: str, runs: Sequence[dict[str, Any]], samples: dict[str, list[float]]) -> None:
    """Writes the picture.

    Args:
        runs: Figures, with `request_rate` and `max_concurrency`.
        samples: Of a single run: milliseconds by metric.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if len(runs) == 1:
        _distributions(left, right, samples)
    else:
        _over_load(left, right, runs)
    figure.savefig(path, dpi=120)


def _distributions(left: Any, right: Any, samples: dict[str, list[float]]) -> None:
    for axes, names in ((left, ("ttft", "e2el")), (right, ("tpot", "itl"))):
        for name in names:
            if values := sorted(samples[name]):
                shares = [(i + 1) / len(values) for i in range(len(values))]
                axes.step(values, shares, where="post", label=_NAMES[name])
        axes.set_xlabel("ms")
        axes.set_ylabel("share of samples")
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        axes.legend()


def _over_load(left: Any, right: Any, runs: Sequence[dict[str, Any]]) -> None:
    by_rate = len({str(run["request_rate"]) for run in runs}) > 1
    what, unit = (
        ("request_rate", "requests/s sent") if by_rate
        else ("max_concurrency", "requests at a time")
    )  # fmt: skip
    labels = [str(run[what] if run[what] is not None else "no limit") for run in runs]
    places = range(len(runs))
    left.plot(places, [run["output_throughput"] for run in runs], marker="o")
    left.set_ylabel("output tokens/s")
    left.set_ylim(bottom=0)
    for name in ("ttft", "tpot", "itl", "e2el"):
        if f"median_{name}_ms" in runs[0]:
            values = [run[f"median_{name}_ms"] for run in runs]
            right.plot(places, values, marker="o", label=f"{_NAMES[name]}, median")
    right.set_ylabel("ms")
    right.set_yscale("log")
    right.legend()
    for axes in (left, right):
        axes.set_xticks(list(places), labels)
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)

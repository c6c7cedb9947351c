"""What the benchmarks share: the device, versions, tables, the JSON file, medians, step figures."""

import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from jaxserve.step import StepStats

if TYPE_CHECKING:
    from jaxserve.llm import LLM

PACKAGES = ("jaxserve-llm", "jax", "jaxlib", "flax", "numpy", "transformers", "torch")


def device() -> dict[str, Any]:
    """The machine, without its name. Starts no JAX backend."""
    model = None
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model or platform.machine(), "cpus": cpus, "system": platform.system()}


def versions() -> dict[str, str]:
    """Versions of the packages that matter, as far as they are installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def median(values: Iterable[float | None]) -> float | None:
    """The median of those that are there; None if none is."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


class StepLog:
    """The figures of an engine's steps, one measurement at a time."""

    def __init__(self, llm: "LLM") -> None:
        self._llm = llm
        self._last: StepStats | None = None

    def take(self) -> list[StepStats]:
        """The steps since the last call, as far as the engine still keeps them."""
        steps = self._llm.engine_stats()
        new = list(itertools.takewhile(lambda s: s is not self._last, reversed(steps)))[::-1]
        self._last = steps[-1] if steps else None
        return new


def step_figures(steps: Sequence[StepStats]) -> dict[str, float | int | None]:
    """What the steps of one measurement say together.

    `kv_waste` is the share of the KV places held by running sequences that hold no token, over
    all steps. Host and device times are means per step.
    """
    if not steps:
        return {"num_steps": 0}
    allocated = sum(s.num_allocated_slots for s in steps)
    written = sum(s.num_written_slots for s in steps)
    return {
        "num_steps": len(steps),
        "host_ms_per_step": 1e3 * statistics.fmean(s.host_s for s in steps),
        "device_ms_per_step": 1e3 * statistics.fmean(s.device_s for s in steps),
        "kv_waste": 1 - written / allocated if allocated else None,
    }


def number(value: object, digits: int = 1) -> str:
    """A figure for a table cell; what is not known is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        table.add_row(*[number(cell) for cell in row])
    # On a terminal its width; in a file or a pipe wide enough for every column.
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def write_json(path: Path, **record: Any) -> None:
    """Writes a result with the device, the versions and the date."""
    about = {"date": time.strftime("%Y-%m-%d"), "device": device(), "versions": versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **record}, indent=1) + "\n")

"""The table that a command shows when its engine is ready."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_startup_table(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Shows model, device, attention backend, KV cache and compile time.

    Args:
        summary: What `Engine.summary()` returns.
        console: Where to; None: stdout, or the output of a notebook's cell.
    """
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in startup_rows(summary):
        table.add_row(name, value)
    (console or Console()).print(table, highlight=False, markup=False)


def startup_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of a name and a text; what a summary lacks is left out."""
    s = summary
    rows = [
        ("model", "{model}, {parameters:,} parameters, {weights}, loaded in {weight load s:.1f} s"),
        ("dtype", "{dtype}"),
        ("device", "{device}"),
        ("attention", "{attention backend}{why}"),
        (
            "KV cache",
            "{KV pages:,} pages of {page size} tokens = {KV tokens:,} tokens{windows}, {kv}",
        ),
        (
            "concurrency",
            "{max concurrency:.1f} requests of {max_model_len:,} tokens fit; at most "
            "{max_num_seqs} rows and {max_num_batched_tokens:,} tokens a step",
        ),
        ("compile", "{compile s:.1f} s"),
    ]
    values = {
        **s,
        "weights": size(s.get("weight bytes", 0)),
        "kv": size(s.get("KV bytes", 0)),
        "windows": f" ({s['KV windows']})" if s.get("KV windows") else "",
        "why": f" (passed over {s['other backends']})" if s.get("other backends") else "",
    }
    found = []
    for name, form in rows:
        try:
            found.append((name, form.format_map(values)))
        except (KeyError, TypeError, ValueError):
            continue
    return found


def size(num_bytes: float) -> str:
    """`1.5 GiB`, `270 MiB`."""
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.0f} MiB"

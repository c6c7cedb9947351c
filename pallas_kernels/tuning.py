"""Tile sizes as data: what was found best for an operation, a device and a shape, else a heuristic.

A kernel has a frozen dataclass of tile sizes and a function that guesses them. It asks here which
to use:

    tiles = tuning.tiles("tpu_decode", backend.chip, attention_key(spec), default_tiles(spec))

and gets the guess with the fields that `tiles.json` has for that operation, device and shape put in
their place. `python -m benchmarks.tune` searches and writes that file: by the TPU compiler's static
cycles with no device, by time where there is one. An entry says which, and with what versions.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chips import Chip
from pallas_kernels.types import AttentionSpec

TABLE = Path(__file__).with_name("tiles.json")  # op -> device kind -> key -> entry

_tried: ContextVar[Mapping[str, Mapping[str, int]] | None] = ContextVar("tried", default=None)
_used: ContextVar[dict[str, dict[str, int]] | None] = ContextVar("used", default=None)


def tiles[Tiles](op: str, chip: Chip, key: str, guess: Tiles) -> Tiles:
    """The tile sizes of `op` for a shape on a chip: `guess`, a dataclass, where nothing was tuned.

    Raises ValueError for an entry of the table that `guess` has no such fields for.
    """
    found = (_tried.get() or {}).get(op)
    if found is None:
        found = _table().get(op, {}).get(chip.kind, {}).get(key, {}).get("tiles", {})
    fields = {field.name for field in dataclasses.fields(guess)}  # pyright: ignore[reportArgumentType]
    unknown = set(found) - fields
    if unknown:
        raise ValueError(f"tiles of {op} for {key} on {chip}: no field {sorted(unknown)}")
    chosen: Tiles = dataclasses.replace(guess, **found)  # pyright: ignore[reportArgumentType, reportCallIssue]
    used = _used.get()
    if used is not None:
        used[op] = dataclasses.asdict(chosen)  # pyright: ignore[reportArgumentType]
    return chosen


def attention_key(spec: AttentionSpec) -> str:
    """What of a layer of attention its tile sizes depend on: "32x8 heads of 128, page 16, ..."."""
    kv = spec.kv
    parts = [f"{spec.num_heads}x{kv.num_kv_heads} heads of {kv.head_dim}", f"page {kv.page_size}"]
    parts.append(jnp.dtype(kv.dtype).name)
    if kv.kind != "heads":
        parts.append(f"{kv.kind} {kv.out_dim}")
    if spec.window is not None:
        parts.append(f"window {spec.window}")
    return ", ".join(parts)


def matmul_key(in_dim: int, out_dim: int, *details: object) -> str:
    """What of a product its tile sizes depend on; `details` are the formats, experts and so on."""
    return ", ".join([f"{in_dim} -> {out_dim}", *map(str, details)])


@contextlib.contextmanager
def trying(tried: Mapping[str, Mapping[str, int]]) -> Iterator[dict[str, dict[str, int]]]:
    """While this is entered, kernels that are traced use these fields by operation, not the table.

    Yields a dict that fills with the tile sizes that kernels are given, by operation. What was
    traced before and is still cached is not traced again.
    """
    used: dict[str, dict[str, int]] = {}
    tokens = _tried.set(tried), _used.set(used)
    try:
        yield used
    finally:
        _tried.reset(tokens[0])
        _used.reset(tokens[1])


def record(
    op: str, chip_kind: str, key: str, tiles: Mapping[str, int], *, path: Path = TABLE, **about: Any
) -> None:
    """Writes an entry of the table; `about` says how it was found."""
    table = json.loads(path.read_text()) if path.exists() else {}
    entry = {"tiles": dict(tiles), **about}
    table.setdefault(op, {}).setdefault(chip_kind, {})[key] = entry
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}

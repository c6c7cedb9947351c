"""Sharing out decode attention's KV among a GPU's thread blocks, from lengths on the device.

The KV blocks of all rows and heads are one list, in order; worker w of W takes an equal, contiguous
share of it (Stream-K, arXiv 2301.03598), whatever the rows' lengths. An *item* is one row and kv
head, `row * K + head`. What one worker computes of one item is a *piece*. Walking along the list,
a new piece starts where the worker or the item changes, so `item + worker` numbers pieces without
gaps in an item: piece ids of an item are consecutive, and R * K + W of them are enough.

The plan depends on the step's lengths only: XLA computes it once, outside of a loop over layers.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chips import Chip
from pallas_kernels.types import PageMetadata

# Multiprocessors by what jax calls the chip, longest name first; they only size the grid.
_NUM_MULTIPROCESSORS = {
    "NVIDIA H100 PCIe": 114,
    "NVIDIA H100": 132,
    "NVIDIA H200": 132,
    "NVIDIA H800": 132,
    "NVIDIA H20": 78,
    "NVIDIA GH200": 132,
    "NVIDIA A100": 108,
    "NVIDIA A800": 108,
    "NVIDIA A30": 56,
    "NVIDIA A10G": 80,
    "NVIDIA A10": 72,
    "NVIDIA A40": 84,
    "NVIDIA RTX A6000": 84,
    "NVIDIA GeForce RTX 3090": 82,
    "NVIDIA L40S": 142,
    "NVIDIA L40": 142,
    "NVIDIA L4": 58,
    "NVIDIA GeForce RTX 4090": 128,
    "NVIDIA B200": 148,
    "NVIDIA GB200": 148,
    "NVIDIA GeForce RTX 5090": 170,
}
_FALLBACK = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170}


def num_multiprocessors(chip: Chip) -> int:
    """Multiprocessors of an NVIDIA chip, by its name; of its generation's usual one if unknown."""
    for name in sorted(_NUM_MULTIPROCESSORS, key=len, reverse=True):
        if chip.kind == name or chip.kind.startswith((f"{name} ", f"{name}-")):
            return _NUM_MULTIPROCESSORS[name]
    return _FALLBACK.get(chip.sm or 0, 108)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["work", "pieces"], meta_fields=["num_pieces"]
)
@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """Who computes what. All counts are in KV blocks; unused rows and workers have none."""

    work: Array  # [W, 4] int32: first item, block of it to start at, blocks, items touched
    pieces: Array  # [R * K, 2] int32: an item's first piece and how many it has
    num_pieces: int  # rows of a buffer for all pieces


def first_block(kv_len: Array, *, block_kv: int, window: int | None) -> Array:
    """The first KV block that a row's newest token sees any of."""
    if window is None:
        return jnp.zeros_like(kv_len)
    return jax.lax.div(jnp.maximum(kv_len - window, 0), jnp.int32(block_kv))


def num_blocks(kv_len: Array, *, block_kv: int, window: int | None) -> Array:
    """KV blocks from the first to the last that a row's newest token sees."""
    end = jax.lax.div(kv_len + (block_kv - 1), jnp.int32(block_kv))
    return end - first_block(kv_len, block_kv=block_kv, window=window)


def plan_split(
    pages: PageMetadata,
    *,
    num_rows: int,  # R: the decode rows are among the first R
    num_heads: int,  # K: kv heads, or as many tiles of query heads as read KV of their own
    block_kv: int,
    window: int | None,
    num_workers: int,  # W
    min_blocks: int = 2,  # a share below this costs more to merge than it saves
) -> SplitPlan:
    """The plan of a step. Its decode rows and their lengths are traced."""
    is_decode = jnp.arange(num_rows, dtype=jnp.int32) < pages.num_decode_rows
    counts = num_blocks(pages.kv_lens[:num_rows], block_kv=block_kv, window=window)
    counts = jnp.where(is_decode, counts, 0)  # [R]
    items = jnp.repeat(counts, num_heads)  # [R * K]
    ends = jnp.cumsum(items, dtype=jnp.int32)
    starts = ends - items
    total = ends[-1]

    # The first `more` workers take share + 1 blocks: W * share stays within int32.
    active = jnp.clip(total // min_blocks, 1, num_workers)
    share, more = total // active, total % active

    def worker_of(block: Array) -> Array:
        in_longer = block // (share + 1)
        in_shorter = more + (block - more * (share + 1)) // jnp.maximum(share, 1)
        return jnp.where(block < more * (share + 1), in_longer, in_shorter)

    worker = jnp.arange(num_workers, dtype=jnp.int32)
    begin = worker * share + jnp.minimum(worker, more)
    size = jnp.where(worker < active, share + (worker < more), 0)
    # The item that holds a block is the first one that ends after it.
    first = jnp.searchsorted(ends, begin, side="right", method="compare_all")
    last = jnp.searchsorted(ends, begin + size - 1, side="right", method="compare_all")
    first, last = first.astype(jnp.int32), last.astype(jnp.int32)
    within = begin - starts[jnp.minimum(first, starts.shape[0] - 1)]
    touched = jnp.where(size > 0, last - first + 1, 0)
    work = jnp.stack([first, within, size, touched], axis=1)

    item = jnp.arange(items.shape[0], dtype=jnp.int32)
    first_worker, last_worker = worker_of(starts), worker_of(ends - 1)
    num = jnp.where(items > 0, last_worker - first_worker + 1, 0)
    pieces = jnp.stack([item + first_worker, num], axis=1)
    return SplitPlan(work=work, pieces=pieces, num_pieces=items.shape[0] + num_workers)

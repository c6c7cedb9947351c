"""Cutting a step's queries into tiles for Hopper's prefill kernel, from lengths on the device.

Tokens and query heads of one kv head fill a tile's rows. Tiles start at multiples of 8 tokens of
the batch, because TMA and the swizzle of shared memory want it so: a row's first tile may begin
with up to 7 tokens of the row before, and its last may end with some of the row after.

The plan depends on the step's lengths only: XLA computes it once, outside of a loop over layers.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.types import AttentionSpec, PageMetadata

TILE_ROWS = 128  # of queries: 64 for each of two warpgroups
ALIGN = 8  # tokens: rows of a swizzle pattern in shared memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTiles:
    """How the kernel is cut. Static."""

    block_kv: int  # tokens of KV a step: a multiple of 64
    num_stages: int  # blocks of keys, and of values, in shared memory at a time
    num_slots: int  # items whose queries are in shared memory at a time
    num_workers: int  # thread blocks, one a multiprocessor


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How tokens and query heads fill the rows of a tile: row = head * tokens + token. Static."""

    heads: int  # query heads of one kv head
    tokens: int  # a multiple of 8

    @property
    def groups(self) -> int:
        """Groups of 8 tokens of one head: the unit of copies."""
        return self.heads * self.tokens // ALIGN


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tiles", "num_tiles"], meta_fields=[]
)
@dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """The tiles of a step, longest context first.

    Columns: the row of the page table; the tile's first token, its first token that is the row's
    own, and the one after the last; the position of the tile's first token in the row's context;
    the position where its blocks of KV start; the context's length; how many blocks.
    """

    tiles: Array  # [W, 8] int32
    num_tiles: Array  # [1] int32


def plan_prefill(
    pages: PageMetadata, *, spec: AttentionSpec, tiles: PrefillTiles, num_tokens: int
) -> PrefillPlan:
    """The tiles of a step, padding tokens among them; rows and their lengths are traced."""
    size = packing_of(spec.group).tokens
    max_rows = pages.kv_lens.shape[0]
    box = box_of(spec, tiles)
    row_ids = jnp.arange(max_rows + 1, dtype=jnp.int32)  # the last one stands for the padding
    end_of_rows = pages.query_starts[pages.num_rows]
    begins = jnp.append(pages.query_starts[:-1], end_of_rows)
    ends = jnp.append(pages.query_starts[1:], jnp.int32(num_tokens))
    is_ours = (row_ids >= pages.num_decode_rows) & (row_ids < pages.num_rows)
    is_ours = (is_ours | (row_ids == max_rows)) & (ends > begins)
    bases = begins // ALIGN * ALIGN
    counts = jnp.where(is_ours, (ends - bases + size - 1) // size, 0)
    last_tile = jnp.cumsum(counts, dtype=jnp.int32)  # of each row, exclusive

    # A row has a tile for each `size` tokens, and one for what is left and the 7 before.
    num_rows = min(max_rows + 1, num_tokens)
    most = num_rows + (num_tokens + num_rows * (ALIGN - 1)) // size
    tile = jnp.arange(most, dtype=jnp.int32)
    row = jnp.searchsorted(last_tile, tile, side="right", method="compare_all").astype(jnp.int32)
    in_use = row <= max_rows
    row = jnp.minimum(row, max_rows)
    base = bases[row] + (tile - (last_tile - counts)[row]) * size
    first = jnp.maximum(base, begins[row])
    last = jnp.where(in_use, jnp.minimum(base + size, ends[row]), first)
    is_padding = row == max_rows
    kv_len = jnp.append(pages.kv_lens, 0)[row]
    position = kv_len - ends[row]  # of token 0, were it this row's
    start = jnp.zeros_like(base)
    if spec.window is not None:
        start = jnp.maximum(position + first - (spec.window - 1), 0) // box * box
    blocks = (position + last - start + tiles.block_kv - 1) // tiles.block_kv
    blocks = jnp.where(is_padding | ~in_use, 0, blocks)
    row = jnp.minimum(row, max_rows - 1)
    table = jnp.stack([row, base, first, last, position + base, start, kv_len, blocks], axis=1)
    order = jnp.argsort(-blocks, stable=True)  # padding has none, and comes before unused tiles
    return PrefillPlan(tiles=table[order], num_tiles=last_tile[-1:])


def packing_of(group: int) -> Packing:
    """The most heads of a group whose tiles leave at most a fifth of their rows unused."""
    options = []
    for heads in range(1, min(group, TILE_ROWS // ALIGN) + 1):
        if group % heads == 0:
            tokens = TILE_ROWS // heads // ALIGN * ALIGN
            options.append((min(heads * tokens / TILE_ROWS, 0.8), heads, tokens))
    _, heads, tokens = max(options)
    return Packing(heads=heads, tokens=tokens)


def box_of(spec: AttentionSpec, tiles: PrefillTiles) -> int:
    """Tokens that one TMA copy brings: of one page, and a whole number of them a block."""
    return math.gcd(spec.kv.page_size, tiles.block_kv)

"""Multi-head latent attention over a paged latent cache, for TPUs: decode and prefill alike.

The absorbed form of DeepSeek-V2 (arXiv 2405.04434): every query head of a token attends to the same
latent rows, whose first `value_dim` columns are the value. So all the heads of a token, or of a few
tokens where heads are few, are one matrix of queries, and its products with a block of keys and
values are large enough for the matrix units; a page needs no taking apart, as it is a matrix of
whole registers, [page_size, W].

A row's query tokens are worked on in *tiles*, a tile's in *groups* of about 128 query rows, which
meet a block of KV one after the other. The blocks of all tiles of all rows are one sequence. What
fetches them, `_Fetcher`, runs some blocks ahead of the work, so that HBM's latency is hidden at the
ends of rows as well.

The softmax is the online one of FlashAttention (arXiv 2205.14135), in base 2.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.backend import Backend
from pallas_kernels.chips import Chip
from pallas_kernels.kv_write import LANES, page_layout
from pallas_kernels.tpu_pages import PageLists, divide, interpreter
from pallas_kernels.types import AttentionSpec, PageMetadata

NEVER = -1e30  # the logit of what is not seen: finite, as inf - inf is NaN
LOG2E = math.log2(math.e)
_HEADS = 16  # query heads are padded to a multiple: rows of a bfloat16 register
_GROUP_ROWS = 128  # query rows that a matrix unit of the smallest kind wants
_COPIES_UNROLLED = 16
_VMEM_BYTES = 48 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentTiles:
    """Sizes that do not change the result. Static."""

    block: int  # tokens of KV fetched at once, a multiple of the page size
    span: int  # tokens of KV worked on in one go if all are seen; `block` is a multiple of it
    unit: int  # tokens of KV an update of the softmax, a multiple of 128; `span` is one of it
    groups: int  # of query rows, that a tile has
    depth: int  # blocks of KV in VMEM, at least 2


def default_tiles(spec: AttentionSpec, backend: Backend) -> LatentTiles:
    """What to use where nothing was tuned."""
    size = spec.kv.page_size
    unit, span = 512, 1024
    block = math.lcm(size, span)
    depth = 3 if backend.chip.tpu_generation == "v5e" else 5
    return LatentTiles(block=block, span=span, unit=unit, groups=4, depth=depth)


def why_not_latent(spec: AttentionSpec, chip: Chip) -> str | None:
    """Why this kernel cannot run such a layer on the chip, or None if it can."""
    kv = spec.kv
    if kv.kind != "latent":
        return "it attends to a latent cache only"
    if chip.tpu_generation is None:
        return f"it does not know {chip}"
    if kv.out_dim % LANES:
        return f"value_dim={kv.out_dim} is not a multiple of {LANES}"
    dtype = jnp.dtype(kv.dtype)
    is_known = dtype.itemsize == 1 or dtype in (jnp.dtype("bfloat16"), jnp.dtype("float32"))
    if not is_known:
        return f"no {dtype.name} cache: choose bfloat16, float32 or an 8-bit type"
    rows = 32 // dtype.itemsize
    if kv.page_size % rows:
        return f"page_size={kv.page_size} is not a multiple of {rows}, a tile of {dtype.name}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Sizes inside the kernel. Static."""

    num_heads: int  # padded
    head_dim: int
    width: int  # of a latent row in its page
    out_dim: int
    page_size: int
    num_tokens: int
    group: int  # tokens of a group
    tiles: LatentTiles

    @property
    def rows(self) -> int:
        """Query rows of a group: token by token, its heads one after the other."""
        return self.group * self.num_heads

    @property
    def tile(self) -> int:
        """Query tokens of a tile."""
        return self.group * self.tiles.groups

    @property
    def num_pages(self) -> int:
        """Pages of a block."""
        return self.tiles.block // self.page_size


def attend_latent(
    q: Array,  # [T, N, H]
    kv_pages: Array,  # [L * num_pages, 1, page_size, W]
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N] float32, if spec.sinks
    tiles: LatentTiles | None = None,
) -> Array:
    """Attention of every token to its row's tokens up to itself: [T, N, value_dim] in q's dtype.

    Decode rows, chunks and whole prompts are all the same to it; padding tokens get zeros.
    """
    kv = spec.kv
    if tiles is None:
        key = tuning.attention_key(spec)
        tiles = tuning.tiles("tpu_latent", backend.chip, key, default_tiles(spec, backend))
    num_tokens, num_heads, head_dim = q.shape
    padding = -num_heads % _HEADS
    shape = _Shape(
        num_heads=num_heads + padding,
        head_dim=head_dim,
        width=page_layout(kv, backend).page[2],
        out_dim=kv.out_dim,
        page_size=kv.page_size,
        num_tokens=num_tokens,
        group=max(1, _GROUP_ROWS // (num_heads + padding)),
        tiles=tiles,
    )
    sizes = (tiles.block, kv.page_size), (tiles.block, tiles.span), (tiles.span, tiles.unit)
    if any(size % part for size, part in (*sizes, (tiles.unit, LANES))):
        raise ValueError(f"{tiles} do not fit each other and pages of {kv.page_size} tokens")
    if tiles.depth < 2:
        raise ValueError(f"{tiles}: at least two blocks, one to fetch and one to work on")
    if padding:
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0)))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    table = PageLists.padded(pages.page_table)
    inputs = [table, q, kv_pages.reshape(-1, kv.page_size, shape.width)]
    in_specs = [anywhere] * len(inputs)
    if sinks is not None:
        logits = jnp.pad(sinks.astype(jnp.float32) * LOG2E, (0, padding))
        logits = jnp.tile(logits, shape.group)[:, None]
        inputs.append(jnp.broadcast_to(logits, (shape.rows, LANES)))
        in_specs.append(pl.BlockSpec(memory_space=pltpu.VMEM))
    of_groups = (tiles.groups, shape.rows)
    out = pl.pallas_call(
        functools.partial(_kernel, spec=spec, shape=shape, interpret=backend.interpret),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=in_specs,
            out_specs=anywhere,
            scratch_shapes=[
                *PageLists.scratch(table),
                pltpu.VMEM((tiles.depth, tiles.block, shape.width), kv_pages.dtype),
                pltpu.VMEM((tiles.depth, shape.tile, shape.num_heads, head_dim), q.dtype),
                pltpu.VMEM((2, shape.tile, shape.num_heads, kv.out_dim), q.dtype),
                pltpu.VMEM((*of_groups, shape.width), q.dtype),
                pltpu.VMEM((*of_groups, LANES), jnp.float32),
                pltpu.VMEM((*of_groups, LANES), jnp.float32),
                pltpu.VMEM((*of_groups, kv.out_dim), jnp.float32),
                pltpu.SMEM((_Fetcher.NUM_STATES,), jnp.int32),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((tiles.depth,)),
                pltpu.SemaphoreType.DMA((tiles.depth,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((num_tokens, shape.num_heads, kv.out_dim), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        interpret=interpreter(backend),
        name="paged_latent",
    )(
        pages.kv_lens,
        pages.query_starts,
        jnp.stack([pages.num_rows, jnp.asarray(layer, jnp.int32) * pages.num_pages]),
        *inputs,
    )
    return out[:, :num_heads]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some query tokens of a row of the batch, and what they see."""

    row: Any
    token: Any  # its first one
    count: Any  # of its tokens
    position: Any  # of the first one within the row's tokens
    start: Any  # position of the first token that is seen by any of them
    stop: Any  # and after the last one
    first_page: Any
    num_pages: Any
    num_blocks: Any


class _Batch:
    """The ragged batch as scalars in SMEM, cut into tiles."""

    def __init__(
        self, lens: Any, starts: Any, num_rows: Any, spec: AttentionSpec, shape: _Shape
    ) -> None:
        self._lens, self._starts = lens, starts
        self._spec, self._shape = spec, shape
        self.num_rows = num_rows

    def first_token(self, row: Any) -> Any:
        """The first token of a row; of row num_rows, the number of tokens."""
        return self._starts[row]

    def tile(self, row: Any, token: Any) -> _Tile:
        """The tile of a row that begins at a token."""
        size, window = self._shape.page_size, self._spec.window
        left = self._starts[row + 1] - token
        count = jnp.minimum(left, self._shape.tile)
        position = self._lens[row] - left
        stop = position + count
        start = 0 if window is None else jnp.maximum(position - (window - 1), 0)
        first_page = 0 if window is None else divide(start, size)
        num_pages = divide(stop + (size - 1), size) - first_page
        num_blocks = divide(num_pages + (self._shape.num_pages - 1), self._shape.num_pages)
        return _Tile(row, token, count, position, start, stop, first_page, num_pages, num_blocks)

    def row_from(self, row: Any) -> Any:
        """The first row from `row` on that has query tokens, or num_rows."""

        def is_empty(row: Any) -> Any:
            end = self._starts[jnp.minimum(row + 1, self.num_rows)]
            return (row < self.num_rows) & (self._starts[row] == end)

        return lax.while_loop(is_empty, lambda row: row + 1, row)


class _Fetcher:
    """Fetches the queries of tiles and their blocks of KV, in the order of the work on them.

    A block's pages land in buffer number (blocks before it) % depth, a tile's queries in buffer
    number (tiles before it) % depth. What lies in a buffer behind the last page of a block, or the
    last query of a tile, is what was there before.
    """

    NUM_STATES = 5
    _ROW, _TOKEN, _BLOCK, _BLOCKS, _TILES = range(NUM_STATES)  # where the next block is

    def __init__(
        self,
        batch: _Batch,
        shape: _Shape,
        state: Any,  # SMEM [NUM_STATES]
        lists: PageLists,
        first_page: Any,  # of the layer
        q: tuple[Any, Any, Any],  # references to queries in HBM, their buffers, semaphores
        kv: tuple[Any, Any, Any],  # and to latents
    ) -> None:
        self._batch, self._shape, self._state = batch, shape, state
        self._lists, self._first_page = lists, first_page
        self._q_hbm, self._q, self._q_semaphores = q
        self._kv_hbm, self._kv, self._kv_semaphores = kv

    def begin(self) -> None:
        """Fetch all the blocks there is room for but one."""
        for counter in (self._BLOCK, self._BLOCKS, self._TILES):
            self._state[counter] = 0
        self._go_to_row(self._batch.row_from(jnp.int32(0)), jnp.int32(0))
        for _ in range(self._shape.tiles.depth - 1):
            self.fetch()

    def _go_to_row(self, row: Any, expected: Any) -> None:
        """Go to the first tile of a row, have its list of pages, and start to copy the next row's.

        `expected` is the row that could have been the next; its list is on its way if it is not the
        very first.
        """
        num_rows = self._batch.num_rows
        self._state[self._ROW] = row
        self._state[self._TOKEN] = self._batch.first_token(row)

        @pl.when((expected > 0) & (expected < num_rows))
        def _() -> None:
            self._lists.wait(expected)

        @pl.when((row < num_rows) & ((row > expected) | (expected == 0)))
        def _() -> None:
            self._lists.start(row, row)
            self._lists.wait(row)

        @pl.when(row + 1 < num_rows)
        def _() -> None:
            self._lists.start(row + 1, row + 1)

    def fetch(self) -> None:
        """Start to fetch the next block, and with a tile's first one its queries; if there is one.

        The buffer it goes to is the one before the buffer that is being worked on.
        """

        @pl.when(self._state[self._ROW] < self._batch.num_rows)
        def _() -> None:
            tile = self._batch.tile(self._state[self._ROW], self._state[self._TOKEN])
            block = self._state[self._BLOCK]

            @pl.when(block == 0)
            def _() -> None:
                slot = lax.rem(self._state[self._TILES], self._shape.tiles.depth)
                self._state[self._TILES] = self._state[self._TILES] + 1

                @pl.loop(0, tile.count)
                def _(index: Array) -> None:
                    self._query(tile.token + index, slot, index).start()

            slot = lax.rem(self._state[self._BLOCKS], self._shape.tiles.depth)
            self._state[self._BLOCKS] = self._state[self._BLOCKS] + 1
            before = block * self._shape.num_pages
            first = tile.first_page + before
            count = jnp.minimum(tile.num_pages - before, self._shape.num_pages)

            def start(index: Any) -> None:
                page = self._first_page + self._lists.page(tile.row, first + index)
                self._page(page, slot, index).start()

            step = math.gcd(self._shape.num_pages, _COPIES_UNROLLED)
            num_steps = divide(count, step)

            @pl.loop(0, num_steps)
            def _(number: Array) -> None:
                for index in range(step):
                    start(number * step + index)

            @pl.loop(num_steps * step, count)
            def _(index: Array) -> None:
                start(index)

            self._advance(tile, block)

    def _advance(self, tile: _Tile, block: Any) -> None:
        is_last = block + 1 == tile.num_blocks
        self._state[self._BLOCK] = jnp.where(is_last, 0, block + 1)
        token = tile.token + self._shape.tile
        is_row_done = token >= self._batch.first_token(tile.row + 1)

        @pl.when(is_last & jnp.logical_not(is_row_done))
        def _() -> None:
            self._state[self._TOKEN] = token

        @pl.when(is_last & is_row_done)
        def _() -> None:
            self._go_to_row(self._batch.row_from(tile.row + 1), tile.row + 1)

    def wait_for_queries(self, slot: Any, count: Any) -> None:
        @pl.loop(0, count)
        def _(index: Array) -> None:
            self._query(0, slot, index).wait()

    def wait_for_block(self, slot: Any, count: Any) -> None:
        """`count` is of its pages."""

        @pl.when(count == self._shape.num_pages)
        def _() -> None:  # a semaphore counts bytes: one wait for all the pages
            block = self._kv.at[slot]
            pltpu.make_async_copy(block, block, self._kv_semaphores.at[slot]).wait()

        @pl.when(count < self._shape.num_pages)
        def _() -> None:
            @pl.loop(0, count)
            def _(index: Array) -> None:
                self._page(0, slot, index).wait()

    def _query(self, token: Any, slot: Any, index: Any) -> Any:
        to = self._q.at[slot, index]
        return pltpu.make_async_copy(self._q_hbm.at[token], to, self._q_semaphores.at[slot])

    def _page(self, page: Any, slot: Any, index: Any) -> Any:
        size = self._shape.page_size
        to = self._kv.at[slot, pl.ds(pl.multiple_of(index * size, size), size)]
        return pltpu.make_async_copy(self._kv_hbm.at[page], to, self._kv_semaphores.at[slot])


def _kernel(
    lens_ref: Any,  # SMEM [B]
    starts_ref: Any,  # SMEM [B + 1]
    limits_ref: Any,  # SMEM: number of rows, first page of the layer
    table_hbm: Any,  # [B, P up to 128]
    q_hbm: Any,  # [T, N, H]
    kv_hbm: Any,  # [L * num_pages, page_size, W]
    *refs: Any,
    spec: AttentionSpec,
    shape: _Shape,
    interpret: bool,
) -> None:
    sinks_ref, refs = (refs[0], refs[1:]) if spec.sinks else (None, refs)
    out_hbm, lists, list_semaphores, kv_buffers, q_buffers, out_buffers, queries, *rest = refs
    top, total, acc, state, out_counts, *semaphores = rest
    kv_semaphores, q_semaphores, out_semaphores = semaphores
    tiles = shape.tiles
    batch = _Batch(lens_ref, starts_ref, limits_ref[0], spec, shape)
    fetcher = _Fetcher(
        batch,
        shape,
        state,
        PageLists(table_hbm, lists, list_semaphores),
        limits_ref[1],
        (q_hbm, q_buffers, q_semaphores),
        (kv_hbm, kv_buffers, kv_semaphores),
    )
    softmax = _Softmax(spec, shape, interpret, queries, top, total, acc, sinks_ref)

    def copy_out(token: Any, slot: Any, index: Any) -> Any:
        rows = out_buffers.at[slot, index]
        return pltpu.make_async_copy(rows, out_hbm.at[token], out_semaphores.at[slot])

    def wait_for_outputs(slot: Any) -> None:
        @pl.loop(0, out_counts[slot])
        def _(index: Array) -> None:
            copy_out(0, slot, index).wait()

    def do_block(index: Any, blocks: Any, tile: _Tile) -> Any:
        """Attend to a block; `blocks` are those before it."""
        slot = lax.rem(blocks, tiles.depth)
        before = index * shape.num_pages
        fetcher.wait_for_block(slot, jnp.minimum(tile.num_pages - before, shape.num_pages))
        fetcher.fetch()
        first = (tile.first_page + before) * shape.page_size  # position of the block's first token
        low = jnp.maximum(tile.start - first, 0)
        high = jnp.minimum(tile.stop - first, tiles.block)
        latents = kv_buffers.at[slot]

        @pl.when((low > 0) | (high < tiles.block))
        def _() -> None:
            _clear_unseen(kv_buffers, slot, low, high, shape, interpret=interpret)

        def do_group(group: Any, rows: int) -> None:
            position = tile.position + group * shape.group - first  # of its first query, in here
            last = jnp.minimum(position + shape.group, tile.stop - first) - 1

            def units(tokens: Any) -> Any:  # that it takes to hold the block's first `tokens`
                tokens = jnp.clip(tokens, 0, tiles.block)
                return divide(tokens + (tiles.unit - 1), tiles.unit)

            end = units(last + 1)
            skipped = whole = 0  # units that no query sees, and before those that all see whole
            if spec.window is not None:
                skipped = units(position - spec.window + 2 - tiles.unit)
                whole = jnp.minimum(units(last - spec.window + 1), end)
            seen_by_all = jnp.clip(position + 1, 0, tiles.block) - whole * tiles.unit
            num_spans = divide(jnp.maximum(seen_by_all, 0), tiles.span)
            span = tiles.span // tiles.unit

            @pl.loop(0, num_spans)
            def _(number: Array) -> None:
                at = (whole + number * span) * tiles.unit
                softmax.attend(group, rows, latents, at, span, None)

            @pl.loop(skipped, end - num_spans * span)
            def _(number: Array) -> None:
                at = jnp.where(number < whole, number, number + num_spans * span) * tiles.unit
                softmax.attend(group, rows, latents, at, 1, position)

        _for_each_group(tile.count, shape, do_group)
        return blocks + 1

    def do_tile(row: Any, token: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        blocks, tiles_before = carry
        tile = batch.tile(row, token)
        slot, out_slot = lax.rem(tiles_before, tiles.depth), tiles_before & 1
        fetcher.wait_for_queries(slot, tile.count)
        softmax.begin(q_buffers.at[slot], tile.count)
        step = functools.partial(do_block, tile=tile)
        blocks = lax.fori_loop(0, tile.num_blocks, step, blocks)
        wait_for_outputs(out_slot)  # of the tile before the one before
        softmax.end(out_buffers.at[out_slot], tile.count)
        out_counts[out_slot] = tile.count

        @pl.loop(0, tile.count)
        def _(index: Array) -> None:
            copy_out(token + index, out_slot, index).start()

        return blocks, tiles_before + 1

    def do_row(row: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        begin = batch.first_token(row)
        num_tiles = divide(batch.first_token(row + 1) - begin + (shape.tile - 1), shape.tile)

        def step(index: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            return do_tile(row, begin + index * shape.tile, carry)

        return lax.fori_loop(0, num_tiles, step, carry)

    queries[...] = jnp.zeros_like(queries)  # the columns behind head_dim stay so
    out_counts[0] = out_counts[1] = 0
    fetcher.begin()
    lax.fori_loop(0, batch.num_rows, do_row, (jnp.int32(0), jnp.int32(0)))
    for slot in range(2):
        wait_for_outputs(slot)

    end = batch.first_token(batch.num_rows)
    out_buffers[0, 0] = jnp.zeros_like(out_buffers[0, 0])

    def clear(token: Array) -> Any:
        return pltpu.make_async_copy(out_buffers.at[0, 0], out_hbm.at[token], out_semaphores.at[0])

    @pl.loop(end, shape.num_tokens)
    def _(token: Array) -> None:
        clear(token).start()

    @pl.loop(end, shape.num_tokens)
    def _(token: Array) -> None:
        clear(token).wait()


def _for_each_group(count: Any, shape: _Shape, do: Callable[[Any, int], None]) -> None:
    """Calls do(group, number of its rows) for the groups of a tile of `count` tokens.

    A tile of one token has the rows of that one only; other groups have all their rows, of which
    those behind the last token hold what was there before.
    """

    def all_rows() -> None:
        @pl.loop(0, divide(count + (shape.group - 1), shape.group))
        def _(group: Array) -> None:
            do(group, shape.rows)

    if shape.group == 1:
        all_rows()
    else:
        pl.when(count == 1)(lambda: do(0, shape.num_heads))
        pl.when(count > 1)(all_rows)


class _Softmax:
    """The online softmax of the groups of a tile, its state in VMEM.

    A query row's largest logit `top` and the sum of its weights take a register's 128 lanes: the
    largest in all of them, the sum spread over them.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        shape: _Shape,
        interpret: bool,
        queries: Any,  # [groups, rows, W]
        top: Any,  # [groups, rows, 128]
        total: Any,  # [groups, rows, 128]
        acc: Any,  # [groups, rows, out_dim]
        sinks: Any,  # [rows, 128], in base 2
    ) -> None:
        self._spec, self._shape, self._interpret = spec, shape, interpret
        self._queries, self._top, self._total, self._acc = queries, top, total, acc
        self._sinks = sinks
        self._precision = lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None

    def begin(self, q: Any, count: Any) -> None:
        """Begin a tile of `count` tokens, whose queries are q [tile, N, H]."""
        heads, group = self._shape.num_heads, self._shape.group

        @pl.loop(0, count)
        def _(index: Array) -> None:
            at = divide(index, group)
            rows = pl.ds(pl.multiple_of((index - at * group) * heads, heads), heads)
            self._queries[at, rows, : self._shape.head_dim] = q[index]

        def clear(group: Any, rows: int) -> None:
            state = (rows, LANES)
            if self._sinks is None:
                self._top[group, :rows] = jnp.full(state, NEVER, jnp.float32)
                self._total[group, :rows] = jnp.zeros(state, jnp.float32)
            else:
                self._top[group, :rows] = self._sinks[:rows]
                self._total[group, :rows] = jnp.full(state, 1 / LANES, jnp.float32)
            self._acc[group, :rows] = jnp.zeros((rows, self._shape.out_dim), jnp.float32)

        _for_each_group(count, self._shape, clear)

    def attend(
        self, group: Any, rows: int, latents: Any, first: Any, count: int, position: Any | None
    ) -> None:
        """Attend to `count` units of a block [tokens, W], from its token `first`, a unit's, on.

        `position` is that of the group's first query within the block, or None if all of its
        queries see all of the units.
        """
        unit = self._shape.tiles.unit

        def logits(at: Any) -> Array:  # [rows, unit], not scaled
            return lax.dot_general(
                self._queries[group, :rows],
                self._operand(latents[pl.ds(at, unit), :]),
                (((1,), (1,)), ((), ())),
                precision=self._precision,
                preferred_element_type=jnp.float32,
            )

        starts = [pl.multiple_of(first + number * unit, unit) for number in range(count)]
        ahead = logits(starts[0])
        for number, at in enumerate(starts):
            scores = ahead
            if number + 1 < count:  # there is work for the matrix units while the softmax waits
                ahead = logits(starts[number + 1])
            seen = None if position is None else self._seen(scores.shape, position - at)
            weights, decay = self._update(group, rows, scores, seen)
            values = self._operand(latents[pl.ds(at, unit), : self._shape.out_dim])
            added = jnp.dot(
                weights, values, precision=self._precision, preferred_element_type=jnp.float32
            )
            acc = self._acc[group, :rows]
            self._acc[group, :rows] = acc * _lanes(decay, added.shape[1]) + added

    def end(self, out: Any, count: Any) -> None:
        """Write the weighted means of the values to out [tile, N, out_dim]."""
        heads = self._shape.num_heads

        def write(group: Any, rows: int) -> None:
            total = jnp.sum(self._total[group, :rows], axis=1, keepdims=True)
            mean = (self._acc[group, :rows] / total).astype(out.dtype)
            for index in range(rows // heads):
                token = group * self._shape.group + index
                out[token] = mean[index * heads : (index + 1) * heads]

        _for_each_group(count, self._shape, write)

    def _seen(self, shape: tuple[int, ...], position: Any) -> Array:
        """Which tokens each query row sees, if the first query is at `position` of them."""
        row = lax.broadcasted_iota(jnp.int32, shape, 0)
        behind = lax.broadcasted_iota(jnp.int32, shape, 1)  # the first query's position, less it
        for index in range(1, shape[0] // self._shape.num_heads):
            behind -= (row >= index * self._shape.num_heads).astype(jnp.int32)
        seen = behind <= position
        if self._spec.window is not None:
            seen &= behind > position - self._spec.window
        return seen

    def _update(
        self, group: Any, rows: int, logits: Array, seen: Array | None
    ) -> tuple[Array, Array]:
        """Weights [rows, unit] of a unit, and by how much those before it shrink [rows, 128]."""
        scale, cap = self._spec.scale, self._spec.soft_cap
        if cap is None:
            logits = logits * (scale * LOG2E)
        else:
            logits = jnp.tanh(logits * (scale / cap)) * (cap * LOG2E)
        if seen is not None:
            logits = jnp.where(seen, logits, NEVER)
        before = self._top[group, :rows]
        top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        self._top[group, :rows] = top
        decay = jnp.exp2(before - top)
        weights = jnp.exp2(logits - _lanes(top, logits.shape[1]))
        total = self._total[group, :rows] * decay
        for first in range(0, weights.shape[1], LANES):
            total += weights[:, first : first + LANES]
        self._total[group, :rows] = total
        return weights.astype(self._queries.dtype), decay

    def _operand(self, latents: Array) -> Array:
        """Latents in the form in which they multiply arrays of the queries' dtype."""
        is_float8 = latents.dtype.itemsize == 1 and jnp.issubdtype(latents.dtype, jnp.floating)
        if is_float8 and self._queries.dtype == jnp.bfloat16 and not self._interpret:
            return latents  # the matrix unit takes them beside bfloat16
        return latents.astype(self._queries.dtype)


def _clear_unseen(
    buffers: Any,  # [depth, tokens, W]
    slot: Any,
    low: Any,
    high: Any,
    shape: _Shape,
    *,
    interpret: bool,
) -> None:
    """Zero the values of a block's tokens that are not in low <= token < high, as 0 * NaN is NaN.

    Only in units of tokens that have some that are. In words of 32 bits, as not all TPUs have
    vector instructions for less.
    """
    unit, dtype = shape.tiles.unit, jnp.dtype(buffers.dtype)
    packing = 4 // dtype.itemsize

    def is_seen(token: Array) -> Array:
        return (token >= low) & (token < high)

    def clear(number: Any) -> None:
        first = number * unit
        if interpret:  # it has no bitcasts of references
            tokens = pl.ds(first, unit)
            token = first + lax.broadcasted_iota(jnp.int32, (unit, shape.out_dim), 0)
            values = buffers[slot, tokens, : shape.out_dim]
            buffers[slot, tokens, : shape.out_dim] = jnp.where(
                is_seen(token), values, jnp.zeros_like(values)
            )
            return
        height = unit // packing
        words = buffers.bitcast(jnp.uint32).at[slot]
        rows = pl.ds(pl.multiple_of(number * height, height), height)
        token = first + packing * lax.broadcasted_iota(jnp.int32, (height, LANES), 0)
        kept = jnp.zeros(token.shape, jnp.uint32)
        for index in range(packing):
            bits = jnp.uint32((1 << 32 // packing) - 1 << 32 // packing * index)
            kept |= jnp.where(is_seen(token + index), bits, jnp.uint32(0))
        for column in range(0, shape.out_dim, LANES):
            columns = slice(column, column + LANES)
            words[rows, columns] = words[rows, columns] & kept

    @pl.loop(0, divide(low + (unit - 1), unit))
    def _(number: Array) -> None:
        clear(number)

    last = divide(high, unit)
    pl.when(last * unit < high)(lambda: clear(last))


def _lanes(x: Array, width: int) -> Array:
    """x [rows, 128], the same in all lanes, for `width` of them."""
    return jnp.concatenate([x] * (width // LANES), axis=1)

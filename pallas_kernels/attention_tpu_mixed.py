"""Attention of prefill chunks and other rows of several query tokens over paged KV, for TPUs.

A row's queries are cut into *tiles* of tokens, and a tile walks over the row's KV block by block
up to its last query. Of a block, one *unit* at a time is worked on: some KV tokens of one kv head
against the tile's queries of a *part*, some of the query heads that share the kv head, as one
matrix [heads * tokens, W].

Softmax on the vector units is what such a kernel waits for, so they are spared: the scale and
log2(e) are folded into the queries, sums stay spread over the lanes until the end, and masks are
for the blocks alone that hold a token which some query does not see. The logits of a unit are
issued before the softmax of the one before it, so that the matrix units work meanwhile.

The blocks of all tiles of all rows are one sequence of copies, which runs one block ahead of the
work. The softmax is the online one of FlashAttention (arXiv 2205.14135), in base 2.
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
from pallas_kernels.kv_write import LANES, PageLayout, page_layout
from pallas_kernels.tpu_pages import BlockRows, PageBlock, PageLists, divide, interpreter
from pallas_kernels.types import AttentionSpec, PageMetadata

NEVER = -1e30  # the logit of what is not seen: finite, as inf - inf is NaN
LOG2E = math.log2(math.e)
_UNIT_ROWS = 128  # query rows that a unit should have
_BLOCK_BYTES = 4 << 20
_VMEM_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedTiles:
    """Sizes that do not change the result. Static."""

    tile: int  # query tokens of a row that share a walk over its KV, a multiple of 16
    heads: int  # query heads of a unit, a divisor of the group
    block: int  # KV tokens of a copy, a multiple of the page size and of unit
    unit: int  # KV tokens of an update of the softmax, a multiple of 128


def default_tiles(spec: AttentionSpec, backend: Backend) -> MixedTiles:
    """What to use where nothing was tuned."""
    page_size, height, width = page_layout(spec.kv, backend).page
    tile = min(128, max(32, 1 << (256 // spec.group).bit_length() - 1))
    heads = max(
        h
        for h in range(1, spec.group + 1)
        if spec.group % h == 0 and (h == 1 or h * tile <= _UNIT_ROWS)
    )
    unit = max(256, page_size)
    block = unit
    row_bytes = height * width * jnp.dtype(spec.kv.dtype).itemsize
    while 2 * block * row_bytes <= _BLOCK_BYTES and block < 512:
        block *= 2
    return MixedTiles(tile=tile, heads=heads, block=block, unit=unit)


def attend_mixed(
    q: Array,  # [T, N, H]
    out: Array,  # [T, N, H]: what other rows' tokens have
    kv_pages: Array,  # [L * num_pages, page_size, C, W]
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N] float32, if spec.sinks
    tiles: MixedTiles | None = None,
) -> Array:
    """`out` with the attention of the rows from num_decode_rows on in their tokens' places."""
    kv, layout = spec.kv, page_layout(spec.kv, backend)
    if tiles is None:
        key = tuning.attention_key(spec)
        tiles = tuning.tiles("tpu_mixed", backend.chip, key, default_tiles(spec, backend))
    num_tokens, width = q.shape[0], layout.width
    if tiles.block % kv.page_size or tiles.block % tiles.unit or spec.group % tiles.heads:
        raise ValueError(f"{tiles} do not fit each other and pages of {kv.page_size} tokens")
    block = PageBlock(layout=layout, dtype=kv.dtype, num_pages=tiles.block // kv.page_size)
    # A tile of queries lies in memory as a page does: tokens of rows, one a query head.
    packing = 4 // q.dtype.itemsize
    num_heads = -(-spec.num_heads // packing) * packing
    queries = PageBlock(
        layout=PageLayout(kind="pairs", page=(tiles.tile, num_heads, width)),
        dtype=q.dtype,
        num_pages=1,
    )
    value_first = kv.head_dim if layout.kind == "packed" else 0

    def arrange(x: Array, first: int, more: int) -> Array:
        """[T, N, H] -> [T + more, words, packing, W]"""
        right = width - kv.head_dim - first
        x = jnp.pad(x, ((0, more), (0, num_heads - spec.num_heads), (first, right)))
        return x.reshape(-1, num_heads // packing, packing, width)

    num_parts = spec.num_heads // tiles.heads
    rows = tiles.heads * tiles.tile
    inputs, in_specs = [], []
    if sinks is not None:
        logits = jnp.repeat(sinks.astype(jnp.float32) * LOG2E, tiles.tile)
        logits = logits.reshape(num_parts, rows, 1)
        inputs.append(jnp.broadcast_to(logits, (num_parts, rows, LANES)))
        in_specs.append(pl.BlockSpec(inputs[-1].shape, lambda *_: (0, 0, 0)))
    table = PageLists.padded(pages.page_table)
    scalars = [*_plan(pages, tiles.tile, num_tokens), _first_page(pages, layer)]
    inputs += [
        arrange(q, 0, tiles.tile),  # a tile may read past the last token
        table,
        block.view(kv_pages),
        arrange(out, value_first, 0),
    ]
    in_specs += [pl.BlockSpec(memory_space=pl.ANY)] * 4
    kernel = functools.partial(
        _kernel, spec=spec, block=block, queries=queries, tiles=tiles, interpret=backend.interpret
    )
    result = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=in_specs,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                *PageLists.scratch(table),
                block.scratch,
                queries.scratch,
                queries.scratch,
                pltpu.VMEM((num_parts, rows, width), q.dtype),
                pltpu.VMEM((num_parts, rows, LANES), jnp.float32),
                pltpu.VMEM((num_parts, rows, LANES), jnp.float32),
                pltpu.VMEM((num_parts, rows, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(inputs[-1].shape, q.dtype),
        input_output_aliases={len(scalars) + len(inputs) - 1: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        interpret=interpreter(backend),
        name="paged_mixed",
    )(*scalars, *inputs)
    result = result.reshape(num_tokens, num_heads, width)[:, : spec.num_heads]
    return result[..., value_first : value_first + kv.head_dim]


def _plan(pages: PageMetadata, tile: int, num_tokens: int) -> tuple[Array, Array]:
    """The tiles of all rows after the decode rows, and how many there are: [4, M], [1] int32.

    A tile's row of the batch, its first token, its number of tokens, and that first token's
    position in its row. It is the same for all layers, so XLA takes it out of a loop over them.
    """
    max_rows = pages.kv_lens.shape[0]
    row_ids = jnp.arange(max_rows, dtype=jnp.int32)
    is_mixed = (row_ids >= pages.num_decode_rows) & (row_ids < pages.num_rows)
    num_queries = jnp.where(is_mixed, jnp.diff(pages.query_starts), 0)
    ends = jnp.cumsum((num_queries + tile - 1) // tile, dtype=jnp.int32)  # [B]
    index = jnp.arange(max_rows + num_tokens // tile, dtype=jnp.int32)
    row = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, max_rows - 1)
    before = ends[row] - (num_queries[row] + tile - 1) // tile
    token = pages.query_starts[row] + (index - before) * tile
    left = pages.query_starts[row + 1] - token
    position = pages.kv_lens[row] - left
    return jnp.stack([row, token, jnp.minimum(left, tile), position]), ends[-1:]


def _first_page(pages: PageMetadata, layer: int | Array) -> Array:
    return (jnp.asarray(layer, jnp.int32) * pages.num_pages).reshape(1)


def _kernel(
    plan_ref: Any,  # SMEM [4, M]
    num_tiles_ref: Any,  # SMEM [1]
    first_page_ref: Any,  # SMEM [1]
    *refs: Any,
    spec: AttentionSpec,
    block: PageBlock,
    queries: PageBlock,
    tiles: MixedTiles,
    interpret: bool,
) -> None:
    """All tiles of all rows, one after the other."""
    sinks_ref, *rest = refs if spec.sinks else (None, *refs)
    q_hbm, table_hbm, kv_hbm, _, out_hbm, lists, list_semaphores, *rest = rest
    buffers, q_buffers, out_buffers, q_ref, top_ref, sum_ref, acc_ref, *semaphores = rest
    kv_semaphores, q_semaphores, out_semaphores = semaphores
    tables = PageLists(table_hbm, lists, list_semaphores)
    size, dtype = block.page_size, q_ref.dtype
    num_parts = q_ref.shape[0]
    parts_of_head = num_parts // spec.kv.num_kv_heads
    num_tiles, first_page = num_tiles_ref[0], first_page_ref[0]
    softmax = _Softmax(spec, top_ref, sum_ref, acc_ref, dtype)

    def seen_pages(index: Any) -> tuple[Any, Any]:
        """The first page that the tile's queries see anything of, and how many there are."""
        position = plan_ref[3, index]
        end = divide(position + plan_ref[2, index] + (size - 1), size)
        if spec.window is None:
            return 0, end
        first = divide(jnp.maximum(position - (spec.window - 1), 0), size)
        return first, end - first

    def start_block(index: Any, number: Any, slot: Any) -> None:
        first, count = seen_pages(index)
        before = number * block.num_pages
        block.start(
            kv_hbm,
            buffers,
            kv_semaphores,
            slot,
            lambda page: first_page + tables.page(index, first + before + page),
            jnp.minimum(count - before, block.num_pages),
        )

    def q_copy(index: Any) -> Any:
        tokens = q_hbm.at[pl.ds(plan_ref[1, index], tiles.tile)]
        to = q_buffers.at[index & 1, :, pl.ds(0, queries.words)]
        return pltpu.make_async_copy(tokens, to, q_semaphores.at[index & 1])

    def each_out_copy(index: Any, do: Callable[[Any], None]) -> None:
        """The tokens behind a tile's own are other rows': a whole tile is one copy, others many."""
        token, count, slot = plan_ref[1, index], plan_ref[2, index], index & 1

        def copy(first: Any, num: int) -> Any:
            source = out_buffers.at[slot, pl.ds(first, num), pl.ds(0, queries.words)]
            to = out_hbm.at[pl.ds(token + first, num)]
            return pltpu.make_async_copy(source, to, out_semaphores.at[slot])

        @pl.when(count == tiles.tile)
        def _() -> None:
            do(copy(0, tiles.tile))

        @pl.when(count < tiles.tile)
        def _() -> None:
            @pl.loop(0, count)
            def _(index: Array) -> None:
                do(copy(index, 1))

    @pl.when(num_tiles > 0)
    def _() -> None:
        tables.start(plan_ref[0, 0], 0)
        q_copy(0).start()

        @pl.when(num_tiles > 1)
        def _() -> None:
            tables.start(plan_ref[0, 1], 1)

        tables.wait(0)
        start_block(0, 0, 0)

    def attend(slot: Any, bounds: tuple[Any, Any] | None) -> None:
        """Attend to a block. `bounds`, for a block that not all queries see all of: the position
        of its first token beside the tile's first query's, and the end of what is written.
        """
        if bounds is None:
            for first in range(0, tiles.block, tiles.unit):
                attend_unit(slot, first, None)
            return
        num_tokens = jnp.minimum(bounds[1], tiles.block)

        @pl.loop(0, divide(num_tokens + (tiles.unit - 1), tiles.unit))
        def _(number: Array) -> None:
            attend_unit(slot, number * tiles.unit, bounds)

    def attend_unit(slot: Any, first: Any, bounds: tuple[Any, Any] | None) -> None:
        rows = BlockRows(block, buffers, slot, first, tiles.unit, dtype, interpret=interpret)
        seen = value_seen = None
        if bounds is not None:
            seen, value_seen = _seen(bounds, first, spec, tiles)

        def logits(part: int) -> Array:
            return softmax.logits(q_ref[part], rows.key(part // parts_of_head))

        ahead = logits(0)
        for part in range(num_parts):
            scores = ahead
            if part + 1 < num_parts:
                ahead = logits(part + 1)
            weights, decay = softmax.update(part, scores, seen)
            values = rows.value(part // parts_of_head)
            if value_seen is not None:  # 0 * NaN is NaN
                values = jnp.where(value_seen, values, jnp.zeros_like(values))
            softmax.add(part, weights, decay, values)

    def do_tile(index: Array, turn: Array) -> Array:
        position, count = plan_ref[3, index], plan_ref[2, index]
        first, num_pages = seen_pages(index)
        num_blocks = divide(num_pages + (block.num_pages - 1), block.num_pages)

        @pl.when(index + 2 < num_tiles)  # the next tile's list is under way
        def _() -> None:
            tables.start(plan_ref[0, index + 2], index + 2)

        q_copy(index).wait()

        @pl.when(index + 1 < num_tiles)
        def _() -> None:
            q_copy(index + 1).start()

        _take_queries(q_buffers, index & 1, q_ref, queries, spec, tiles, interpret=interpret)
        softmax.clear(sinks_ref)

        def do_block(number: Array, _: None) -> None:
            slot = (turn + number) & 1
            is_last = number + 1 == num_blocks
            following = jnp.where(is_last, index + 1, index)

            @pl.when(is_last & (following < num_tiles))
            def _() -> None:
                tables.wait(following)

            @pl.when(following < num_tiles)
            def _() -> None:
                start_block(following, jnp.where(is_last, 0, number + 1), 1 - slot)

            before = number * block.num_pages
            block.wait(
                kv_hbm,
                buffers,
                kv_semaphores,
                slot,
                jnp.minimum(num_pages - before, block.num_pages),
            )
            start = (first + before) * size - position  # of the block beside the first query
            is_whole = start + block.num_tokens <= 1
            if spec.window is not None:
                is_whole &= start > (count - 1) - spec.window

            @pl.when(is_whole)
            def _() -> None:
                attend(slot, None)

            @pl.when(jnp.logical_not(is_whole))
            def _() -> None:
                attend(slot, (start, count - start))

        lax.fori_loop(0, num_blocks, do_block, None)

        @pl.when(index >= 2)
        def _() -> None:
            each_out_copy(index - 2, lambda copy: copy.wait())

        results = [
            softmax.result(part)[first : first + tiles.tile]
            for part in range(num_parts)
            for first in range(0, tiles.heads * tiles.tile, tiles.tile)
        ]
        _put_results(results, out_buffers, index & 1, queries, interpret=interpret)
        each_out_copy(index, lambda copy: copy.start())
        return turn + num_blocks

    lax.fori_loop(0, num_tiles, do_tile, 0)
    for back in (2, 1):

        @pl.when(num_tiles >= back)
        def _(back: int = back) -> None:
            each_out_copy(num_tiles - back, lambda copy: copy.wait())


def _seen(
    bounds: tuple[Any, Any], first: Any, spec: AttentionSpec, tiles: MixedTiles
) -> tuple[Array, Array]:
    """Which of a unit's tokens from `first` of its block on each query row sees, and which any row
    of the tile may: [rows, unit], [unit, 1].
    """
    start, end = bounds
    shape = (tiles.heads * tiles.tile, tiles.unit)
    query = lax.broadcasted_iota(jnp.int32, shape, 0)
    query = query & (tiles.tile - 1) if tiles.tile & (tiles.tile - 1) == 0 else query % tiles.tile
    token = start + first + lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = token <= query
    value = first + lax.broadcasted_iota(jnp.int32, (tiles.unit, 1), 0)
    value_seen = value < end
    if spec.window is not None:
        seen &= token > query - spec.window
        value_seen &= value + start > -spec.window
    return seen, value_seen


def _take_queries(
    q_buffers: Any,
    slot: Any,
    q_ref: Any,  # [parts, heads * tile, W]
    queries: PageBlock,
    spec: AttentionSpec,
    tiles: MixedTiles,
    *,
    interpret: bool,
) -> None:
    """The tile's queries head by head, scaled so that logits come out in base 2, or soft-capped."""
    scale = spec.scale * LOG2E if spec.soft_cap is None else spec.scale / spec.soft_cap
    for word in range(queries.words):
        loaded = queries.load(q_buffers, slot, word, 0, tiles.tile, interpret=interpret)
        for index, x in enumerate(loaded):
            head = word * queries.packing + index
            if head < spec.num_heads:
                part, place = divmod(head, tiles.heads)
                x = (x.astype(jnp.float32) * scale).astype(q_ref.dtype)
                q_ref[part, pl.ds(place * tiles.tile, tiles.tile), :] = x


def _put_results(
    results: list[Array],  # by query head: [tile, W] float32
    out_buffers: Any,
    slot: Any,
    queries: PageBlock,
    *,
    interpret: bool,
) -> None:
    """The reverse of `PageBlock.load`, into a buffer of the same form."""
    dtype = jnp.dtype(queries.dtype)
    results += [jnp.zeros_like(results[0])] * (queries.words * queries.packing - len(results))
    for word in range(queries.words):
        elements = results[word * queries.packing : (word + 1) * queries.packing]
        if interpret:
            for index, x in enumerate(elements):
                out_buffers[slot, :, word, index, :] = x.astype(dtype)
            continue
        if queries.packing == 1:
            words = pltpu.bitcast(elements[0], jnp.uint32)
        else:  # the upper half of a float32 that bfloat16 holds exactly is that bfloat16
            low, high = (
                pltpu.bitcast(x.astype(dtype).astype(jnp.float32), jnp.uint32) for x in elements
            )
            words = (low >> 16) | high
        folds = queries.width // LANES
        rows = out_buffers.bitcast(jnp.uint32).at[slot].reshape(-1, LANES)
        for fold in range(folds):
            at = pl.ds(word * folds + fold, queries.page_size, stride=queries.stride * folds)
            rows[at, :] = words[:, fold * LANES : (fold + 1) * LANES]


class _Softmax:
    """The online softmax of a tile, its state in VMEM, by parts.

    The largest logit `top` and the sum of weights are [rows, 128]: the largest in all lanes, the
    sum spread over them.
    """

    def __init__(self, spec: AttentionSpec, top: Any, total: Any, acc: Any, dtype: Any) -> None:
        self._spec, self._top, self._total, self._acc = spec, top, total, acc
        self._dtype = dtype
        self._precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def clear(self, sinks_ref: Any) -> None:
        """Begin a tile: with nothing seen, or with the sinks' logits."""
        if sinks_ref is None:
            self._top[...] = jnp.full_like(self._top, NEVER)
            self._total[...] = jnp.zeros_like(self._total)
        else:
            self._top[...] = sinks_ref[...]
            self._total[...] = jnp.full_like(self._total, 1 / LANES)
        self._acc[...] = jnp.zeros_like(self._acc)

    def logits(self, queries: Array, keys: Array) -> Array:
        """[rows, W], [tokens, W] -> [rows, tokens]"""
        return lax.dot_general(
            queries,
            keys,
            (((1,), (1,)), ((), ())),
            precision=self._precision,
            preferred_element_type=jnp.float32,
        )

    def update(self, part: int, logits: Array, seen: Array | None) -> tuple[Array, Array]:
        """Weights [rows, tokens] of a unit, and by how much those before it shrink [rows, 128]."""
        cap = self._spec.soft_cap
        if cap is not None:
            logits = jnp.tanh(logits) * (cap * LOG2E)
        if seen is not None:
            logits = jnp.where(seen, logits, NEVER)
        before = self._top[part]
        top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        self._top[part] = top
        decay = jnp.exp2(before - top)
        weights = jnp.exp2(logits - _lanes(top, logits.shape[1]))
        total = self._total[part] * decay
        for first in range(0, weights.shape[1], LANES):
            total += weights[:, first : first + LANES]
        self._total[part] = total
        return weights.astype(self._dtype), decay

    def add(self, part: int, weights: Array, decay: Array, values: Array) -> None:
        """Add weighted values [tokens, W]."""
        added = jnp.dot(
            weights, values, precision=self._precision, preferred_element_type=jnp.float32
        )
        self._acc[part] = self._acc[part] * _lanes(decay, added.shape[1]) + added

    def result(self, part: int) -> Array:
        """The weighted mean of the values, [rows, W] float32."""
        return self._acc[part] / jnp.sum(self._total[part], axis=1, keepdims=True)


def _lanes(x: Array, width: int) -> Array:
    """x [rows, 128], the same in all lanes, for `width` of them."""
    return x if width == LANES else jnp.concatenate([x] * (width // LANES), axis=1)

"""Attention of decode rows (one query token each) over paged KV, for TPUs.

Decode reads every key and value once, so HBM should be what it waits for. What comes close to it is
to push keys and values into the matrix units, where they are the stationary operand: a head has
only a few query rows to multiply with. Three things keep the rest out of the way:

- Query heads of several kv heads are stacked to fill a register's 8 sublanes, `side` kv heads side
  by side: their keys are one operand [tokens, side * W], which their queries meet on the diagonal
  blocks of [rows, side * W]. So the softmax has no padding to work on, and a matrix unit that is
  256 wide is filled by heads 128 wide.
- The logits of a unit of tokens are issued before the softmax of the unit before it, so that the
  scheduler has pushes to place while the softmax waits for its reductions.
- Blocks whose tokens are all seen have a path without masks.

The softmax is the online one of FlashAttention (arXiv 2205.14135), in base 2.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.backend import Backend
from pallas_kernels.kv_write import LANES, page_layout
from pallas_kernels.tpu_pages import BlockRows, PageBlock, PageLists, divide, interpreter
from pallas_kernels.types import AttentionSpec, PageMetadata

NEVER = -1e30  # the logit of what is not seen: finite, as inf - inf is NaN
LOG2E = math.log2(math.e)
_SUBLANES = 8
_BLOCK_BYTES = 4 << 20  # of KV in a copy: long enough to hide the latency of HBM
_VMEM_BYTES = 48 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiles:
    """Sizes that do not change the result. Static."""

    block: int  # tokens a copy, a multiple of the page size
    unit: int  # tokens an update of the softmax; block and edge are multiples of it, it of 128
    edge: int  # tokens a step of the path with masks; block is a multiple of it
    rows: int = 32  # rows of the batch whose queries and outputs are in VMEM


def default_tiles(spec: AttentionSpec, backend: Backend) -> DecodeTiles:
    """What to use where nothing was tuned."""
    page_size, height, width = page_layout(spec.kv, backend).page
    row_bytes = height * width * jnp.dtype(spec.kv.dtype).itemsize
    edge = max(256, page_size)
    block = edge
    while 2 * block * row_bytes <= _BLOCK_BYTES and block < 2048:
        block *= 2
    edge = min(512, block)
    return DecodeTiles(block=block, unit=min(edge, 512), edge=edge)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stacks:
    """How query heads share the rows of registers: row = kv head of `side` * group + its query."""

    num_kv_heads: int
    group: int  # query heads of a kv head, padded
    side: int  # kv heads
    width: int  # of a key

    @classmethod
    def of(cls, spec: AttentionSpec, width: int, mxu_size: int) -> "_Stacks":
        group = 1 << (spec.group - 1).bit_length()
        side = max(1, _SUBLANES // group, mxu_size // width)
        side = min(side, 1 << (spec.kv.num_kv_heads - 1).bit_length())
        group = max(group, _SUBLANES // side)
        return cls(num_kv_heads=spec.kv.num_kv_heads, group=group, side=side, width=width)

    @property
    def count(self) -> int:
        return -(-self.num_kv_heads // self.side)

    @property
    def rows(self) -> int:
        return self.group * self.side

    def heads(self, stack: int) -> list[int]:
        """The kv heads of a stack; the last one stands in for those there are not."""
        first = stack * self.side
        return [min(head, self.num_kv_heads - 1) for head in range(first, first + self.side)]

    def fold(self, x: Array) -> Array:
        """[B, K * group of spec, columns] -> [B, count, rows, columns], zeros for padding."""
        x = x.reshape(x.shape[0], self.num_kv_heads, -1, x.shape[-1])
        missing = self.count * self.side - self.num_kv_heads
        pad = ((0, 0), (0, missing), (0, self.group - x.shape[2]), (0, 0))
        return jnp.pad(x, pad).reshape(x.shape[0], self.count, self.rows, x.shape[-1])

    def unfold(self, x: Array, group: int) -> Array:
        """[B, count, rows, columns] -> [B, K * group, columns]"""
        x = x.reshape(x.shape[0], -1, self.group, x.shape[-1])[:, : self.num_kv_heads, :group]
        return x.reshape(x.shape[0], -1, x.shape[-1])


def attend_decode(
    q: Array,  # [T, N, H]: the token of row i is token i
    kv_pages: Array,  # [L * num_pages, page_size, C, W]
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N] float32, if spec.sinks
    tiles: DecodeTiles | None = None,
) -> Array:
    """Attention of the first num_decode_rows rows, one query token each: [B, N, H] in q's dtype.

    Rows from num_decode_rows on are not worked on and hold anything, NaN included.
    """
    if tiles is None:
        key = tuning.attention_key(spec)
        tiles = tuning.tiles("tpu_decode", backend.chip, key, default_tiles(spec, backend))
    kv, layout = spec.kv, page_layout(spec.kv, backend)
    num_rows = pages.kv_lens.shape[0]
    width = layout.width
    is_wide = backend.chip.tpu_generation in ("v6e", "tpu7x")
    stacks = _Stacks.of(spec, width, mxu_size=256 if is_wide else 128)
    block = PageBlock(
        layout=layout, dtype=kv.dtype, num_pages=tiles.block // kv.page_size, halves_first=is_wide
    )
    if block.num_tokens != tiles.block or tiles.block % tiles.edge or tiles.edge % tiles.unit:
        raise ValueError(f"{tiles} do not fit each other and pages of {kv.page_size} tokens")
    chunk = min(tiles.rows, num_rows)

    padding = width - kv.head_dim
    queries = stacks.fold(jnp.pad(q[:num_rows], ((0, 0), (0, 0), (0, padding))))
    inputs = [queries]
    shape = (chunk, *queries.shape[1:])

    def chunk_of(step: Array, _lens: Any, limits: Any) -> tuple[Any, ...]:
        last = jnp.maximum(limits[0] - 1, 0) // chunk  # steps after it move nothing
        return jnp.minimum(step, last), 0, 0, 0

    in_specs = [pl.BlockSpec(shape, chunk_of)]
    if sinks is not None:
        logits = stacks.fold(sinks.astype(jnp.float32)[None, :, None] * LOG2E)[0]
        inputs.append(jnp.broadcast_to(logits, (*logits.shape[:2], LANES)))
        in_specs.append(pl.BlockSpec(inputs[-1].shape, lambda *_: (0, 0, 0)))
    table = PageLists.padded(pages.page_table)
    inputs += [table, block.view(kv_pages)]
    in_specs += [pl.BlockSpec(memory_space=pl.ANY)] * 2

    state = (stacks.count, stacks.rows)
    limits = [pages.num_decode_rows, jnp.asarray(layer, jnp.int32) * pages.num_pages]
    kernel = functools.partial(
        _kernel,
        spec=spec,
        stacks=stacks,
        block=block,
        tiles=tiles,
        chunk=chunk,
        interpret=backend.interpret,
    )
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(num_rows, chunk),),
            in_specs=in_specs,
            out_specs=pl.BlockSpec(shape, chunk_of),
            scratch_shapes=[
                *PageLists.scratch(table),
                block.scratch,
                pltpu.VMEM((*state, stacks.side * width), q.dtype),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, stacks.side * width), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        interpret=interpreter(backend),
        name="paged_decode",
    )(pages.kv_lens, jnp.stack(limits), *inputs)
    first = kv.head_dim if layout.kind == "packed" else 0
    return stacks.unfold(out, spec.group)[..., first : first + kv.head_dim]


def _kernel(
    lens_ref: Any,  # SMEM [B]
    limits_ref: Any,  # SMEM: number of decode rows, first page of the layer
    q_ref: Any,  # [chunk, stacks, rows, W]
    *refs: Any,
    spec: AttentionSpec,
    stacks: _Stacks,
    block: PageBlock,
    tiles: DecodeTiles,
    chunk: int,
    interpret: bool,
) -> None:
    """The rows of one chunk. The blocks of all rows are one sequence of copies, which runs a block
    ahead of the work on them, across rows and chunks.
    """
    sinks_ref, *rest = refs if spec.sinks else (None, *refs)
    table_hbm, kv_hbm, out_ref, lists, list_semaphores, *rest = rest
    buffers, q_diagonal, top_ref, sum_ref, acc_ref, turn_ref, semaphores = rest
    tables = PageLists(table_hbm, lists, list_semaphores)
    size, width, dtype = block.page_size, stacks.width, q_ref.dtype
    chunk_number = pl.program_id(0)
    num_rows, first_page = limits_ref[0], limits_ref[1]
    state = _Softmax(spec, top_ref, sum_ref, acc_ref, dtype)

    def seen_pages(row: Array) -> tuple[Any, Array]:
        """The first page that the row's token sees something of, and how many there are."""
        end = lens_ref[row]
        last = divide(end + (size - 1), size)
        if spec.window is None:
            return 0, last
        first = divide(jnp.maximum(end - spec.window, 0), size)
        return first, last - first

    def start_block(row: Any, index: Any, slot: Any) -> None:
        first, count = seen_pages(row)
        before = index * block.num_pages
        block.start(
            kv_hbm,
            buffers,
            semaphores,
            slot,
            lambda page: first_page + tables.page(row, first + before + page),
            jnp.minimum(count - before, block.num_pages),
        )

    @pl.when((chunk_number == 0) & (num_rows > 0))
    def _() -> None:
        turn_ref[0] = 0
        tables.start(0, 0)

        @pl.when(num_rows > 1)
        def _() -> None:
            tables.start(1, 1)

        tables.wait(0)
        start_block(0, 0, 0)

    def attend(slot: Array, first: Any, count: int, bounds: tuple[Any, Any] | None) -> None:
        """Attend to `count` tokens of a buffer from `first`, to those within `bounds`."""

        def logits(at: Any) -> tuple[BlockRows, list[Array]]:
            rows = BlockRows(block, buffers, slot, at, tiles.unit, dtype, interpret=interpret)
            return rows, [
                state.logits(
                    q_diagonal[stack], _beside([rows.key(head) for head in stacks.heads(stack)])
                )
                for stack in range(stacks.count)
            ]

        starts = [first + offset for offset in range(0, count, tiles.unit)]
        ahead = logits(starts[0])
        for number, at in enumerate(starts):
            rows, scores = ahead
            if number + 1 < len(starts):
                ahead = logits(starts[number + 1])
            seen = value_seen = None
            if bounds is not None:
                seen = _within(bounds, at, (1, tiles.unit))
                value_seen = _within(bounds, at, (tiles.unit, 1))
            weights = [state.update(stack, score, seen) for stack, score in enumerate(scores)]
            for stack, (weight, decay) in enumerate(weights):
                values = _beside([rows.value(head) for head in stacks.heads(stack)])
                if value_seen is not None:  # 0 * NaN is NaN
                    values = jnp.where(value_seen, values, jnp.zeros_like(values))
                state.add(stack, weight, decay, values)

    def do_row(number: Array, _: None) -> None:
        row = chunk_number * chunk + number
        end = lens_ref[row]
        row_first_page, num_pages = seen_pages(row)
        num_blocks = divide(num_pages + (block.num_pages - 1), block.num_pages)
        turn = turn_ref[0]

        @pl.when(row + 2 < num_rows)  # the next row's list is under way
        def _() -> None:
            tables.start(row + 2, row + 2)

        for stack in range(stacks.count):
            query = _beside([q_ref[number, stack]] * stacks.side)
            is_own = _own_columns(stacks, query.shape)
            q_diagonal[stack] = jnp.where(is_own, query, jnp.zeros_like(query))
        state.clear(sinks_ref)

        def do_block(index: Array, _: None) -> None:
            slot = (turn + index) & 1
            is_last = index + 1 == num_blocks
            next_row = jnp.where(is_last, row + 1, row)

            @pl.when(is_last & (next_row < num_rows))
            def _() -> None:
                tables.wait(next_row)

            @pl.when(next_row < num_rows)
            def _() -> None:
                start_block(next_row, jnp.where(is_last, 0, index + 1), 1 - slot)

            before = index * block.num_pages
            count = jnp.minimum(num_pages - before, block.num_pages)
            block.wait(kv_hbm, buffers, semaphores, slot, count)
            token = (row_first_page + before) * size  # the buffer's first one
            high = jnp.minimum(end - token, block.num_tokens)
            low = 0 if spec.window is None else end - spec.window - token
            is_whole = (low <= 0) & (high == block.num_tokens)

            @pl.when(is_whole)
            def _() -> None:
                attend(slot, 0, block.num_tokens, None)

            @pl.when(jnp.logical_not(is_whole))
            def _() -> None:
                @pl.loop(0, divide(high + (tiles.edge - 1), tiles.edge))
                def _(step: Array) -> None:
                    attend(slot, step * tiles.edge, tiles.edge, (low, high))

        lax.fori_loop(0, num_blocks, do_block, None)
        turn_ref[0] = (turn + num_blocks) & 1
        for stack in range(stacks.count):
            out = state.result(stack)  # [rows, side * W], of which a row's head has W
            own = out[:, :width]
            kv_head = lax.broadcasted_iota(jnp.int32, own.shape, 0) // stacks.group
            for head in range(1, stacks.side):
                own = jnp.where(kv_head == head, out[:, head * width : (head + 1) * width], own)
            out_ref[number, stack] = own.astype(dtype)

    lax.fori_loop(0, jnp.minimum(chunk, num_rows - chunk_number * chunk), do_row, None)


class _Softmax:
    """The online softmax of one row of the batch, its state in VMEM.

    A stack's largest logit `top` and the sum of its weights are [rows, 128]: the largest in all
    lanes, the sum spread over them.
    """

    def __init__(self, spec: AttentionSpec, top: Any, total: Any, acc: Any, dtype: Any) -> None:
        self._spec, self._top, self._total, self._acc = spec, top, total, acc
        self._dtype = dtype
        self._precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def clear(self, sinks_ref: Any) -> None:
        """Begin a row: with nothing seen, or with the sinks' logits."""
        if sinks_ref is None:
            self._top[...] = jnp.full_like(self._top, NEVER)
            self._total[...] = jnp.zeros_like(self._total)
        else:
            self._top[...] = sinks_ref[...]
            self._total[...] = jnp.full_like(self._total, 1 / LANES)
        self._acc[...] = jnp.zeros_like(self._acc)

    def logits(self, queries: Array, keys: Array) -> Array:
        """[rows, columns], [tokens, columns] -> [rows, tokens], not scaled."""
        return lax.dot_general(
            queries,
            keys,
            (((1,), (1,)), ((), ())),
            precision=self._precision,
            preferred_element_type=jnp.float32,
        )

    def update(self, stack: int, logits: Array, seen: Array | None) -> tuple[Array, Array]:
        """Weights [rows, tokens] of a unit, and by how much those before it shrink [rows, 128]."""
        scale, cap = self._spec.scale, self._spec.soft_cap
        if cap is None:
            logits = logits * (scale * LOG2E)
        else:
            logits = jnp.tanh(logits * (scale / cap)) * (cap * LOG2E)
        if seen is not None:
            logits = jnp.where(seen, logits, NEVER)
        before = self._top[stack]
        top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        self._top[stack] = top
        decay = jnp.exp2(before - top)
        weights = jnp.exp2(logits - _lanes(top, logits.shape[1]))
        total = self._total[stack] * decay
        for first in range(0, weights.shape[1], LANES):
            total += weights[:, first : first + LANES]
        self._total[stack] = total
        return weights.astype(self._dtype), decay

    def add(self, stack: int, weights: Array, decay: Array, values: Array) -> None:
        """Add weighted values [tokens, columns]."""
        added = jnp.dot(
            weights, values, precision=self._precision, preferred_element_type=jnp.float32
        )
        self._acc[stack] = self._acc[stack] * _lanes(decay, added.shape[1]) + added

    def result(self, stack: int) -> Array:
        """The weighted mean of the values, [rows, columns] float32."""
        return self._acc[stack] / jnp.sum(self._total[stack], axis=1, keepdims=True)


def _own_columns(stacks: _Stacks, shape: tuple[int, ...]) -> Array:
    """Where the columns [rows, side * W] belong to the kv head of the row."""
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    return row // stacks.group == column // stacks.width


def _within(bounds: tuple[Any, Any], first: Any, shape: tuple[int, int]) -> Array:
    """Which tokens from `first` on lie within bounds, along the axis that is not 1."""
    low, high = bounds
    token = first + lax.broadcasted_iota(jnp.int32, shape, 0 if shape[1] == 1 else 1)
    return (token >= low) & (token < high)


def _beside(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=1)


def _lanes(x: Array, width: int) -> Array:
    """x [rows, 128], the same in all lanes, for `width` of them."""
    return jnp.concatenate([x] * (width // LANES), axis=1)

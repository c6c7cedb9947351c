"""Attention of decode rows (one query token each) over paged KV, for TPUs."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import Backend
from pallas_kernels.kv_write import LANES, page_layout
from pallas_kernels.tpu_pages import PageBlock
from pallas_kernels.types import AttentionSpec, PageMetadata

NEVER = -1e30  # a logit that is not seen; finite, as inf - inf is NaN
LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiles:
    block: int = 1024  # tokens a copy
    unit: int = 512  # tokens an update of the softmax, whole blocks
    edge: int = 256  # the same where some are not seen
    chunk: int = 32  # rows a step of the grid


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    """How query heads are stacked in rows."""

    num_kv_heads: int
    group: int  # padded
    side: int  # kv heads side by side
    width: int

    @property
    def num_stacks(self) -> int:
        return -(-self.num_kv_heads // self.side)

    @property
    def rows(self) -> int:
        return self.group * self.side


def attend_decode(
    q: Array,  # [T, N, H]
    kv_pages: Array,
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,
    tiles: DecodeTiles | None = None,
) -> Array:
    """[B, N, H]; rows from num_decode_rows on hold anything."""
    tiles = tiles or DecodeTiles()
    kv = spec.kv
    layout = page_layout(kv, backend)
    num_rows = pages.kv_lens.shape[0]
    pages_a_row = pages.page_table.shape[1]
    block = PageBlock(layout=layout, dtype=kv.dtype, num_pages=max(1, tiles.block // kv.page_size))
    width = layout.page[2]
    group = 1 << (spec.group - 1).bit_length()
    mxu = 256 if backend.chip.tpu_generation in ("v6e", "tpu7x") else 128
    side = max(1, 8 // group, mxu // width)
    heads = _Heads(num_kv_heads=kv.num_kv_heads, group=group, side=side, width=width)
    chunk = min(tiles.chunk, num_rows)
    stacked = _stack(q[:num_rows], spec, heads)  # [B, stacks, rows, W]
    scalars = [
        pages.page_table.reshape(-1),
        pages.kv_lens,
        jnp.stack([pages.num_decode_rows, jnp.asarray(layer, jnp.int32) * pages.num_pages]),
    ]
    arrays = [stacked]
    row_shape = stacked.shape[1:]

    def rows_of(step: Array, table: Any, lens: Any, limits: Any) -> tuple[Any, ...]:
        last = jnp.maximum(limits[0] - 1, 0) // chunk
        return jnp.minimum(step, last), 0, 0, 0

    spec_rows = pl.BlockSpec((chunk, *row_shape), rows_of)
    in_specs = [spec_rows]
    if spec.sinks:
        s = sinks.astype(jnp.float32).reshape(1, spec.num_heads, 1)
        s = jnp.broadcast_to(_stack(s, spec, heads, width=1), (1, *row_shape[:2], LANES))[0]
        arrays.append(s * LOG2E)
        in_specs.append(pl.BlockSpec(s.shape, lambda *_: (0, 0, 0)))
    arrays.append(block.view(kv_pages))
    in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
    stat = pltpu.VMEM((heads.num_stacks, heads.rows, LANES), jnp.float32)
    kernel = functools.partial(
        _kernel,
        spec=spec,
        heads=heads,
        block=block,
        tiles=tiles,
        chunk=chunk,
        pages_a_row=pages_a_row,
        interpret=backend.interpret,
        packed=layout.kind == "packed",
    )
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(num_rows, chunk),),
            in_specs=in_specs,
            out_specs=spec_rows,
            scratch_shapes=[
                block.buffers,
                pltpu.VMEM((heads.num_stacks, heads.rows, heads.side * width), q.dtype),
                stat,
                stat,
                pltpu.VMEM((heads.num_stacks, heads.rows, heads.side * width), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(stacked.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=64 << 20,
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if backend.interpret else False,
        name="paged_decode",
    )(*scalars, *arrays)
    out = out.reshape(num_rows, -1, group, width)[:, : kv.num_kv_heads, : spec.group]
    first = kv.head_dim if layout.kind == "packed" else 0
    out = out[..., first : first + kv.head_dim]
    return out.reshape(num_rows, spec.num_heads, kv.head_dim)


def _stack(q: Array, spec: AttentionSpec, heads: _Heads, width: int | None = None) -> Array:
    """[B, N, H] -> [B, stacks, rows, W]"""
    width = width or heads.width
    q = q.reshape(q.shape[0], spec.kv.num_kv_heads, spec.group, -1)
    pad = (
        (0, 0),
        (0, heads.num_stacks * heads.side - heads.num_kv_heads),
        (0, heads.group - spec.group),
        (0, width - q.shape[3]),
    )
    return jnp.pad(q, pad).reshape(q.shape[0], heads.num_stacks, heads.rows, width)


def _div(x: Any, by: int) -> Any:
    """x // by of x >= 0."""
    if by & (by - 1) == 0:
        return x >> (by.bit_length() - 1)
    return lax.div(x, by)


def _kernel(
    table_ref,
    lens_ref,
    limits_ref,
    q_ref,
    *refs,
    spec: AttentionSpec,
    heads: _Heads,
    block: PageBlock,
    tiles: DecodeTiles,
    chunk: int,
    pages_a_row: int,
    interpret: bool,
    packed: bool,
):
    sinks_ref = None
    if spec.sinks:
        sinks_ref, *refs = refs
    kv_hbm, out_ref, buffers, qd_ref, top_ref, sum_ref, acc_ref, state_ref, semaphores = refs
    size = block.page_size
    width, side = heads.width, heads.side
    dtype = q_ref.dtype
    step = pl.program_id(0)
    num_rows, first_page_of_layer = limits_ref[0], limits_ref[1]
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def extent(row):
        """first page, number of pages"""
        end = lens_ref[row]
        last = _div(end + (size - 1), size)
        if spec.window is None:
            return 0, last
        first = _div(jnp.maximum(end - spec.window, 0), size)
        return first, last - first

    def start_block(row, index, slot):
        first, count = extent(row)
        first = first + index * block.num_pages
        count = jnp.minimum(count - index * block.num_pages, block.num_pages)
        at = row * pages_a_row + first
        block.start(
            kv_hbm,
            buffers,
            semaphores,
            slot,
            lambda page: first_page_of_layer + table_ref[at + page],
            count,
        )

    @pl.when(step == 0)
    def _():
        state_ref[0] = 0

        @pl.when(num_rows > 0)
        def _():
            start_block(0, 0, 0)

    def load_units(slot, first, count):
        """keys and values by kv head"""
        words: dict[int, list[Array]] = {}

        def row(c):
            word, index = divmod(c, block.packing)
            if word not in words:
                words[word] = block.load(
                    buffers, slot, word, first, count, dtype, interpret=interpret
                )
            return words[word][index]

        return row

    def stack_of(row, stack, what):
        cols = []
        for j in range(side):
            head = min(stack * side + j, heads.num_kv_heads - 1)
            cols.append(row(head if packed else 2 * head + what))
        return cols[0] if side == 1 else jnp.concatenate(cols, axis=1)

    def logits(slot, first, count):
        row = load_units(slot, first, count)
        out = []
        for stack in range(heads.num_stacks):
            k = stack_of(row, stack, 0)
            s = lax.dot_general(
                qd_ref[stack],
                k,
                (((1,), (1,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            out.append(s)
        return out, row

    def softmax(s, seen):
        out = []
        for stack in range(heads.num_stacks):
            x = s[stack]
            if spec.soft_cap is not None:
                x = jnp.tanh(x * (spec.scale / spec.soft_cap)) * (spec.soft_cap * LOG2E)
            else:
                x = x * (spec.scale * LOG2E)
            if seen is not None:
                x = jnp.where(seen, x, NEVER)
            old = top_ref[stack]
            new = jnp.maximum(old, jnp.max(x, axis=1, keepdims=True))
            top_ref[stack] = new
            decay = jnp.exp2(old - new)
            p = jnp.exp2(x - _lanes(new, x.shape[1]))
            total = sum_ref[stack] * decay
            for i in range(0, x.shape[1], LANES):
                total += p[:, i : i + LANES]
            sum_ref[stack] = total
            out.append((p.astype(dtype), decay))
        return out

    def values(weights, row, seen):
        for stack, (p, decay) in enumerate(weights):
            v = stack_of(row, stack, 1)
            if seen is not None:
                v = jnp.where(seen, v, jnp.zeros_like(v))
            pv = jnp.dot(p, v, precision=precision, preferred_element_type=jnp.float32)
            acc_ref[stack] = acc_ref[stack] * _lanes(decay, pv.shape[1]) + pv

    def attend_whole(slot):
        units = range(0, block.num_tokens, tiles.unit)
        pending = logits(slot, 0, tiles.unit)
        for first in units:
            s, row = pending
            if first + tiles.unit < block.num_tokens:
                pending = logits(slot, first + tiles.unit, tiles.unit)
            values(softmax(s, None), row, None)

    def attend_edges(slot, low, high):
        @pl.loop(0, pl.cdiv(high, tiles.edge))
        def _(index):
            first = index * tiles.edge
            s, row = logits(slot, first, tiles.edge)
            at = first + lax.broadcasted_iota(jnp.int32, (1, tiles.edge), 1)
            seen = (at >= low) & (at < high)
            at = first + lax.broadcasted_iota(jnp.int32, (tiles.edge, 1), 0)
            seen_v = (at >= low) & (at < high)
            values(softmax(s, seen), row, seen_v)

    def do_row(local, _):
        row = step * chunk + local
        end = lens_ref[row]
        first_page, num_pages = extent(row)
        num_blocks = _div(num_pages + (block.num_pages - 1), block.num_pages)
        for stack in range(heads.num_stacks):
            x = q_ref[local, stack]
            if side > 1:
                x = jnp.concatenate([x] * side, axis=1)
                at = lax.broadcasted_iota(jnp.int32, x.shape, 0) // heads.group
                col = lax.broadcasted_iota(jnp.int32, x.shape, 1) // width
                x = jnp.where(at == col, x, jnp.zeros_like(x))
            qd_ref[stack] = x
        if sinks_ref is None:
            top_ref[...] = jnp.full_like(top_ref, NEVER)
            sum_ref[...] = jnp.zeros_like(sum_ref)
        else:
            top_ref[...] = sinks_ref[...]
            sum_ref[...] = jnp.full_like(sum_ref, 1 / LANES)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        turn = state_ref[0]

        def do_block(index, _):
            slot = (turn + index) & 1

            @pl.when(index + 1 < num_blocks)
            def _():
                start_block(row, index + 1, 1 - slot)

            @pl.when((index + 1 == num_blocks) & (row + 1 < num_rows))
            def _():
                start_block(row + 1, 0, 1 - slot)

            pages_before = index * block.num_pages
            count = jnp.minimum(num_pages - pages_before, block.num_pages)
            block.wait(kv_hbm, buffers, semaphores, slot, count)
            base = (first_page + pages_before) * size
            high = jnp.minimum(end - base, block.num_tokens)
            low = 0 if spec.window is None else end - spec.window - base
            whole = (low <= 0) & (high == block.num_tokens)

            @pl.when(whole)
            def _():
                attend_whole(slot)

            @pl.when(jnp.logical_not(whole))
            def _():
                attend_edges(slot, low, high)

        lax.fori_loop(0, num_blocks, do_block, None)
        state_ref[0] = (turn + num_blocks) & 1
        for stack in range(heads.num_stacks):
            total = jnp.sum(sum_ref[stack], axis=1, keepdims=True)
            acc = acc_ref[stack]
            x = acc[:, :width]
            at = lax.broadcasted_iota(jnp.int32, x.shape, 0) // heads.group
            for j in range(1, side):
                x = jnp.where(at == j, acc[:, j * width : (j + 1) * width], x)
            out_ref[local, stack] = (x / total).astype(dtype)

    lax.fori_loop(0, jnp.minimum(chunk, num_rows - step * chunk), do_row, None)


def _lanes(x: Array, width: int) -> Array:
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (width // LANES), axis=1)

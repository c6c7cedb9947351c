"""Paged attention of prefill chunks and verify rows for Hopper: TMA page gather, wgmma, in Pallas.

FlashAttention (arXiv 2205.14135, 2307.08691) with Hopper's division of labour (FlashAttention-3,
arXiv 2407.08608), over pages (PagedAttention, arXiv 2309.06180). A thread block is one warpgroup
that loads and two that compute, and stays on its multiprocessor for the whole call: it works
through its share of a list of items, while the loads of the next item run ahead.

An *item* is a tile of one row's consecutive tokens and some query heads of one kv head: all of the
group's, where they fit. Tokens and heads together fill the 64 query rows of each computing
warpgroup, heads outermost, so that short chunks fill a tile too and a block of keys and values is
loaded once for the group. Tiles start at multiples of 8 tokens of the batch, because TMA and the
swizzle of shared memory want it so: a row's first tile may begin with up to 7 tokens of the row
before, and its last may end with some of the row after. They are computed and not written; what is
written is whole groups of 8 tokens through the swizzled tile, and the rest token by token.

The two computing warpgroups take turns on the tensor cores: one multiplies while the other does
softmax. Blocks of KV that every query of the tile sees whole are computed without masks. Logits are
in base 2, with the scale folded in.

Values of positions that no query of the tile may see are zeroed in shared memory before they are
multiplied (0 * NaN is NaN): after the context's end, and before the window. Only the first and last
block of an item can hold such.

A block of an 8-bit cache comes to shared memory as it is stored. The warpgroup that loads, which
has time, widens it to operands of 16 bits (`gpu_widen`), the keys while the values come.

The list of items, longest first, is `gpu_tiles`'s.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import tuning
from pallas_kernels.backend import Backend
from pallas_kernels.gpu_split import num_multiprocessors
from pallas_kernels.gpu_tiles import (
    ALIGN,
    TILE_ROWS,
    Packing,
    PrefillTiles,
    box_of,
    packing_of,
    plan_prefill,
)
from pallas_kernels.gpu_widen import (
    DTYPES,
    as_operand,
    hopper_operand_dtype,
    widen_for_wgmma,
    widens,
)
from pallas_kernels.types import AttentionSpec, PageMetadata

_LOG2E = math.log2(math.e)
_LEAST = -1e30  # where a row's largest logit starts: finite, so that nothing seen yet gives no NaN
_WGMMA_ROWS = 64
_NUM_WARPGROUPS = TILE_ROWS // _WGMMA_ROWS  # that compute
_ROWS = plgpu.Layout.WGMMA.reduce(1)  # of a vector over the rows of an accumulator
_DTYPES = ("bfloat16", "float16", *DTYPES)
_HEAD_DIMS = (64, 80, 96, 128, 256)
_WIDENED_HEAD_DIMS = (64, 96, 128)  # more do not fit shared memory beside what they become
_WIDEN_COLUMNS = 64  # at a time: the registers of the warpgroup that loads are few


def why_not_prefill(spec: AttentionSpec) -> str | None:
    """Why the kernel cannot run this kind of layer on Hopper, or None if it can."""
    kv = spec.kv
    dtype = jnp.dtype(kv.dtype).name
    if kv.kind != "heads":
        return f"the prefill kernel has no {kv.kind} cache"
    if dtype not in _DTYPES:
        return f"the prefill kernel reads pages of {', '.join(_DTYPES)}, not {dtype}"
    head_dims = _WIDENED_HEAD_DIMS if widens(dtype) else _HEAD_DIMS
    if kv.head_dim not in head_dims:
        return f"head_dim={kv.head_dim} is none of {head_dims} with {dtype} pages"
    if kv.page_size % ALIGN or not 8 <= kv.page_size <= 128:
        return f"page_size={kv.page_size} is not a multiple of {ALIGN} up to 128"
    if spec.scale <= 0:
        return f"scale={spec.scale} is not positive"
    return None


def prefill_tiles(spec: AttentionSpec, *, num_workers: int) -> PrefillTiles:
    """Tiles that fit shared memory."""
    head_dim, is_wide = spec.kv.head_dim, widens(spec.kv.dtype)
    return PrefillTiles(
        block_kv=128 if head_dim <= 128 else 64,
        num_stages=2 if head_dim > 64 else 4,
        num_slots=2 if head_dim <= (96 if is_wide else 128) else 1,
        num_workers=num_workers,
    )


def _registers(spec: AttentionSpec) -> tuple[int, int]:
    """Of a thread that computes, and of one that loads: 504 in all, three times a kernel's 168."""
    return (216, 72) if spec.kv.head_dim <= 128 else (232, 40)


def attend_prefill(
    q: Array,  # [T, N, H]
    out: Array,  # [T, N, H]: with the decode rows' results in their tokens
    kv_pages: Array,  # [L * num_pages, page_size, 2K, H]
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N] float32
    tiles: PrefillTiles | None = None,  # None: what `tuning` has for the chip
    interpret: Any = None,  # of plgpu.kernel; None: as `backend` says
) -> Array:
    """`out` with the attention of all rows but decode rows, and zeros for padding tokens.

    Every token from `num_decode_rows` on is written, so what `out` holds there does not matter. It
    is updated in place where nothing else needs it.
    """
    num_tokens, dtype = q.shape[0], hopper_operand_dtype(spec.kv.dtype, q.dtype)
    if num_tokens % ALIGN or q.dtype != dtype:
        more = ((0, -num_tokens % ALIGN), (0, 0), (0, 0))  # a bucket of 1, 2 or 4 tokens
        padded = attend_prefill(
            jnp.pad(as_operand(q, dtype), more),
            jnp.pad(as_operand(out, dtype), more),
            kv_pages,
            pages,
            layer,
            spec=spec,
            backend=backend,
            sinks=sinks,
            tiles=tiles,
            interpret=interpret,
        )
        return padded[:num_tokens].astype(q.dtype)
    if tiles is None:
        # The interpreter is slow.
        num_workers = 2 if backend.interpret else num_multiprocessors(backend.chip)
        guess = prefill_tiles(spec, num_workers=num_workers)
        tiles = tuning.tiles("gpu_prefill", backend.chip, tuning.attention_key(spec), guess)
    if interpret is None and backend.interpret:
        interpret = plgpu.InterpretGPUParams()
    packing = packing_of(spec.group)
    plan = plan_prefill(pages, spec=spec, tiles=tiles, num_tokens=num_tokens)
    first_page = (jnp.asarray(layer, jnp.int32) * pages.num_pages).reshape(1)
    result = jax.new_ref(out)
    kernel = functools.partial(
        _kernel,
        spec=spec,
        tiles=tiles,
        packing=packing,
        interpret=interpret is not None,
    )
    operands = [q, kv_pages, pages.page_table, plan.tiles, plan.num_tiles, first_page]
    if spec.sinks:
        if sinks is None:
            raise ValueError("attend_prefill: spec has sinks, but none are given")
        operands.append(_sink_rows(sinks, spec, packing))
    plgpu.kernel(
        kernel,
        out_type=(),
        grid=(tiles.num_workers,),
        grid_names=("worker",),
        num_threads=_NUM_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(spec, tiles, packing, q.dtype, interpret=interpret is not None),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_prefill",
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands, result)
    return jax.freeze(result)


def _sink_rows(sinks: Array, spec: AttentionSpec, packing: Packing) -> Array:
    """The sinks in base 2, each at the rows of its head: [units, warpgroups, 64]."""
    rows = jnp.repeat(sinks.astype(jnp.float32) * _LOG2E, packing.tokens)
    rows = rows.reshape(spec.num_heads // packing.heads, packing.heads * packing.tokens)
    rows = jnp.pad(rows, ((0, 0), (0, TILE_ROWS - rows.shape[1])))
    return rows.reshape(-1, _NUM_WARPGROUPS, _WGMMA_ROWS)


def _columns(head_dim: int) -> int:
    """Columns of a swizzled tile of 16-bit values."""
    return next(columns for columns in (64, 32, 16) if head_dim % columns == 0)


def _swizzled(head_dim: int, itemsize: int = 2) -> tuple[Any, ...]:
    """The layout of a [rows, head_dim] matrix that TMA and wgmma share, or TMA and threads."""
    columns = _columns(head_dim)
    tiling = plgpu.TilingTransform((ALIGN, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(itemsize * columns)  # pyright: ignore[reportAbstractUsage]
    return tiling, swizzle


def _scratch(
    spec: AttentionSpec,
    tiles: PrefillTiles,
    packing: Packing,
    dtype: Any,
    *,
    interpret: bool,
) -> dict[str, Any]:
    """Shared memory and barriers."""
    head_dim = spec.kv.head_dim
    tiled = _swizzled(head_dim)
    stages = tiles.num_stages
    copies = tiles.block_kv // box_of(spec, tiles)
    is_wide = widens(spec.kv.dtype)
    arrivals = 1 if is_wide else copies  # at a stage, of the loading warpgroup or of TMA
    q_shape = (tiles.num_slots, _NUM_WARPGROUPS, _WGMMA_ROWS, head_dim)
    kv_shape = (stages, tiles.block_kv, head_dim)
    scratch = {
        "q_smem": plgpu.SMEM(q_shape, dtype, transforms=tiled),
        "k_smem": plgpu.SMEM(kv_shape, dtype, transforms=tiled),
        "v_smem": plgpu.SMEM(kv_shape, dtype, transforms=tiled),
        "token_smem": plgpu.SMEM((_NUM_WARPGROUPS, _WGMMA_ROWS, 64), dtype),
        "q_full": plgpu.Barrier(num_arrivals=packing.groups, num_barriers=tiles.num_slots),
        "q_free": plgpu.Barrier(num_arrivals=_NUM_WARPGROUPS, num_barriers=tiles.num_slots),
        "k_full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=_NUM_WARPGROUPS, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=_NUM_WARPGROUPS, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=_NUM_WARPGROUPS),
    }
    if is_wide:
        stored = plgpu.SMEM(kv_shape[1:], spec.kv.dtype, transforms=_swizzled(head_dim, itemsize=1))
        scratch |= {"k_stored": stored, "v_stored": stored}
        scratch |= {name: plgpu.Barrier(num_arrivals=copies) for name in ("k_come", "v_come")}
    else:
        scratch["v_edge"] = plgpu.Barrier(num_arrivals=copies)
    if interpret:
        shape = (_NUM_WARPGROUPS, _WGMMA_ROWS, tiles.block_kv)
        scratch["p_smem"] = plgpu.SMEM(shape, dtype, transforms=_swizzled(64))
    return scratch


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """Shared memory and barriers of a thread block, as `_scratch` describes them."""

    q_smem: Any
    k_smem: Any
    v_smem: Any
    token_smem: Any
    q_full: Any
    q_free: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any
    v_edge: Any = None
    k_stored: Any = None  # of an 8-bit cache: a block as TMA brings it, and the barriers for that
    v_stored: Any = None
    k_come: Any = None
    v_come: Any = None
    p_smem: Any = None  # in the interpreter


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One tile and one unit of query heads, as scalars in registers."""

    unit: Any  # query heads unit * heads .. + heads, of one kv head
    row: Any  # of the page table
    base: Any  # first token of the tile, a multiple of 8
    first: Any  # first token that is the row's own
    last: Any  # and the one after the last
    position: Any  # in the row's context, of token `base`
    start: Any  # position where its blocks start
    kv_len: Any
    blocks: Any


def _for_each_item(
    worker: Any, num_items: Any, tiles_ref: Any, units: int, num_workers: int, visit: Callable
) -> tuple[Any, Any]:
    """visit(item, blocks before it, items before it) for each item of a worker's share.

    Returns how many blocks and items there were.

    Items are dealt out back and forth, so that shares of a falling list are about equal.
    """

    def step(turn: Any, before: tuple[Any, Any]) -> tuple[Any, Any]:
        blocks, items = before
        place = jnp.where(lax.rem(turn, 2) == 0, worker, num_workers - 1 - worker)
        index = turn * num_workers + place
        in_use = index < num_items
        index = jnp.where(in_use, index, 0)
        tile, unit = lax.div(index, units), lax.rem(index, units)
        row, base, first, last, position, start, kv_len, num = (
            tiles_ref[tile, column] for column in range(8)
        )
        item = _Item(
            unit=unit,
            row=row,
            base=base,
            first=first,
            last=last,
            position=position,
            start=start,
            kv_len=kv_len,
            blocks=num,
        )
        pl.when(in_use)(lambda: visit(item, blocks, items))
        return blocks + jnp.where(in_use, num, 0), items + in_use.astype(jnp.int32)

    turns = lax.div(num_items + (num_workers - 1), num_workers)
    return lax.fori_loop(0, turns, step, (jnp.int32(0), jnp.int32(0)))


def _kernel(
    q_ref: Any,  # [T, N, H]
    kv_ref: Any,  # [L * num_pages, page_size, 2K, H]
    table_ref: Any,  # [B, P]
    tiles_ref: Any,  # [W, 8]
    num_tiles_ref: Any,  # [1]
    first_page_ref: Any,  # [1]
    *refs: Any,  # sink rows [units, warpgroups, 64], if there are any; out [T, N, H]
    spec: AttentionSpec,
    tiles: PrefillTiles,
    packing: Packing,
    interpret: bool,
    **scratch: Any,
) -> None:
    """What a thread block does in a call."""
    *sink_refs, out_ref = refs
    shared = _Shared(**scratch)
    units = spec.num_heads // packing.heads
    warpgroup = lax.axis_index("warpgroup")
    computing_registers, loading_registers = _registers(spec)
    for_each_item = functools.partial(
        _for_each_item,
        lax.axis_index("worker"),
        num_tiles_ref[0] * units,
        tiles_ref,
        units,
        tiles.num_workers,
    )

    @pl.when(warpgroup == _NUM_WARPGROUPS)
    def _loads() -> None:
        plgpu.set_max_registers(loading_registers, action="decrease")
        load_item = functools.partial(
            _load_item,
            q_ref,
            kv_ref,
            table_ref,
            first_page_ref[0],
            shared,
            spec=spec,
            tiles=tiles,
            packing=packing,
        )
        num_blocks, num_loaded = for_each_item(load_item)
        # Whoever waits at a barrier sees all of its phases.
        for stage in range(tiles.num_stages):

            @pl.when(stage < num_blocks)
            def _(stage: int = stage) -> None:
                plgpu.barrier_wait(shared.k_free.at[stage])
                plgpu.barrier_wait(shared.v_free.at[stage])

        for slot in range(tiles.num_slots):

            @pl.when(slot < num_loaded)
            def _(slot: int = slot) -> None:
                plgpu.barrier_wait(shared.q_free.at[slot])

    @pl.when(warpgroup < _NUM_WARPGROUPS)
    def _computes() -> None:
        plgpu.set_max_registers(computing_registers, action="increase")
        compute_item = functools.partial(
            _compute_item,
            warpgroup,
            sink_refs[0] if sink_refs else None,
            out_ref,
            shared,
            spec=spec,
            tiles=tiles,
            packing=packing,
            interpret=interpret,
        )
        for_each_item(compute_item)
        plgpu.wait_smem_to_gmem(0)


def _first_seen(item: _Item, spec: AttentionSpec) -> Any:
    """The first position that the tile's first own query sees."""
    if spec.window is None:
        return jnp.int32(0)
    return jnp.maximum(item.position + (item.first - item.base) - (spec.window - 1), 0)


def _load_item(
    q_ref: Any,
    kv_ref: Any,
    table_ref: Any,
    first_page: Any,
    shared: _Shared,
    item: _Item,
    blocks_before: Any,
    items_before: Any,
    *,
    spec: AttentionSpec,
    tiles: PrefillTiles,
    packing: Packing,
) -> None:
    """Bring an item's queries, keys and values to shared memory, as far ahead as it has room."""
    page_size, block_kv, stages = spec.kv.page_size, tiles.block_kv, tiles.num_stages
    box = box_of(spec, tiles)
    copies = block_kv // box
    kv_head = lax.div(item.unit, jnp.int32(spec.group // packing.heads))
    first_seen = _first_seen(item, spec)

    slot = lax.rem(items_before, jnp.int32(tiles.num_slots))

    @pl.when(items_before >= tiles.num_slots)
    def _() -> None:
        plgpu.barrier_wait(shared.q_free.at[slot])

    for group in range(packing.groups):
        head, token = divmod(group * ALIGN, packing.tokens)
        tokens = pl.ds(
            pl.multiple_of(item.base + token, ALIGN), ALIGN
        )  # past the last token TMA fills in zeros
        rows = pl.ds(group * ALIGN % _WGMMA_ROWS, ALIGN)
        target = shared.q_smem.at[slot, group * ALIGN // _WGMMA_ROWS, rows]
        source = q_ref.at[tokens, item.unit * packing.heads + head]
        plgpu.copy_gmem_to_smem(source, target, shared.q_full.at[slot])

    def load(target: Any, start: Any, *, channel: Any, full: Any) -> None:
        """Ask for the block of keys or values from position `start` on: [block_kv, H]."""
        places = []  # looked up for keys and for values: registers are few, the cache is near
        for copy in range(copies):
            # Past the context's end the last page is read again: what it holds is not seen.
            position = start + copy * box
            index = lax.div(jnp.minimum(position, item.kv_len - 1), jnp.int32(page_size))
            places.append((table_ref[item.row, index], position))
        for copy, (page, position) in enumerate(places):
            source = kv_ref.at[first_page + page, :, channel]
            if box < page_size:
                offset = pl.multiple_of(lax.rem(position, jnp.int32(page_size)), ALIGN)
                source = kv_ref.at[first_page + page, pl.ds(offset, box), channel]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(copy * box, box)], full)

    load_keys = functools.partial(load, channel=2 * kv_head)
    load_values = functools.partial(load, channel=2 * kv_head + 1)

    def widen(stored: Any, come: Any, wide: Any) -> None:
        plgpu.barrier_wait(come)
        columns = math.gcd(_WIDEN_COLUMNS, spec.kv.head_dim)
        widen_for_wgmma(stored, wide, rows=_WGMMA_ROWS, columns=columns)
        plgpu.commit_smem()  # before wgmma reads it, and before TMA writes where it was read

    if shared.k_stored is not None:

        @pl.when(item.blocks > 0)
        def _() -> None:
            load_keys(shared.k_stored, item.start, full=shared.k_come)
            load_values(shared.v_stored, item.start, full=shared.v_come)

    @pl.loop(0, item.blocks)
    def _(block: Any) -> None:
        step = blocks_before + block
        stage = lax.rem(step, jnp.int32(stages))
        start = item.start + block * block_kv
        keys, values = shared.k_smem.at[stage], shared.v_smem.at[stage]
        is_edge = (start + block_kv > item.kv_len) | (start < first_seen)

        def forget() -> None:
            _forget(values, first_seen - start, item.kv_len - start)
            plgpu.commit_smem()

        @pl.when(step >= stages)
        def _() -> None:
            plgpu.barrier_wait(shared.k_free.at[stage])

        if shared.k_stored is None:
            load_keys(keys, start, full=shared.k_full.at[stage])
        else:
            widen(shared.k_stored, shared.k_come, keys)
            plgpu.barrier_arrive(shared.k_full.at[stage])

            @pl.when(block + 1 < item.blocks)
            def _() -> None:
                load_keys(shared.k_stored, start + block_kv, full=shared.k_come)

        @pl.when(step >= stages)
        def _() -> None:
            plgpu.barrier_wait(shared.v_free.at[stage])

        if shared.v_stored is not None:
            widen(shared.v_stored, shared.v_come, values)
            pl.when(is_edge)(forget)
            plgpu.barrier_arrive(shared.v_full.at[stage])

            @pl.when(block + 1 < item.blocks)
            def _() -> None:
                load_values(shared.v_stored, start + block_kv, full=shared.v_come)

            return

        @pl.when(jnp.logical_not(is_edge))
        def _() -> None:
            load_values(values, start, full=shared.v_full.at[stage])

        @pl.when(is_edge)
        def _() -> None:
            load_values(values, start, full=shared.v_edge)
            plgpu.barrier_wait(shared.v_edge)
            forget()
            for _ in range(copies):
                plgpu.barrier_arrive(shared.v_full.at[stage])


def _forget(values: Any, begin: Any, end: Any) -> None:
    """Zero the values [block_kv, H] that lie before `begin` or from `end` on."""
    rows, columns = values.shape
    width = _columns(columns)
    shape = (_WGMMA_ROWS, width)
    for row in range(0, rows, _WGMMA_ROWS):
        place = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + row
        seen = (place >= begin) & (place < end)
        for column in range(0, columns, width):
            piece = values.at[pl.ds(row, _WGMMA_ROWS), pl.ds(column, width)]
            kept = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
            piece[...] = jnp.where(seen, kept, jnp.zeros_like(kept))


def _take_turn(shared: _Shared) -> None:
    """Wait for the other computing warpgroup to come by, too."""
    plgpu.barrier_arrive(shared.turn)
    plgpu.barrier_wait(shared.turn)


def _compute_item(
    warpgroup: Any,
    sinks_ref: Any,
    out_ref: Any,
    shared: _Shared,
    item: _Item,
    blocks_before: Any,
    items_before: Any,
    *,
    spec: AttentionSpec,
    tiles: PrefillTiles,
    packing: Packing,
    interpret: bool,
) -> None:
    """One warpgroup's 64 rows of an item."""
    block_kv, head_dim = tiles.block_kv, spec.kv.head_dim
    blocks = item.blocks
    slot = lax.rem(items_before, jnp.int32(tiles.num_slots))
    queries = shared.q_smem.at[slot, warpgroup]
    plgpu.barrier_wait(shared.q_full.at[slot])
    # The second warpgroup is half a block behind the first, within an item: its last turn must not
    # need the first one's next item, whose queries come when both are done with these.
    pl.when(warpgroup == 1)(lambda: _take_turn(shared))
    first_position = item.position + (item.first - item.base)
    last_position = item.position + (item.last - item.base) - 1
    # Other rows' tokens see what the nearest one of this row does, so that they are finite.
    positions = _tokens_of_rows(warpgroup, packing) + item.position
    positions = jnp.clip(positions, first_position, last_position)
    advance = functools.partial(
        _advance,
        warpgroup,
        shared,
        queries,
        item,
        blocks_before,
        positions,
        spec=spec,
        tiles=tiles,
        interpret=interpret,
    )

    def in_rows(value: float) -> Any:
        return plgpu.layout_cast(jnp.full((_WGMMA_ROWS,), value, jnp.float32), _ROWS)

    zeros = jnp.zeros((_WGMMA_ROWS, head_dim), jnp.float32)
    state = (plgpu.layout_cast(zeros, plgpu.Layout.WGMMA), in_rows(_LEAST), in_rows(0.0))
    if sinks_ref is not None:
        sink = plgpu.load(sinks_ref.at[item.unit, warpgroup], layout=_ROWS, optimized=False)
        state = (state[0], sink, in_rows(1.0))
    # Blocks [open_begin, open_end) are seen whole by every query of the row in this tile.
    seen_by_first = first_position + 1 - item.start
    open_end = jnp.clip(lax.div(seen_by_first, jnp.int32(block_kv)), 0, blocks)
    open_begin = jnp.int32(0)
    if spec.window is not None:
        unseen_by_last = jnp.maximum(last_position - (spec.window - 1) - item.start, 0)
        open_begin = lax.div(unseen_by_last + (block_kv - 1), jnp.int32(block_kv))
        open_begin = jnp.minimum(open_begin, blocks)
        open_end = jnp.maximum(open_begin, open_end)
        masked = functools.partial(advance, masked=True)
        state = lax.fori_loop(0, open_begin, masked, state)
    state = lax.fori_loop(open_begin, open_end, functools.partial(advance, masked=False), state)
    state = lax.fori_loop(open_end, blocks, functools.partial(advance, masked=True), state)

    pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(shared.turn))

    acc, _, total = state
    # Only padding saw nothing.
    share = 1.0 / jnp.maximum(total, 1e-30)
    result = (acc * lax.broadcast_in_dim(share, acc.shape, [0])).astype(out_ref.dtype)
    # The tile of queries is done with, and takes the result.
    _write(warpgroup, result, out_ref, queries, shared, item, packing=packing)
    plgpu.barrier_arrive(shared.q_free.at[slot])
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(shared.turn))


def _tokens_of_rows(warpgroup: Any, packing: Packing) -> Any:
    """Which token of the tile each of the warpgroup's rows is of: [64]."""
    row = plgpu.broadcasted_iota(jnp.int32, (_WGMMA_ROWS,), 0, layout=_ROWS)
    row = row + warpgroup * _WGMMA_ROWS
    if packing.tokens & (packing.tokens - 1) == 0:
        return row & (packing.tokens - 1)
    return lax.rem(row, jnp.full_like(row, packing.tokens))


def _advance(
    warpgroup: Any,
    shared: _Shared,
    queries: Any,  # [64, H], in shared memory
    item: _Item,
    blocks_before: Any,
    positions: Any,  # [64]: of the rows' tokens
    block: Any,
    state: tuple[Any, Any, Any],  # acc [64, H], largest logit [64], sum of exp2 [64]; float32
    *,
    spec: AttentionSpec,
    tiles: PrefillTiles,
    interpret: bool,
    masked: bool,
) -> tuple[Any, Any, Any]:
    """The online softmax's state after one more block of KV."""
    acc, top, total = state
    stage = lax.rem(blocks_before + block, jnp.int32(tiles.num_stages))
    shape = (_WGMMA_ROWS, tiles.block_kv)
    dtype = queries.dtype
    plgpu.barrier_wait(shared.k_full.at[stage])

    keys = shared.k_smem.at[stage].transpose((1, 0))
    if interpret:
        logits = _multiply(queries, keys)
        _take_turn(shared)
    else:

        def multiply_keys(logits_ref: Any) -> Any:
            plgpu.wgmma(logits_ref, queries, keys)
            _take_turn(shared)  # the tensor cores are the other's, once this is through
            return logits_ref[...]

        logits = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    plgpu.barrier_arrive(shared.k_free.at[stage])

    factor = spec.scale * _LOG2E  # what takes logits to base 2
    if spec.soft_cap is not None:
        logits = jnp.tanh(logits * (spec.scale / spec.soft_cap))
        factor = spec.soft_cap * _LOG2E
    if masked:
        start = item.start + block * tiles.block_kv
        place = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        seen = place <= lax.broadcast_in_dim(positions - start, shape, [0])
        if spec.window is not None:
            unseen = positions - (start + spec.window)
            seen &= place > lax.broadcast_in_dim(unseen, shape, [0])
        logits = jnp.where(seen, logits, -jnp.inf)
    new_top = jnp.maximum(top, logits.max(axis=1) * factor)
    weights = jnp.exp2(logits * factor - lax.broadcast_in_dim(new_top, shape, [0]))
    decay = jnp.exp2(top - new_top)
    total = total * decay + weights.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
    weights = weights.astype(dtype)

    if interpret:  # which knows no wgmma with an operand in registers
        shared.p_smem[warpgroup] = weights
        plgpu.commit_smem()
        _take_turn(shared)
        plgpu.barrier_wait(shared.v_full.at[stage])
        acc = acc + _multiply(shared.p_smem.at[warpgroup], shared.v_smem.at[stage])
    else:
        acc, total, new_top, weights = lax.optimization_barrier((acc, total, new_top, weights))
        plgpu.barrier_arrive(shared.turn)
        plgpu.barrier_wait(shared.v_full.at[stage])
        plgpu.barrier_wait(shared.turn)

        def add_values(acc_ref: Any) -> None:
            plgpu.wgmma(acc_ref, weights, shared.v_smem.at[stage])

        acc = pl.run_state(add_values)(plgpu.WGMMAAccumulatorRef.init(acc))
    plgpu.barrier_arrive(shared.v_free.at[stage])
    return acc, new_top, total


def _multiply(a: Any, b: Any) -> Any:
    """a @ b of shared memory, in the interpreter."""

    def multiply(acc_ref: Any) -> Any:
        plgpu.wgmma(acc_ref, a, b)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def _write(
    warpgroup: Any,
    result: Any,
    out_ref: Any,
    tile: Any,  # [64, H], in shared memory
    shared: _Shared,
    item: _Item,
    *,
    packing: Packing,
) -> None:
    """Write the tokens that are the item's own: [64, H] to rows of out [T, N, H]."""
    tile[...] = result
    plgpu.commit_smem()

    def place(row: Any) -> tuple[Any, Any]:  # of 64: token, query head
        row = row + warpgroup * _WGMMA_ROWS
        head = lax.div(row, jnp.int32(packing.tokens))
        return item.base + (row - head * packing.tokens), item.unit * packing.heads + head

    groups_before = warpgroup * (_WGMMA_ROWS // ALIGN)
    num_groups = jnp.clip(packing.groups - groups_before, 0, _WGMMA_ROWS // ALIGN)

    @pl.loop(0, num_groups)
    def _(group: Any) -> None:
        row = pl.multiple_of(group * ALIGN, ALIGN)
        token, head = place(row)

        @pl.when((token >= item.first) & (token + ALIGN <= item.last))
        def _() -> None:
            tokens = pl.ds(pl.multiple_of(token, ALIGN), ALIGN)
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(row, ALIGN)], out_ref.at[tokens, head])

    # Groups of 8 tokens that other rows have a part in: each token by itself.
    whole_begin = item.base + _up(item.first - item.base, ALIGN)
    whole_end = item.base + lax.div(item.last - item.base, jnp.int32(ALIGN)) * ALIGN

    @pl.when((item.first < whole_begin) | (whole_end < item.last))
    def _() -> None:
        width = _columns(result.shape[1])
        staged = shared.token_smem.at[warpgroup, :, pl.ds(0, width)]

        def write_columns(column: int) -> None:
            staged[...] = result[:, column : column + width]
            plgpu.commit_smem()

            @pl.loop(0, num_groups * ALIGN)
            def _(row: Any) -> None:
                token, head = place(row)
                is_own = (token >= item.first) & (token < item.last)
                is_whole = (token >= whole_begin) & (token < whole_end)

                @pl.when(is_own & jnp.logical_not(is_whole))
                def _() -> None:
                    source = shared.token_smem.at[warpgroup, pl.ds(row, 1), pl.ds(0, width)]
                    target = out_ref.at[pl.ds(token, 1), head, pl.ds(column, width)]
                    plgpu.copy_smem_to_gmem(source, target)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        for column in range(0, result.shape[1], width):
            write_columns(column)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _up(size: Any, multiple: int) -> Any:
    return lax.div(size + (multiple - 1), jnp.int32(multiple)) * multiple

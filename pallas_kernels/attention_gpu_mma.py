"""Paged attention for NVIDIA GPUs by `mma.sync`, in Pallas Mosaic GPU: Ampere, Ada and Blackwell.

One kernel text serves decode, verify and prefill rows. The queries of a batch are cut into tiles of
one row's consecutive tokens, all the query heads of one kv head together: M = tokens x group rows of
an `mma`. A block of threads (one warpgroup) takes one tile, one kv head and one share of the
context, streams the pages of that share through shared memory in several stages, and keeps a
running softmax (FlashAttention-2, arXiv 2307.08691). Small batches cut the context into shares that
are merged afterwards (Flash-Decoding). A page is found through the page table, read where it lies
(PagedAttention, arXiv 2309.06180); nothing is gathered beforehand and the cache is never copied.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.backend import Backend
from pallas_kernels.chips import Chip
from pallas_kernels.types import AttentionSpec, PageMetadata

_LOG2E = math.log2(math.e)
_NEVER = -1e30  # the logit of what is not seen; finite: no NaN comes of it
_LEAST = -1e29  # where the largest logit starts: so far above _NEVER that exp2 gives zero


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one block of threads works. Static."""

    rows: int  # M: 16, 32 or 64 query rows; the warps split what rows leave: 16 x 4, 32 x 2, 64 x 1
    block_kv: int  # kv tokens a step
    num_stages: int  # blocks in shared memory at a time
    part_masks: bool  # run blocks that every query sees whole in a loop without masks

    @property
    def m_warps(self) -> int:
        return self.rows // 16

    @property
    def columns(self) -> int:
        """Of a block that are worked on at a time: the least that all warps have a part in."""
        return max(16, 8 * 4 // self.m_warps)


class _Plan(NamedTuple):
    """The tiles of a batch, W of them, and where each token's result will be."""

    items: Array  # [W, 4] int32: row, position of the first query, end of the context, first page
    first_tokens: Array  # [W] int32: the token of each tile's first query
    tile_of: Array  # [T] int32
    offset_of: Array  # [T] int32: which of its tile's tokens
    in_use: Array  # [T] bool


def _plan(
    pages: PageMetadata, first_page: Array, in_rows: Array, *, num_tokens: int, tile_tokens: int
) -> _Plan:
    """Tiles of up to `tile_tokens` queries of the rows that `in_rows [B]` names."""
    starts = pages.query_starts
    num_queries = jnp.where(in_rows, starts[1:] - starts[:-1], 0)  # [B]
    num_rows = num_queries.shape[0]
    ends = jnp.cumsum((num_queries + tile_tokens - 1) // tile_tokens)  # [B] in the list of tiles
    num_tiles = min(num_tokens, num_rows + num_tokens // tile_tokens)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    row = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
    valid = row < num_rows
    row = jnp.minimum(row, num_rows - 1)
    first_of_row = ends - (num_queries + tile_tokens - 1) // tile_tokens
    done = (tile - first_of_row[row]) * tile_tokens  # the row's queries in the tiles before
    first_position = pages.kv_lens[row] - num_queries[row] + done
    end = first_position + jnp.minimum(num_queries[row] - done, tile_tokens)
    fields = (
        row,
        first_position,
        jnp.where(valid, end, 0),
        jnp.broadcast_to(first_page, (num_tiles,)),
    )
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row_of = (
        jnp.searchsorted(starts, token, side="right", method="compare_all").astype(jnp.int32) - 1
    )
    in_use = row_of < num_rows
    row_of = jnp.minimum(row_of, num_rows - 1)
    before = token - starts[row_of]
    return _Plan(
        items=jnp.stack(fields, axis=1),
        first_tokens=jnp.where(valid, starts[row] + done, 0),
        tile_of=first_of_row[row_of] + before // tile_tokens,
        offset_of=before % tile_tokens,
        in_use=in_use & in_rows[row_of],
    )


def _kernel(
    q_ref: Any,  # [W, K, M, H]
    kv_ref: Any,  # [L * num_pages * pieces, piece, 2K * H]: pages, or pieces of large ones
    items_ref: Any,  # [W, 4]
    table_ref: Any,  # [B, P]
    out_ref: Any,  # [W, K, S, M, H]
    lse_ref: Any,  # [W, K, S, M]: log2 of the softmax's denominator
    kv_smem: Any,  # [stages, block_kv, 2H]
    p_smem: Any,  # [pieces, M, columns], where several warps share rows
    *barriers: Any,  # [stages], where copies are TMA's
    spec: AttentionSpec,
    tile: Tile,
    interpret: bool,
) -> None:
    """One tile's queries against one share of their context, for one kv head."""
    head_dim, group = spec.kv.head_dim, spec.group
    block_kv, num_stages, rows = tile.block_kv, tile.num_stages, tile.rows
    piece = kv_ref.shape[1]
    num_copies = block_kv // piece  # a block
    pieces = spec.kv.page_size // piece  # a page
    columns = tile.columns
    dtype = q_ref.dtype
    acc = plgpu.Layout.MMA_ACC(dtype, m_warps=tile.m_warps)
    lhs = plgpu.Layout.MMA_LHS(dtype, m_warps=tile.m_warps)
    rhs = plgpu.Layout.MMA_RHS(dtype, m_warps=tile.m_warps)

    def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def iota(num_rows: int, num_columns: int, axis: int, layout: Any) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, (num_rows, num_columns), axis, layout=layout)

    def spread(x: Array, num_columns: int) -> Array:  # [M] -> [M, num_columns]
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (rows, num_columns), [0]), acc)

    def dot(c: Array, a: Array, b: Array) -> Array:
        if interpret:  # which knows no mma
            return c + jnp.dot(a, b, preferred_element_type=jnp.float32)
        return plgpu.mma(c, a, b)

    item, head, share = (lax.axis_index(name) for name in ("tile", "head", "share"))
    row, position, end, first_page = (items_ref[item, field] for field in range(4))
    window = spec.window
    least = jnp.int32(0) if window is None else jnp.maximum(position - (window - 1), 0)
    first_block = lax.div(least, jnp.int32(block_kv))
    end_block = lax.div(end + (block_kv - 1), jnp.int32(block_kv))
    num_shares = out_ref.shape[2]
    if num_shares > 1:
        blocks = lax.div(end_block - first_block + (num_shares - 1), jnp.int32(num_shares))
        first_block = first_block + share * blocks
        end_block = jnp.minimum(first_block + blocks, end_block)

    def start(block: Array, stage: Array) -> None:
        """Ask for a block's keys and values."""
        where = []
        for copy in range(num_copies):  # read all of the table first: the copies are fences
            index = block * num_copies + copy
            entry = jnp.minimum(lax.div(index, jnp.int32(pieces)), table_ref.shape[1] - 1)
            page = (first_page + table_ref[row, entry]) * pieces
            where.append(page if pieces == 1 else page + lax.rem(index, jnp.int32(pieces)))
        for copy, page in enumerate(where):
            plgpu.copy_gmem_to_smem(
                kv_ref.at[page, :, pl.ds(head * (2 * head_dim), 2 * head_dim)],
                kv_smem.at[stage, pl.ds(copy * piece, piece)],
                *(each.at[stage] for each in barriers),
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )

    def wait(block: Array, stage: Array) -> None:
        """Wait for a block that was asked for."""
        if barriers:
            plgpu.barrier_wait(barriers[0].at[stage])
            return
        if num_stages == 2:
            plgpu.wait_gmem_to_smem(0)
        else:  # the count is of copies and must be a constant
            more = block + (num_stages - 2) < end_block

            @pl.when(more)
            def _() -> None:
                plgpu.wait_gmem_to_smem((num_stages - 2) * num_copies)

            @pl.when(jnp.logical_not(more))
            def _() -> None:
                plgpu.wait_gmem_to_smem(0)

        _sync()  # a thread waits for its own copies only

    q = plgpu.load(q_ref.at[item, head], layout=lhs, optimized=False)  # [M, H]
    at = position + lax.div(iota(rows, columns, 0, acc), jnp.int32(group))  # each query's position

    def step(block: Array, carry: tuple[Array, Array, Array], masked: bool):
        out, top, total = carry
        stage = lax.rem(block - first_block, jnp.int32(num_stages))
        wait(block, stage)
        ahead = block + (num_stages - 1)

        @pl.when(ahead < end_block)
        def _() -> None:
            start(ahead, lax.rem(ahead - first_block, jnp.int32(num_stages)))

        x = []  # pieces [M, columns]: few registers hold keys at a time
        for column in range(0, block_kv, columns):
            keys = kv_smem.at[stage, pl.ds(column, columns), pl.ds(0, head_dim)]
            k = plgpu.load(keys.T, layout=rhs, optimized=False)  # [H, columns]
            logits = dot(full((rows, columns), 0.0, acc), q, k)
            if spec.soft_cap is None:
                logits = logits * (spec.scale * _LOG2E)
            else:  # cap * tanh(x / cap) by exp2, whose approximation is far better than tanh's
                cap = spec.soft_cap * _LOG2E
                power = jnp.exp2(logits * (2.0 * spec.scale * _LOG2E / spec.soft_cap))
                logits = cap - 2.0 * cap / (power + 1.0)
            if masked:
                kv_at = iota(rows, columns, 1, acc) + (block * block_kv + column)
                seen = kv_at <= at
                if window is not None:
                    seen = seen & (kv_at > at - window)
                logits = jnp.where(seen, logits, _NEVER)
            x.append(logits)
        new_top = jnp.maximum(top, jnp.max(functools.reduce(jnp.maximum, x), axis=1))
        shrink = jnp.exp2(top - new_top)
        p = [jnp.exp2(each - spread(new_top, columns)) for each in x]
        total = total * shrink + jnp.sum(functools.reduce(jnp.add, p), axis=1)
        out = out * spread(shrink, head_dim)
        p = [each.astype(dtype) for each in p]
        if p_smem is not None:  # a warp has some of the columns and needs all: by shared memory
            for index, each in enumerate(p):
                p_smem[index] = each
            p = [
                plgpu.load(p_smem.at[index], layout=lhs, optimized=False) for index in range(len(p))
            ]
        elif not interpret:
            p = [_as_lhs(each, tile) for each in p]
        for index, weights in enumerate(p):
            values = kv_smem.at[stage, pl.ds(index * columns, columns), pl.ds(head_dim, head_dim)]
            v = plgpu.load(values, layout=rhs, optimized=False)  # [columns, H]
            if masked:  # whatever an unseen slot holds, NaN too, must not leak
                kv_at = iota(columns, head_dim, 0, rhs) + (block * block_kv + index * columns)
                valid = kv_at < end
                if window is not None:
                    valid = valid & (kv_at >= least)
                v = jnp.where(valid, v, jnp.zeros((), dtype))
            out = dot(out, weights, v)
        return out, new_top, total

    for ahead in range(num_stages - 1):

        @pl.when(first_block + ahead < end_block)
        def _(ahead: int = ahead) -> None:
            start(first_block + ahead, jnp.int32(ahead))

    carry = (
        full((rows, head_dim), 0.0, acc),
        full((rows,), _LEAST, acc.reduce(1)),
        full((rows,), 0.0, acc.reduce(1)),
    )
    bounds = [(first_block, end_block, True)]
    if tile.part_masks:
        whole = lax.div(position + 1, jnp.int32(block_kv))  # blocks that the first query sees
        whole_from = first_block
        if window is not None:
            whole_from = lax.div(jnp.maximum(end - window, 0) + (block_kv - 1), jnp.int32(block_kv))
            whole_from = jnp.clip(whole_from, first_block, end_block)
        whole = jnp.clip(whole, whole_from, end_block)
        bounds = [(whole_from, whole, False), (whole, end_block, True)]
        if window is not None:
            bounds = [(first_block, whole_from, True), *bounds]
    for lower, upper, masked in bounds:
        carry = lax.fori_loop(lower, upper, lambda i, c, masked=masked: step(i, c, masked), carry)
    out, top, total = carry
    total = jnp.maximum(total, 1e-30)
    out_ref[item, head, share] = (out / spread(total, head_dim)).astype(out_ref.dtype)
    lse_ref[item, head, share] = top + jnp.log2(total)


def _sync() -> None:
    """All threads of the block have come here, and see what the others wrote."""

    @plgpu.inline_mgpu()
    def sync(_: Any) -> None:
        mgpu.utils.warpgroup_barrier()

    sync()


def _as_lhs(x: Array, tile: Tile) -> Array:
    """A result of `mma` as its left operand, where no two warps share rows: the same registers.

    A thread holds columns 2t, 2t + 1 of rows g and g + 8 of each 8 columns of the result, and the
    same of each half of the 16 of the operand, in the same order.
    """
    acc = plgpu.Layout.MMA_ACC(x.dtype, m_warps=tile.m_warps)
    lhs = plgpu.Layout.MMA_LHS(x.dtype, m_warps=tile.m_warps)

    @plgpu.inline_mgpu(
        arg_types=(acc,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=lhs)
    )
    def rename(_: Any, fragments: Any) -> Any:
        layout = lhs.to_mgpu()
        registers = fragments.registers.reshape(layout.registers_shape(x.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return rename(x)


def _attend_tiles(
    q: Array,  # [T, K, G, H]
    kv_pages: Array,
    pages: PageMetadata,
    plan: _Plan,
    *,
    spec: AttentionSpec,
    tile: Tile,
    num_shares: int,
    backend: Backend,
) -> tuple[Array, Array]:
    """Each tile's attention and log2 denominators by share: [W, K, S, M, H], [W, K, S, M]."""
    kv = spec.kv
    num_tokens, num_kv_heads, group, head_dim = q.shape
    tile_tokens = tile.rows // group
    num_tiles = plan.items.shape[0]
    token = plan.first_tokens[:, None] + jnp.arange(tile_tokens, dtype=jnp.int32)
    tiles = q[jnp.minimum(token, num_tokens - 1)]  # [W, tokens, K, G, H]
    tiles = jnp.swapaxes(tiles, 1, 2).reshape(num_tiles, num_kv_heads, -1, head_dim)
    tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, tile.rows - tiles.shape[2]), (0, 0)))

    piece = min(kv.page_size, tile.block_kv)
    flat = kv_pages.reshape(-1, piece, 2 * num_kv_heads * head_dim)  # a view
    swizzle = next(size for size in (128, 64, 32) if head_dim % (size // 2) == 0)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    p_transforms = (
        plgpu.TilingTransform((8, tile.columns)),
        plgpu.SwizzleTransform(2 * tile.columns),
    )
    p_shape = (tile.block_kv // tile.columns, tile.rows, tile.columns)
    scratch: list[Any] = [
        plgpu.SMEM((tile.num_stages, tile.block_kv, 2 * head_dim), q.dtype, transforms=transforms),
    ]
    if tile.m_warps < 4:
        scratch.append(plgpu.SMEM(p_shape, q.dtype, transforms=p_transforms))
    if backend.interpret or not _copies_are_cp_async(backend):
        copies = tile.block_kv // piece
        scratch.append(plgpu.Barrier(num_arrivals=copies, num_barriers=tile.num_stages))
    shape = (num_tiles, num_kv_heads, num_shares, tile.rows)
    out_dtype = jnp.float32 if num_shares > 1 else q.dtype

    def body(*refs: Any) -> None:
        refs, scratch = refs[:6], refs[6:]
        kv_smem, *scratch = scratch
        p_smem = scratch.pop(0) if tile.m_warps < 4 else None
        _kernel(*refs, kv_smem, p_smem, *scratch, spec=spec, tile=tile, interpret=backend.interpret)

    call = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*shape, head_dim), out_dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        grid=(num_kv_heads, num_tiles, num_shares),
        grid_names=("head", "tile", "share"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=plgpu.InterpretGPUParams() if backend.interpret else None,
        kernel_name=f"paged_attention_mma_{tile.rows}",
    )
    return call(tiles, flat, plan.items, pages.page_table)


def attend_mma(
    q: Array,  # [T, N, H]
    kv_pages: Array,  # [L * num_pages, page_size, 2K, H], with this step's tokens written
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N] float32
) -> Array:
    """Attention of every token to its row's tokens up to itself: [T, N, H]. Padding gets zeros."""
    num_tokens, num_heads, head_dim = q.shape
    num_rows = pages.kv_lens.shape[0]
    first_page = jnp.asarray(layer, jnp.int32) * pages.num_pages
    grouped = q.astype(spec.kv.dtype).reshape(
        num_tokens, spec.kv.num_kv_heads, spec.group, head_dim
    )
    row = jnp.arange(num_rows, dtype=jnp.int32)

    def run(in_rows: Array, num_tokens: int, tile: Tile) -> tuple[Array, Array]:
        plan = _plan(
            pages, first_page, in_rows, num_tokens=num_tokens, tile_tokens=tile.rows // spec.group
        )
        num_shares = _num_shares(pages, plan.items.shape[0], spec=spec, tile=tile)
        out, lse = _attend_tiles(
            grouped,
            kv_pages,
            pages,
            plan,
            spec=spec,
            tile=tile,
            num_shares=num_shares,
            backend=backend,
        )
        return _of_tokens(out, lse, plan, spec=spec, sinks=sinks), plan.in_use

    few, many = tiles(spec, backend)
    if num_tokens <= max(num_rows, 64) or few.rows == many.rows:
        out, in_use = run(row < num_rows, num_tokens, few)
    else:
        is_decode = row < pages.num_decode_rows
        out, in_use = run(~is_decode, num_tokens, many)
        decoded, decodes = run(is_decode, num_rows, few)
        out = out.at[:num_rows].set(
            jnp.where(decodes[:, None, None, None], decoded, out[:num_rows])
        )
        in_use = in_use.at[:num_rows].set(decodes | in_use[:num_rows])
    out = jnp.where(in_use[:, None, None, None], out, 0.0)
    return out.reshape(q.shape).astype(q.dtype)


def _of_tokens(
    out: Array,  # [W, K, S, M, H]
    lse: Array,  # [W, K, S, M]
    plan: _Plan,
    *,
    spec: AttentionSpec,
    sinks: Array | None,
) -> Array:
    """Each token's output, its shares merged and its sinks counted in: [T, K, G, H] float32."""
    num_tiles, num_kv_heads, num_shares, rows, head_dim = out.shape
    tile_tokens = rows // spec.group
    used = tile_tokens * spec.group
    shape = (num_tiles, num_kv_heads, num_shares, tile_tokens, spec.group)
    out = out[:, :, :, :used].reshape(*shape, head_dim)[plan.tile_of, :, :, plan.offset_of]
    lse = lse[:, :, :, :used].reshape(shape)[plan.tile_of, :, :, plan.offset_of]  # [T, K, S, G]
    top = jnp.max(lse, axis=2, keepdims=True)
    weights = jnp.exp2(lse - top)
    total = jnp.sum(weights, axis=2)  # [T, K, G]
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(num_kv_heads, spec.group) * _LOG2E
        total = total + jnp.exp2(sink - top[:, :, 0])
    out = jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=2)
    return out / total[..., None]


def tiles(spec: AttentionSpec, backend: Backend) -> tuple[Tile, Tile]:
    """The tiles for rows of few tokens, and of many."""
    head_dim = spec.kv.head_dim
    block_kv = 64 if head_dim <= 128 else 32
    least = 16 if head_dim % 32 == 0 else 32  # four warps part the columns in pieces of 8
    rows = next(size for size in (16, 32, 64) if size >= max(least, spec.group))
    many = 64 if head_dim <= 128 else 32
    few = Tile(rows=rows, block_kv=block_kv, num_stages=2, part_masks=False)
    return few, Tile(rows=max(many, rows), block_kv=block_kv, num_stages=2, part_masks=True)


def _num_shares(pages: PageMetadata, num_tiles: int, *, spec: AttentionSpec, tile: Tile) -> int:
    """Shares of the context: enough blocks of threads to fill a GPU, none under 4 steps."""
    longest = pages.page_table.shape[1] * spec.kv.page_size
    if spec.window is not None:
        longest = min(longest, spec.window + tile.rows)
    most = max(1, longest // (4 * tile.block_kv))
    wanted = max(1, 512 // (num_tiles * spec.kv.num_kv_heads))
    return min(most, wanted, 64)


def _copies_are_cp_async(backend: Backend) -> bool:
    """Whether the chip is older than the engine that copies by itself (TMA, Hopper)."""
    if backend.chip.sm is None:
        raise ValueError(f"{backend.chip} has no compute capability: not an NVIDIA GPU")
    return backend.chip.sm < 90


def why_not_mma(spec: AttentionSpec, *, chip: Chip) -> str | None:
    """Why these kernels cannot run this kind of layer on this chip, or None if they can."""
    kv = spec.kv
    if chip.sm is None or chip.sm < 80:
        return f"{chip} has no bf16 mma and no asynchronous copies: they came with Ampere (sm_80)"
    if kv.kind != "heads":
        return f"there is no kernel for {kv.kind} caches on {chip}"
    if jnp.dtype(kv.dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"the cache is {jnp.dtype(kv.dtype)}; mma.sync attention reads bfloat16 and float16"
    if kv.head_dim % 16 or not 32 <= kv.head_dim <= 256:
        return f"head_dim={kv.head_dim} is not a multiple of 16 within 32..256"
    if kv.page_size % 8 or (64 % kv.page_size and kv.page_size % 64):
        return f"page_size={kv.page_size} is not 8, 16, 32 or a multiple of 64"
    if spec.group > 64:
        return f"{spec.group} query heads a kv head are more than the 64 rows of a tile"
    return None

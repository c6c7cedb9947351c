"""Paged attention for NVIDIA GPUs by `mma.sync`, in Pallas Mosaic GPU: Ampere, Ada and Blackwell.

One kernel text serves decode, verify and prefill rows. The queries of a batch are cut into tiles:
some consecutive tokens of one row, with all the query heads of one kv head, are the rows of an
`mma`. A block of threads (one warpgroup) takes a tile, a kv head and a share of the context,
streams the pages of that share through shared memory in stages, and keeps a running softmax
(FlashAttention-2, arXiv 2307.08691). Where tiles are few, the context is cut into shares that are
merged afterwards (Flash-Decoding). Pages are found through the page table and read where they lie
(PagedAttention, arXiv 2309.06180); the cache is never copied.

Pages of 8 bits are widened to float16 block by block, from their stage to a block of shared memory
that the products read, which frees the stage at once (`gpu_widen`).

Copies are `cp.async` before Hopper, and TMA with barriers from Hopper on, to which Blackwell
belongs; the rest is the same text. What Pallas' interpreter runs (`backend.interpret`) is the text
for TMA with two changes, as it knows neither: `mma` is a dot of jnp, and the renaming of registers
in `_as_lhs` is left out. The `cp.async` path, `mma` and its layouts of fragments are run by the PTX
emulator of the tests. No figure here comes from a device.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.backend import Backend
from pallas_kernels.chips import Chip
from pallas_kernels.gpu_widen import DTYPES, as_operand, operand_dtype, widen_block, widens
from pallas_kernels.types import AttentionSpec, PageMetadata

_LOG2E = math.log2(math.e)
_NEVER = -1e30  # the logit of what is not seen; finite: no NaN comes of it
_LEAST = -1e29  # where the largest logit starts: so far above _NEVER that exp2 gives zero
_DTYPES = ("bfloat16", "float16", *DTYPES)
_SMALL_SMEM = (86, 87, 89, 120, 121)  # architectures with 100 KiB of shared memory a multiprocessor
_FEW_TOKENS = 64  # batches up to this size are one call, of small tiles
_LEAST_STEPS = 4  # of a share: a smaller one costs more to merge than it saves
_BLOCKS_WANTED = 512  # about two a multiprocessor on the largest chips


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one block of threads works. Static."""

    rows: int  # of an mma, queries x heads: 16, 32 or 64; four warps part rows, then columns
    block_kv: int  # kv tokens a step
    num_stages: int  # steps' keys and values in shared memory at a time
    part_masks: bool  # a loop of its own, without masks, for blocks that every query sees whole

    @property
    def m_warps(self) -> int:
        """Warps that part the rows; 4 // m_warps part the columns."""
        return self.rows // 16

    @property
    def columns(self) -> int:
        """Of a block that are worked on at a time: the least in which all warps have a part."""
        return max(16, 32 // self.m_warps)


def why_not_mma(spec: AttentionSpec, *, chip: Chip) -> str | None:
    """Why these kernels cannot run this kind of layer on this chip, or None if they can."""
    kv = spec.kv
    if chip.sm is None or chip.sm < 80:
        return f"{chip} has no bfloat16 mma and no cp.async: they came with Ampere (sm_80)"
    if kv.kind != "heads":
        return f"there is no mma.sync kernel for a {kv.kind} cache"
    if (dtype := jnp.dtype(kv.dtype).name) not in _DTYPES:
        return f"the cache is {dtype}; mma.sync attention takes {', '.join(_DTYPES)}"
    if kv.head_dim % 16 or not 32 <= kv.head_dim <= 256:
        return f"head_dim={kv.head_dim} is not a multiple of 16 from 32 to 256"
    if kv.page_size not in (8, 16) and kv.page_size % 32:
        return f"page_size={kv.page_size} is not 8, 16 or a multiple of 32"
    if kv.page_size % 32 == 0 and kv.page_size % 64 and kv.page_size != 32:
        return f"page_size={kv.page_size} is not 8, 16, 32 or a multiple of 64"
    columns = _swizzled_columns(kv.head_dim, kv.dtype)
    tiles_a_page = kv.page_size // 8 * (2 * kv.head_dim // columns)
    if chip.sm < 90 and tiles_a_page % 4:  # a cp.async copy is parted among four warps
        return f"page_size={kv.page_size} is too small for head_dim={kv.head_dim} on {chip}"
    if spec.group > 64:
        return f"{spec.group} query heads a kv head are more than the 64 rows of a tile"
    return None


def tiles(spec: AttentionSpec, chip: Chip) -> tuple[Tile, Tile]:
    """The tiles for rows of few tokens, and of many.

    Two blocks of threads fit a multiprocessor, by shared memory and by registers (at most 255 a
    thread; more rows than 64, or 32 of wide heads, spill).
    """
    head_dim = spec.kv.head_dim
    least = 16 if head_dim % 32 == 0 else 32  # where warps part columns, each has 8 of a piece
    few = next(size for size in (16, 32, 64) if size >= max(least, spec.group))
    many = max(few, 64 if head_dim <= 128 else 32)
    room = (48 if chip.sm in _SMALL_SMEM else 80) * 1024
    num_stages = 2
    bytes_a_value = num_stages * jnp.dtype(spec.kv.dtype).itemsize
    bytes_a_value += operand_dtype(spec.kv.dtype).itemsize if widens(spec.kv.dtype) else 0
    block_kv = 64 if 64 * 2 * head_dim * bytes_a_value <= room else 32
    return (
        Tile(rows=few, block_kv=block_kv, num_stages=num_stages, part_masks=False),
        Tile(rows=many, block_kv=block_kv, num_stages=num_stages, part_masks=True),
    )


class Plan(NamedTuple):
    """The tiles of a batch, W of them with the unused, and where each token's result will be."""

    items: Array  # [W, 4] int32: row, position of the first query, end of the context, first page
    first_tokens: Array  # [W] int32: the token of each tile's first query
    tile_of: Array  # [T] int32
    offset_of: Array  # [T] int32: which of its tile's tokens
    in_use: Array  # [T] bool


def plan_tiles(
    pages: PageMetadata, first_page: Array, in_rows: Array, *, num_tokens: int, tile_tokens: int
) -> Plan:
    """Tiles of up to `tile_tokens` queries, of those rows that `in_rows [B]` is true for.

    `num_tokens` bounds the tokens of these rows. A tile that is not used has a context that ends at
    0, which makes its block of threads return at once.
    """
    starts, num_rows = pages.query_starts, pages.kv_lens.shape[0]
    num_queries = jnp.where(in_rows, starts[1:] - starts[:-1], 0)  # [B]
    num_tiles_of = (num_queries + tile_tokens - 1) // tile_tokens
    ends = jnp.cumsum(num_tiles_of)  # [B] in the list of tiles
    first_tile_of = ends - num_tiles_of
    tile = jnp.arange(min(num_tokens, num_rows + num_tokens // tile_tokens), dtype=jnp.int32)
    row = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
    valid = row < num_rows
    row = jnp.minimum(row, num_rows - 1)
    done = (tile - first_tile_of[row]) * tile_tokens  # the row's queries in the tiles before
    position = pages.kv_lens[row] - num_queries[row] + done
    end = position + jnp.minimum(num_queries[row] - done, tile_tokens)
    fields = (row, position, jnp.where(valid, end, 0), jnp.broadcast_to(first_page, tile.shape))

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row_of = jnp.searchsorted(starts, token, side="right", method="compare_all") - 1
    is_token = row_of < num_rows
    row_of = jnp.minimum(row_of, num_rows - 1)
    before = token - starts[row_of]
    return Plan(
        items=jnp.stack(fields, axis=1),
        first_tokens=jnp.where(valid, starts[row] + done, 0),
        tile_of=first_tile_of[row_of] + before // tile_tokens,
        offset_of=before % tile_tokens,
        in_use=is_token & in_rows[row_of],
    )


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
    """Attention of every token to its row's tokens up to itself: [T, N, H]. Padding gets zeros.

    Logits and the softmax are float32, weights are rounded to the cache's dtype (to float16 if that
    has 8 bits), and so is q. `why_not_mma` tells the limits. A batch of few tokens is one call; a
    larger one is two, of small tiles for the decode rows and of large ones for the others.
    """
    num_tokens, num_rows = q.shape[0], pages.kv_lens.shape[0]
    first_page = jnp.asarray(layer, jnp.int32) * pages.num_pages
    heads = (spec.kv.num_kv_heads, spec.group)
    grouped = as_operand(q, operand_dtype(spec.kv.dtype)).reshape(
        num_tokens, *heads, -1
    )  # [T, K, G, H]
    row = jnp.arange(num_rows, dtype=jnp.int32)

    def run(in_rows: Array, num_tokens: int, tile: Tile) -> tuple[Array, Array]:
        tile_tokens = tile.rows // spec.group
        plan = plan_tiles(
            pages, first_page, in_rows, num_tokens=num_tokens, tile_tokens=tile_tokens
        )
        out, lse = _launch(
            _query_tiles(grouped, plan, tile),
            kv_pages,
            plan.items,
            pages.page_table,
            spec=spec,
            tile=tile,
            num_shares=_num_shares(pages, len(plan.items), spec=spec, tile=tile),
            backend=backend,
        )
        out = _of_tokens(out, lse, plan, spec=spec, sinks=sinks)
        return jnp.where(plan.in_use[:, None, None, None], out, 0.0), plan.in_use

    few, many = tiles(spec, backend.chip)
    if num_tokens <= max(num_rows, _FEW_TOKENS):
        out, _ = run(row < num_rows, num_tokens, few)
    else:
        is_decode = row < pages.num_decode_rows
        out, _ = run(~is_decode, num_tokens, many)
        decoded, decodes = run(is_decode, num_rows, few)
        decodes = decodes[:, None, None, None]
        out = out.at[:num_rows].set(jnp.where(decodes, decoded, out[:num_rows]))
    return out.reshape(q.shape).astype(q.dtype)


def _query_tiles(q: Array, plan: Plan, tile: Tile) -> Array:
    """The queries `[T, K, G, H]` by tile, `[W, K, M, H]`: by token, and of each a group of heads.

    What a tile does not use holds some query or zeros: rows of an `mma` do not mix.
    """
    num_tokens, num_kv_heads, group, head_dim = q.shape
    token = plan.first_tokens[:, None] + jnp.arange(tile.rows // group, dtype=jnp.int32)
    queries = q[jnp.minimum(token, num_tokens - 1)]  # [W, tokens, K, G, H]
    queries = jnp.swapaxes(queries, 1, 2).reshape(
        -1, num_kv_heads, token.shape[1] * group, head_dim
    )
    return jnp.pad(queries, ((0, 0), (0, 0), (0, tile.rows - queries.shape[2]), (0, 0)))


def _num_shares(pages: PageMetadata, num_tiles: int, *, spec: AttentionSpec, tile: Tile) -> int:
    """Shares to cut the context into: enough to fill a GPU, but none of few steps."""
    longest = pages.page_table.shape[1] * spec.kv.page_size
    if spec.window is not None:
        longest = min(longest, spec.window + tile.rows)
    return min(
        max(1, longest // (_LEAST_STEPS * tile.block_kv)),
        max(1, _BLOCKS_WANTED // (num_tiles * spec.kv.num_kv_heads)),
    )


def _of_tokens(
    out: Array,  # [W, K, S, M, H]
    lse: Array,  # [W, K, S, M]
    plan: Plan,
    *,
    spec: AttentionSpec,
    sinks: Array | None,
) -> Array:
    """Each token's output, its shares merged and its sinks counted in: [T, K, G, H] float32."""
    num_tiles, num_kv_heads, num_shares, rows, head_dim = out.shape
    tile_tokens = rows // spec.group
    shape = (num_tiles, num_kv_heads, num_shares, tile_tokens, spec.group)
    used = slice(tile_tokens * spec.group)
    out = out[:, :, :, used].reshape(*shape, head_dim)[plan.tile_of, :, :, plan.offset_of]
    lse = lse[:, :, :, used].reshape(shape)[plan.tile_of, :, :, plan.offset_of]  # [T, K, S, G]
    out = out.astype(jnp.float32)
    if num_shares == 1 and sinks is None:
        return out[:, :, 0]
    top = jnp.max(lse, axis=2, keepdims=True)
    sink = None
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(num_kv_heads, 1, spec.group) * _LOG2E
        top = jnp.maximum(top, sink)
    weights = jnp.exp2(lse - top)
    total = jnp.sum(weights, axis=2)  # [T, K, G]
    if sink is not None:
        total = total + jnp.exp2(sink - top)[:, :, 0]
    return jnp.sum(out * weights[..., None], axis=2) / total[..., None]


def _launch(
    queries: Array,  # [W, K, M, H]
    kv_pages: Array,
    items: Array,  # [W, 4]
    page_table: Array,  # [B, P]
    *,
    spec: AttentionSpec,
    tile: Tile,
    num_shares: int,
    backend: Backend,
) -> tuple[Array, Array]:
    """Each tile's attention to each share of its context, `[W, K, S, M, H]`, and log2 of the
    softmax's denominator, `[W, K, S, M]` float32. A share without tokens has about -1e29."""
    num_tiles, num_kv_heads, rows, head_dim = queries.shape
    dtype = queries.dtype
    piece = min(spec.kv.page_size, tile.block_kv)
    flat = kv_pages.reshape(-1, piece, 2 * num_kv_heads * head_dim)  # a view; cp.async is 2D
    scratch = {
        "kv_smem": _swizzled(
            (tile.num_stages, tile.block_kv, 2 * head_dim), kv_pages.dtype, head_dim
        ),
        "wide_smem": _swizzled((tile.block_kv, 2 * head_dim), dtype, head_dim),
        "p_smem": _swizzled((tile.block_kv // tile.columns, rows, tile.columns), dtype),
        "barrier": plgpu.Barrier(num_arrivals=tile.block_kv // piece, num_barriers=tile.num_stages),
    }
    if tile.m_warps == 4:
        del scratch["p_smem"]
    if not widens(kv_pages.dtype):
        del scratch["wide_smem"]
    if backend.chip.sm is not None and backend.chip.sm < 90 and not backend.interpret:
        del scratch["barrier"]
    shape = (num_tiles, num_kv_heads, num_shares, rows)
    return plgpu.kernel(
        functools.partial(_kernel, spec=spec, tile=tile, interpret=backend.interpret),
        out_type=(
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32 if num_shares > 1 else dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        grid=(num_kv_heads, num_tiles, num_shares),
        grid_names=("head", "tile", "share"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # the other does not know sm_8x
            unsafe_no_auto_barriers=True,  # `_sync` is called where it is needed
        ),
        interpret=plgpu.InterpretGPUParams() if backend.interpret else None,
        kernel_name=f"paged_attention_mma_{rows}",
    )(queries, flat, items, page_table)


def _swizzled_columns(columns: int, dtype: Any) -> int:
    """Columns of the pieces to swizzle rows of keys and values in, of `columns` columns each.

    Of 16 bits the widest swizzle that parts a key from its value. Of 8 bits, which nothing but the
    conversion reads, as many, so that there are enough to part among warps; but the least swizzle
    has 32, which divide a key and its value together.
    """
    size = next(size for size in (64, 32, 16) if columns % size == 0)
    return max(size, 32 // jnp.dtype(dtype).itemsize)


def _swizzled(shape: Sequence[int], dtype: Any, columns: int | None = None) -> Any:
    """Shared memory whose rows are swizzled in the pieces that `_swizzled_columns` says."""
    size = _swizzled_columns(columns or shape[-1], dtype)
    tiling = plgpu.TilingTransform((8, size))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(jnp.dtype(dtype).itemsize * size)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(tuple(shape), dtype, transforms=(tiling, swizzle))


class _Fragments:
    """Arrays in the layouts of `mma`: each thread has a part of each, in registers."""

    def __init__(self, dtype: Any, tile: Tile, interpret: bool) -> None:
        self.tile, self.interpret = tile, interpret
        self.acc = plgpu.Layout.MMA_ACC(dtype, m_warps=tile.m_warps)
        self.lhs = plgpu.Layout.MMA_LHS(dtype, m_warps=tile.m_warps)
        self.rhs = plgpu.Layout.MMA_RHS(dtype, m_warps=tile.m_warps)

    def full(self, value: float, columns: int | None = None) -> Array:
        """[M, columns] or [M]."""
        shape = (self.tile.rows,) if columns is None else (self.tile.rows, columns)
        layout = self.acc.reduce(1) if columns is None else self.acc
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def spread(self, x: Array, columns: int) -> Array:
        """[M] to [M, columns]."""
        wide = lax.broadcast_in_dim(x, (self.tile.rows, columns), [0])
        return plgpu.layout_cast(wide, self.acc)

    def iota(self, shape: tuple[int, int], axis: int, layout: Any) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)

    def rows_of_rhs(self, rows: int, columns: int) -> Array:
        """Each element's row in a right operand: [rows, columns].

        By way of one axis: along two, jax 0.11.2 takes it that a thread's pair of elements lies in
        one row, where in this layout it lies in two, and gives both the first one's.
        """
        row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=self.rhs.reduce(1))
        return plgpu.layout_cast(lax.broadcast_in_dim(row, (rows, columns), [0]), self.rhs)

    def load(self, ref: Any, layout: Any) -> Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    def dot(self, acc: Array, a: Array, b: Array) -> Array:
        """acc + a @ b."""
        if self.interpret:
            return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
        return plgpu.mma(acc, a, b)

    def sync(self) -> None:
        """All threads have come here and see what the others wrote."""
        if self.interpret:  # whose warpgroup is one thread
            return

        @plgpu.inline_mgpu()
        def barrier(_: Any = None) -> None:
            mgpu.utils.warpgroup_barrier()

        barrier()

    def as_lhs(self, parts: list[Array], p_smem: Any | None) -> list[Array]:
        """Results of `mma` [M, columns] as its left operands."""
        if p_smem is None:  # no warp needs another's columns
            return parts if self.interpret else [_as_lhs(part, self) for part in parts]
        for index, part in enumerate(parts):
            p_smem[index] = part
        self.sync()
        return [self.load(p_smem.at[index], self.lhs) for index in range(len(parts))]


def _as_lhs(x: Array, fragments: _Fragments) -> Array:
    """The same registers by another name, where each warp has rows of its own.

    Of each 8 columns of a result, a thread holds two, of rows g and g + 8; of each half of the 16
    columns of an operand it holds the same, in the same order.
    """

    @plgpu.inline_mgpu(
        arg_types=(fragments.acc,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=fragments.lhs),
    )
    def rename(_: Any, result: Any) -> Any:
        layout = fragments.lhs.to_mgpu()
        registers = result.registers.reshape(layout.registers_shape(x.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return rename(x)  # pyright: ignore[reportCallIssue]


def _kernel(
    q_ref: Any,  # [W, K, M, H]
    kv_ref: Any,  # [L * num_pages * pieces, piece, 2K * H]: pages, or pieces of large ones
    items_ref: Any,  # [W, 4]
    table_ref: Any,  # [B, P]
    out_ref: Any,  # [W, K, S, M, H]
    lse_ref: Any,  # [W, K, S, M]
    *,
    kv_smem: Any,  # [stages, block_kv, 2H]: a token's key and value
    wide_smem: Any = None,  # [block_kv, 2H]: a block widened, where the cache has 8 bits
    p_smem: Any = None,  # [parts, M, columns]: weights, where warps part the columns
    barrier: Any = None,  # [stages], where copies are TMA's
    spec: AttentionSpec,
    tile: Tile,
    interpret: bool,
) -> None:
    """One tile's queries against one share of their context, for one kv head."""
    head_dim, window, block_kv = spec.kv.head_dim, spec.window, tile.block_kv
    columns, num_stages = tile.columns, jnp.int32(tile.num_stages)
    ahead = tile.num_stages - 1 if wide_smem is None else tile.num_stages  # blocks under way
    fragments = _Fragments(q_ref.dtype, tile, interpret)
    acc, spread, iota = fragments.acc, fragments.spread, fragments.iota

    item, head, share = (lax.axis_index(name) for name in ("tile", "head", "share"))
    row, position, end, first_page = (items_ref[item, field] for field in range(4))
    least = jnp.int32(0) if window is None else jnp.maximum(position - (window - 1), 0)
    first_block = lax.div(least, jnp.int32(block_kv))
    end_block = lax.div(end + (block_kv - 1), jnp.int32(block_kv))
    if (num_shares := out_ref.shape[2]) > 1:
        num_blocks = jnp.maximum(end_block - first_block, 0) + (num_shares - 1)
        num_blocks = jnp.maximum(lax.div(num_blocks, jnp.int32(num_shares)), _LEAST_STEPS)
        first_block = first_block + share * num_blocks
        end_block = jnp.minimum(first_block + num_blocks, end_block)

    def start(block: Array) -> None:
        """Ask for a block's keys and values, if the share has it."""

        @pl.when(block < end_block)
        def _() -> None:
            _start_copies(
                kv_ref,
                kv_smem.at[lax.rem(block - first_block, num_stages)],
                [] if barrier is None else [barrier.at[lax.rem(block - first_block, num_stages)]],
                lambda entry: (
                    first_page + table_ref[row, jnp.minimum(entry, table_ref.shape[1] - 1)]
                ),
                block,
                head * (2 * head_dim),
                page_size=spec.kv.page_size,
            )

    def wait(block: Array) -> None:
        """A block that was asked for has come, and all threads are done with the one before."""
        if barrier is not None:
            plgpu.barrier_wait(barrier.at[lax.rem(block - first_block, num_stages)])
            plgpu.commit_smem()  # what was read comes before what TMA will write in its place
        else:  # which is a barrier of the threads, too: each waits for its own copies only
            _wait_for_cp_async(end_block - block, ahead - 1, block_kv // kv_ref.shape[1])

    q = fragments.load(q_ref.at[item, head], fragments.lhs)  # [M, H]
    at = position + lax.div(iota((tile.rows, columns), 0, acc), jnp.int32(spec.group))  # of queries

    def logits(keys: Any, first: Array, masked: bool) -> Array:
        """Scaled, in units of log2: [M, columns]. `first` is the position of the first key."""
        k = fragments.load(keys.T, fragments.rhs)  # [H, columns]
        x = fragments.dot(fragments.full(0.0, columns), q, k)
        if spec.soft_cap is None:
            x = x * (spec.scale * _LOG2E)
        else:  # cap * tanh(x / cap) by exp2, whose approximation is far better than tanh's
            power = jnp.exp2(x * (2.0 * spec.scale * _LOG2E / spec.soft_cap))
            x = spec.soft_cap * _LOG2E - (2.0 * spec.soft_cap * _LOG2E) / (power + 1.0)
        if not masked:
            return x
        kv_at = iota((tile.rows, columns), 1, acc) + first
        seen = kv_at <= at
        if window is not None:
            seen = seen & (kv_at > at - window)
        return jnp.where(seen, x, _NEVER)

    def values(ref: Any, first: Array, masked: bool) -> Array:
        """[columns, H]. Whatever a slot holds that nobody sees, NaN too, must not leak."""
        v = fragments.load(ref, fragments.rhs)
        if not masked:
            return v
        kv_at = fragments.rows_of_rhs(columns, head_dim) + first
        valid = kv_at < end
        if window is not None:
            valid = valid & (kv_at >= least)
        return jnp.where(valid, v, jnp.zeros((), v.dtype))

    def step(block: Array, carry: tuple[Array, Array, Array], masked: bool):
        out, top, total = carry
        wait(block)
        kv = kv_smem.at[lax.rem(block - first_block, num_stages)]
        if wide_smem is not None:
            widen_block(kv, wide_smem, interpret=interpret)
            if barrier is None:
                fragments.sync()
            else:
                plgpu.commit_smem()  # TMA will write where this was read
            kv = wide_smem
        start(block + ahead)
        parts = range(0, block_kv, columns)  # few registers hold keys or values at a time
        first = [block * block_kv + part for part in parts]
        keys = [kv.at[pl.ds(part, columns), pl.ds(0, head_dim)] for part in parts]
        x = [logits(*each, masked) for each in zip(keys, first, strict=True)]
        new_top = jnp.maximum(top, jnp.max(functools.reduce(jnp.maximum, x), axis=1))
        shrink = jnp.exp2(top - new_top)
        p = [jnp.exp2(each - spread(new_top, columns)) for each in x]
        total = total * shrink + jnp.sum(functools.reduce(jnp.add, p), axis=1)
        out = out * spread(shrink, head_dim)
        p = fragments.as_lhs([each.astype(q.dtype) for each in p], p_smem)
        for weights, part, at_first in zip(p, parts, first, strict=True):
            ref = kv.at[pl.ds(part, columns), pl.ds(head_dim, head_dim)]
            out = fragments.dot(out, weights, values(ref, at_first, masked))
        return out, new_top, total

    for stage in range(ahead):
        start(first_block + stage)
    bounds = [(first_block, end_block, True)]
    if tile.part_masks:
        whole = first_block
        if window is not None:  # blocks that the last query sees whole
            whole = lax.div(jnp.maximum(end - window, 0) + (block_kv - 1), jnp.int32(block_kv))
            whole = jnp.clip(whole, first_block, jnp.maximum(end_block, first_block))
        end_whole = lax.div(position + 1, jnp.int32(block_kv))  # that the first query sees whole
        end_whole = jnp.clip(end_whole, whole, jnp.maximum(end_block, whole))
        bounds = [(whole, end_whole, False), (end_whole, end_block, True)]
        if window is not None:
            bounds.insert(0, (first_block, whole, True))
    carry = (fragments.full(0.0, head_dim), fragments.full(_LEAST), fragments.full(0.0))
    for lower, upper, masked in bounds:
        carry = lax.fori_loop(lower, upper, functools.partial(step, masked=masked), carry)
    out, top, total = carry
    total = jnp.maximum(total, 1e-30)  # of what sees nothing
    out_ref[item, head, share] = (out / spread(total, head_dim)).astype(out_ref.dtype)
    lse_ref[item, head, share] = top + jnp.log2(total)


def _start_copies(
    kv_ref: Any,
    target: Any,  # [block_kv, 2H]
    barriers: list[Any],
    page_of: Any,  # an entry of the page table to the page it names
    block: Array,
    column: Array,  # of the kv head's keys
    *,
    page_size: int,
) -> None:
    """Copy a block's keys and values of one head, page by page, or from within a larger page."""
    piece, width = kv_ref.shape[1], target.shape[1]
    pieces = page_size // piece  # a page
    num_copies = target.shape[0] // piece
    where = []
    for copy in range(num_copies):
        index = block * num_copies + copy
        page = page_of(lax.div(index, jnp.int32(pieces)))
        where.append(page if pieces == 1 else page * pieces + lax.rem(index, jnp.int32(pieces)))
    for copy, page in enumerate(where):  # after all of the table's entries were asked for
        plgpu.copy_gmem_to_smem(
            kv_ref.at[page, :, pl.ds(column, width)],
            target.at[pl.ds(copy * piece, piece)],
            *barriers,
            oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )


def _wait_for_cp_async(num_left: Array, later: int, num_copies: int) -> None:
    """Wait for the oldest block of the `num_left` that the share has left.

    The `later` blocks that were asked for stay under way. The count is a constant of the
    instruction, so that near the end, where fewer are, all are waited for.
    """
    if later == 0:
        plgpu.wait_gmem_to_smem(0)
        return

    @pl.when(num_left > later)
    def _() -> None:
        plgpu.wait_gmem_to_smem(later * num_copies)

    @pl.when(num_left <= later)
    def _() -> None:
        plgpu.wait_gmem_to_smem(0)

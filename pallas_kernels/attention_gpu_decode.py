"""Paged decode attention for Hopper, in Pallas Mosaic GPU: TMA page gather and wgmma.

One query token a row. Decode reads each key and value once and does little with it, so the kernel
is built to keep bytes in flight. The KV blocks of all rows and heads are one list that a fixed
number of thread blocks share equally (`gpu_split`); in each, warpgroup 1 looks pages up and gathers
them by TMA into a ring of stages, as far ahead as the ring allows and across the borders of rows,
while warpgroup 0 computes. What thread blocks found is merged by a second, small kernel.

A wgmma multiplies at least 64 rows, and a group of query heads is rarely more than 8. So both
products are turned over: with the KV tokens as the 64 rows, the group is the N of a wgmma, padded
to 8 only:

    S^T [block_kv, N] = K [block_kv, H] @ q^T [H, N]        K as TMA left it
    O^T [H, N]       += V^T [H, block_kv] @ P^T             V as TMA left it, read transposed

A latent cache (MLA) is the same with one head, whose values are the first columns of its keys: a
block is read once and multiplied twice.

All operands lie in shared memory, so that what the interpreter runs is what the GPU runs; a thread
holds H * N / 128 accumulators of O^T, 8 at H = 128. The softmax is online (FlashAttention, arXiv
2205.14135), with logits in base 2; splitting KV for decode is Flash-Decoding's idea, pages are
PagedAttention's (arXiv 2309.06180).

An 8-bit cache is converted in shared memory, block by block: float8 to float16, which holds it
exactly at one instruction a pair of values, int8 to the queries' type.

Limits: bfloat16, float16, float8_e4m3fn, float8_e5m2 and int8 caches; head_dim a multiple of 16
(8-bit: of 32) from 64 to 256, a latent row at most 576 wide and its values 512; page sizes that are
multiples of 8.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import tuning
from pallas_kernels.backend import Backend
from pallas_kernels.gpu_split import (
    SplitPlan,
    first_block,
    num_blocks,
    num_multiprocessors,
    plan_split,
)
from pallas_kernels.gpu_widen import as_operand, hopper_operand_dtype, widen_for_wgmma
from pallas_kernels.types import AttentionSpec, PageMetadata

_LOG2E = math.log2(math.e)
_NEVER = -1e30  # the logit of what is not seen, and the maximum of nothing: finite, so no inf - inf
_DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
_WGMMA_ROWS = 64
_MOST_LATENT = (576, 512)  # columns of a latent row and of its value: registers, shared memory
_SMEM_BYTES = 232_448  # what a thread block may have; 1 KiB more of an SM's 228 KiB goes with each
_SMEM_RESERVED = 1024

_COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # of a vector over the N columns of an accumulator


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiles:
    """How the kernel is cut. Static; None of `num_workers` means one for each place on the chip."""

    block_kv: int  # tokens a stage: a multiple of 64
    num_stages: int  # blocks in shared memory
    blocks_per_sm: int  # thread blocks that fit on a multiprocessor
    num_workers: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Sizes that follow from a spec and tiles. Static."""

    num_parts: int  # that the query heads of a kv head are cut into, where they are many
    group: int  # query heads a part
    columns: int  # the same, padded to a wgmma's N
    key_dim: int
    value_dim: int
    first_value: int  # column of a token's row at which its value starts; its key starts at 0
    stored: jnp.dtype  # of the cache
    dtype: jnp.dtype  # of the operands of products, 16 bits
    copy_tokens: int  # tokens a TMA copy: a whole page, or the part of one that a block takes

    @property
    def width(self) -> int:
        """Columns of a token's row: key and value side by side, or one within the other."""
        return max(self.key_dim, self.first_value + self.value_dim)

    @property
    def converts(self) -> bool:
        return self.stored != self.dtype

    @property
    def convert_width(self) -> int:
        """Values of a token to convert at a time, in registers: int8 takes more on its way, and
        fewer keep two thread blocks on a multiprocessor."""
        return 32 if self.stored.name == "int8" else 128

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Columns of a value as the M of wgmmas, whole multiples of 64: (first, how many).

        Of a width that is no multiple, the last 64 columns are a span that overlaps the others:
        computing some twice costs less than reading padding.
        """
        whole = self.value_dim - self.value_dim % _WGMMA_ROWS
        if whole == self.value_dim:
            return ((0, whole),)
        return (0, whole), (self.value_dim - _WGMMA_ROWS, _WGMMA_ROWS)

    @property
    def out_rows(self) -> int:
        """Rows of the spans, one after the other."""
        return sum(rows for _, rows in self.spans)


def why_not_decode(spec: AttentionSpec) -> str | None:
    """Why this kernel cannot serve such a layer on Hopper, or None."""
    kv = spec.kv
    dtype = jnp.dtype(kv.dtype)
    if dtype.name not in _DTYPES:
        return f"the Hopper kernel reads pages of {', '.join(_DTYPES)}, not {dtype.name}"
    if kv.page_size % 8 or kv.page_size < 8:
        return f"page_size={kv.page_size} is not a multiple of 8, the rows of a shared memory tile"
    most = (256, 256) if kv.kind == "heads" else _MOST_LATENT
    for what, size, limit in zip(
        ("head_dim", "value_dim"), (kv.head_dim, kv.out_dim), most, strict=True
    ):
        if size % 16 or not _WGMMA_ROWS <= size <= limit:
            return f"{what}={size} is not a multiple of 16 from 64 to {limit}"
    if dtype.itemsize == 1 and kv.head_dim % 32:
        return f"head_dim={kv.head_dim} is not a multiple of 32, which {dtype.name} pages need"
    return None


def decode_tiles(spec: AttentionSpec) -> DecodeTiles:
    """Tiles for a layer: stages of about 32 KiB, and the whole of shared memory in use.

    By Little's law 3.35 TB/s and about a microsecond of latency want 25 KB in flight on each of
    132 multiprocessors. Two thread blocks of three stages, of which one is being worked on, have
    128 KiB on the way, and one computes while the other waits at its barriers.
    """
    shape = _shape_of(spec, _WGMMA_ROWS, jnp.bfloat16)
    columns, token = shape.columns, shape.width  # elements
    block_kv = _WGMMA_ROWS * max(1, 16 * 1024 // (_WGMMA_ROWS * token))
    if columns > 16:  # registers: logits, weights and their sums are block_kv * columns each
        block_kv = _WGMMA_ROWS
    stage = block_kv * token * shape.stored.itemsize
    # Two queries, the weights, a converted block; reductions between warps and barriers.
    other = 2 * (2 * columns * shape.key_dim + columns * block_kv) + 4 * 1024
    other += 2 * block_kv * token if shape.converts else 0
    blocks_per_sm = 2 if 3 * stage + other <= _SMEM_BYTES // 2 and columns <= 32 else 1
    room = (_SMEM_BYTES + _SMEM_RESERVED) // blocks_per_sm - _SMEM_RESERVED - other
    num_stages = min(6, room // stage)
    return DecodeTiles(block_kv=block_kv, num_stages=num_stages, blocks_per_sm=blocks_per_sm)


def attend_decode(
    q: Array,  # [T, N, H]
    kv_pages: Array,  # [L * num_pages, page_size, 2K, H], of a latent cache [.., page_size, 1, H]
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N] float32
    tiles: DecodeTiles | None = None,
    interpret: Any = None,  # InterpretGPUParams; None: the default ones if backend.interpret
) -> Array:
    """Attention of the first `pages.num_decode_rows` tokens: [T, N, out_dim]. Others get zeros."""
    kv = spec.kv
    if tiles is None:
        key = tuning.attention_key(spec)
        tiles = tuning.tiles("gpu_decode", backend.chip, key, decode_tiles(spec))
    if interpret is None and backend.interpret:
        interpret = plgpu.InterpretGPUParams()
    num_workers = tiles.num_workers
    if num_workers is None:
        num_workers = tiles.blocks_per_sm * num_multiprocessors(backend.chip)
        num_workers = 3 if backend.interpret else num_workers  # the interpreter is slow
    num_tokens = q.shape[0]
    num_rows = min(num_tokens, pages.kv_lens.shape[0])  # decode row i has token i
    shape = _shape_of(spec, tiles.block_kv, q.dtype)
    plan = plan_split(
        pages,
        num_rows=num_rows,
        num_heads=kv.num_kv_heads * shape.num_parts,
        block_kv=tiles.block_kv,
        window=spec.window,
        num_workers=num_workers,
    )
    # XLA fuses this padding into whatever makes q; there is none where the group is 8, 16, ...
    grouped = _grouped(as_operand(q[:num_rows], shape.dtype), shape, spec)
    # A key and its value side by side, as they lie in memory: a view.
    pairs = kv_pages.reshape(*kv_pages.shape[:2], kv.num_kv_heads, shape.width)
    first_page = jnp.asarray(layer, jnp.int32).reshape(1) * pages.num_pages
    piece, stats = _pieces(
        grouped,
        pairs,
        pages,
        first_page,
        plan,
        spec=spec,
        shape=shape,
        tiles=tiles,
        interpret=interpret,
    )
    out = _merge(
        piece,
        stats,
        plan.pieces,
        sinks,
        num_rows,
        spec=spec,
        shape=shape,
        dtype=q.dtype,
        interpret=interpret,
    )
    if num_rows < num_tokens:
        out = jnp.pad(out, ((0, num_tokens - num_rows), (0, 0), (0, 0)))
    return out


def _shape_of(spec: AttentionSpec, block_kv: int, q_dtype: jax.typing.DTypeLike) -> _Shape:
    kv = spec.kv
    stored = jnp.dtype(kv.dtype)
    # Registers: an accumulator of 256 rows and 32 columns, or half the rows and twice as many.
    most = (64 if kv.head_dim <= 128 else 32) * stored.itemsize // 2
    num_parts = -(-spec.group // most)
    group = -(-spec.group // num_parts)
    return _Shape(
        num_parts=num_parts,
        group=group,
        columns=_up(group, 8),
        key_dim=kv.head_dim,
        value_dim=kv.out_dim,
        first_value=0 if kv.kind == "latent" else kv.head_dim,
        stored=stored,
        dtype=hopper_operand_dtype(stored, q_dtype),
        copy_tokens=math.gcd(kv.page_size, block_kv),
    )


def _grouped(x: Array, shape: _Shape, spec: AttentionSpec) -> Array:
    """`[..., N, W]` by parts of a kv head's query heads: [..., K * num_parts, columns, W]."""
    *lead, _, width = x.shape
    x = x.reshape(*lead, spec.kv.num_kv_heads, spec.group, width)
    x = _pad(x, shape.num_parts * shape.group)
    x = x.reshape(*lead, spec.kv.num_kv_heads * shape.num_parts, shape.group, width)
    return _pad(x, shape.columns)


def _pad(x: Array, size: int) -> Array:
    """x with zeros behind, so that its last axis but one has that size."""
    return jnp.pad(x, (*[(0, 0)] * (x.ndim - 2), (0, size - x.shape[-2]), (0, 0)))


def _pieces(
    q: Array,  # [R, K * num_parts, columns, H]
    pairs: Array,  # [L * num_pages, page_size, K, width]
    pages: PageMetadata,
    first_page: Array,  # [1] int32
    plan: SplitPlan,
    *,
    spec: AttentionSpec,
    shape: _Shape,
    tiles: DecodeTiles,
    interpret: Any,
) -> tuple[Array, Array]:
    """Every piece's weighted values, and its logits' maximum and sum of weights.

    `[num_pieces, out_rows, columns]` and `[num_pieces, 2, columns]`, float32. What the plan does
    not name is whatever was there.
    """
    kv = spec.kv
    block_kv, num_stages = tiles.block_kv, tiles.num_stages
    columns, key_dim = shape.columns, shape.key_dim
    num_parts = kv.num_kv_heads * shape.num_parts  # of a row
    copies = block_kv // shape.copy_tokens

    def body(
        q_ref: Any,
        pairs_ref: Any,
        len_ref: Any,
        table_ref: Any,
        first_page_ref: Any,
        work_ref: Any,
        piece_ref: Any,
        stats_ref: Any,
        q_smem: Any,
        stages: Any,
        converted: Any,
        weights_smem: Any,
        q_full: Any,
        q_free: Any,
        pairs_full: Any,
        pairs_free: Any,
    ) -> None:
        worker = lax.axis_index("worker")
        first_item, skipped, num_own = (work_ref[worker, field] for field in range(3))
        num_items = work_ref[worker, 3]

        def item_of(index: Any, step: Any) -> tuple[Any, Any, Any, Any, Any]:
            """An item's row and part, its kv_len, its first block here, and how many are here."""
            row = lax.div(first_item + index, jnp.int32(num_parts))
            part = lax.rem(first_item + index, jnp.int32(num_parts))
            kv_len = len_ref[row]
            done = jnp.where(index == 0, skipped, 0)  # by the workers before
            blocks = num_blocks(kv_len, block_kv=block_kv, window=spec.window) - done
            start = first_block(kv_len, block_kv=block_kv, window=spec.window) + done
            return row, part, kv_len, start, jnp.minimum(blocks, num_own - step)

        # Barriers. A stage is *full* when all copies into it have arrived (each copy counts as one
        # arrival with its bytes), *free* when every thread of the computing warpgroup has arrived,
        # which it does after its wgmmas on the stage were waited for. Each side waits for a barrier
        # exactly once a phase: computing for `full` at every use of the stage, loading for `free`
        # before every use but the first, and once more for each at the end, so that none is left
        # half way. The two slots of queries work the same way, once an item.
        @pl.when(lax.axis_index("warpgroup") == 1)
        def _load() -> None:
            page_base = first_page_ref[0]

            def find_pages(row: Any, kv_len: Any, block: Any) -> list[Any]:
                """The page of each copy of a block."""
                last_page = lax.div(kv_len - 1, jnp.int32(kv.page_size))
                pages = []
                for copy in range(copies):
                    token = block * block_kv + copy * shape.copy_tokens
                    # Past the row's end the last page is read again: what it holds is masked.
                    index = jnp.minimum(lax.div(token, jnp.int32(kv.page_size)), last_page)
                    pages.append(page_base + table_ref[row, index])
                return pages

            def load_block(pages: list[Any], head: Any, block: Any, stage: Any) -> None:
                for copy, page in enumerate(pages):
                    source = pairs_ref.at[page, :, head]
                    if shape.copy_tokens < kv.page_size:
                        token = block * block_kv + copy * shape.copy_tokens
                        offset = lax.rem(token, jnp.int32(kv.page_size))
                        source = pairs_ref.at[page, pl.ds(offset, shape.copy_tokens), head]
                    rows = pl.ds(copy * shape.copy_tokens, shape.copy_tokens)
                    plgpu.copy_gmem_to_smem(source, stages.at[stage, rows], pairs_full.at[stage])

            def load_item(index: Any, step: Any) -> Any:
                row, part, kv_len, start, blocks = item_of(index, step)
                head = lax.div(part, jnp.int32(shape.num_parts))
                slot = lax.rem(index, jnp.int32(2))

                @pl.when(index >= 2)
                def _() -> None:
                    plgpu.barrier_wait(q_free.at[slot])

                plgpu.copy_gmem_to_smem(q_ref.at[row, part], q_smem.at[slot], q_full.at[slot])

                @pl.loop(0, blocks)
                def _(block: Any) -> None:
                    stage = lax.rem(step + block, jnp.int32(num_stages))
                    found = find_pages(row, kv_len, start + block)  # while the stage is in use

                    @pl.when(step + block >= num_stages)
                    def _() -> None:
                        plgpu.barrier_wait(pairs_free.at[stage])

                    load_block(found, head, start + block, stage)

                return step + blocks

            lax.fori_loop(0, num_items, load_item, jnp.int32(0))

            @pl.loop(jnp.maximum(num_own - num_stages, 0), num_own)
            def _(step: Any) -> None:
                plgpu.barrier_wait(pairs_free.at[lax.rem(step, jnp.int32(num_stages))])

            @pl.loop(jnp.maximum(num_items - 2, 0), num_items)
            def _(index: Any) -> None:
                plgpu.barrier_wait(q_free.at[lax.rem(index, jnp.int32(2))])

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _compute() -> None:
            def compute_item(index: Any, step: Any) -> Any:
                _, _, kv_len, start, blocks = item_of(index, step)
                slot = lax.rem(index, jnp.int32(2))
                plgpu.barrier_wait(q_full.at[slot])

                def compute_block(block: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
                    outs, top, total = carry  # [rows, columns] each, [columns], [block_kv, columns]
                    stage = lax.rem(step + block, jnp.int32(num_stages))
                    token = (start + block) * block_kv
                    plgpu.barrier_wait(pairs_full.at[stage])
                    pairs_smem = stages.at[stage]
                    if shape.converts:
                        # Barriers on both sides: no warp is still multiplying the block before.
                        width = math.gcd(shape.convert_width, key_dim)
                        widen_for_wgmma(pairs_smem, converted, rows=block_kv, columns=width)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(pairs_free.at[stage])
                        pairs_smem = converted
                    values = pairs_smem.at[:, pl.ds(shape.first_value, shape.value_dim)]
                    _forget_unseen(values, token, kv_len, spec=spec)

                    keys = pairs_smem.at[:, pl.ds(0, key_dim)]
                    logits = _multiply(keys, q_smem.at[slot].transpose((1, 0)))
                    logits = _base2(logits, spec)
                    seen = _seen(token, kv_len, logits.shape, spec)
                    logits = jnp.where(seen, logits, _NEVER)
                    # A block has a token that is seen, so from here on the maximum is a logit and
                    # exp2(_NEVER - it) is zero.
                    new_top = jnp.maximum(top, logits.max(axis=0))
                    weights = jnp.exp2(logits - lax.broadcast_in_dim(new_top, logits.shape, [1]))
                    decay = jnp.exp2(top - new_top)
                    # Summed over tokens once, at the end: a sum across warps costs two barriers.
                    total = total * lax.broadcast_in_dim(decay, total.shape, [1]) + weights

                    # All warps have passed the barriers of the maximum, so none is still reading
                    # the weights of the block before.
                    weights_smem.transpose((1, 0))[...] = weights.astype(shape.dtype)
                    plgpu.commit_smem()  # wgmma reads through the async proxy: fence, then barrier

                    def add(out: Any, first: int) -> Any:
                        columns = pl.ds(shape.first_value + first, out.shape[0])
                        span = pairs_smem.at[:, columns].transpose((1, 0))
                        out = out * lax.broadcast_in_dim(decay, out.shape, [1])
                        p = weights_smem.transpose((1, 0))
                        return _multiply_onto(out, span, p, interpret=interpret is not None)

                    outs = tuple(
                        add(out, first) for out, (first, _) in zip(outs, shape.spans, strict=True)
                    )
                    if not shape.converts:
                        plgpu.barrier_arrive(pairs_free.at[stage])
                    return outs, new_top, total

                nothing = (
                    tuple(_zeros((rows, columns)) for _, rows in shape.spans),
                    plgpu.layout_cast(jnp.full((columns,), _NEVER, jnp.float32), _COLUMNS),
                    _zeros((block_kv, columns)),
                )
                outs, top, total = lax.fori_loop(0, blocks, compute_block, nothing)
                plgpu.barrier_arrive(q_free.at[slot])
                piece = first_item + index + worker
                first_row = 0
                for out in outs:
                    piece_ref[piece, pl.ds(first_row, out.shape[0])] = out
                    first_row += out.shape[0]
                stats_ref[piece, 0] = top
                stats_ref[piece, 1] = total.sum(axis=0)
                return step + blocks

            lax.fori_loop(0, num_items, compute_item, jnp.int32(0))

    def smem(dims: tuple[int, ...], dtype: jnp.dtype) -> Any:
        """Swizzled in the widest tiles that part a key from its value, or what is converted."""
        row = math.gcd(key_dim, shape.convert_width) * dtype.itemsize
        swizzle = next(size for size in (128, 64, 32) if row % size == 0)
        tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))  # pyright: ignore[reportAbstractUsage]
        swizzling = plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(dims, dtype, transforms=(tiling, swizzling))

    run = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((plan.num_pieces, shape.out_rows, columns), jnp.float32),
            jax.ShapeDtypeStruct((plan.num_pieces, 2, columns), jnp.float32),
        ],
        grid=(plan.work.shape[0],),
        grid_names=("worker",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[
            smem((2, columns, key_dim), shape.dtype),
            smem((num_stages, block_kv, shape.width), shape.stored),
            smem((block_kv, shape.width), shape.dtype) if shape.converts else (),
            smem((columns, block_kv), shape.dtype),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=copies, num_barriers=num_stages),
            plgpu.Barrier(num_barriers=num_stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode",
        **({} if interpret is None else {"interpret": interpret}),
    )
    return run(q, pairs, pages.kv_lens, pages.page_table, first_page, plan.work)


def _multiply(a: Any, b: Any) -> Any:
    """a [M, K] @ b [K, N] of shared memory in float32, by wgmmas that are waited for."""

    def issue(acc: Any) -> Any:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(issue, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def _multiply_onto(start: Any, a: Any, b: Any, *, interpret: bool) -> Any:
    """start + a @ b, in the registers of `start`."""
    if interpret:  # which knows no accumulator that starts at a value
        return start + _multiply(a, b)
    added = pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))
    return added(plgpu.WGMMAAccumulatorRef.init(start))


def _zeros(dims: tuple[int, int]) -> Any:
    return plgpu.layout_cast(jnp.zeros(dims, jnp.float32), plgpu.Layout.WGMMA)


def _seen(token: Any, kv_len: Any, dims: tuple[int, ...], spec: AttentionSpec) -> Any:
    """Which of the tokens along axis 0, from `token` on, the row's newest one sees."""
    position = token + plgpu.broadcasted_iota(jnp.int32, dims, 0, layout=plgpu.Layout.WGMMA)
    seen = position < kv_len
    if spec.window is not None:
        seen &= position >= kv_len - spec.window
    return seen


def _forget_unseen(values: Any, token: Any, kv_len: Any, *, spec: AttentionSpec) -> None:
    """Zero the values of a row's first or last block that are not seen.

    Their weights are zero, but they may hold anything, and 0 * NaN is NaN. Keys need no care: a
    logit is replaced before it is used.
    """
    block_kv, value_dim = values.shape
    is_edge = token + block_kv > kv_len
    if spec.window is not None:
        is_edge |= token < kv_len - spec.window

    @pl.when(is_edge)
    def _() -> None:
        width = math.gcd(64, value_dim)
        for column in range(0, value_dim, width):
            part = values.at[:, pl.ds(column, width)]
            held = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            seen = _seen(token, kv_len, held.shape, spec)
            part[...] = jnp.where(seen, held, jnp.zeros_like(held))
        plgpu.commit_smem()  # before wgmma reads it, and before TMA writes there again


def _base2(logits: Any, spec: AttentionSpec) -> Any:
    """Scaled and capped logits, times log2(e)."""
    if spec.soft_cap is None:
        return logits * (spec.scale * _LOG2E)
    # tanh(x) = 1 - 2 / (exp(2x) + 1): the GPU's own tanh is good to 11 bits, times the cap.
    power = jnp.exp2(logits * (2 * _LOG2E * spec.scale / spec.soft_cap))
    return (spec.soft_cap * _LOG2E) * (1.0 - 2.0 / (power + 1.0))


def _merge(
    piece: Array,  # [num_pieces, out_rows, columns]
    stats: Array,  # [num_pieces, 2, columns]
    pieces: Array,  # [R * K, 2]
    sinks: Array | None,  # [N]
    num_rows: int,  # R
    *,
    spec: AttentionSpec,
    shape: _Shape,
    dtype: Any,
    interpret: Any,
) -> Array:
    """Attention of R rows, [R, N, value_dim], from their pieces; zeros for rows that have none."""
    num_parts = spec.kv.num_kv_heads * shape.num_parts
    value_dim = shape.value_dim
    _, out_rows, columns = piece.shape
    rows = math.gcd(out_rows, 2 * _WGMMA_ROWS)  # a thread block's share of them
    # They are rows * columns / 128 registers a thread; loads in flight hide their latency.
    unroll = max(1, min(8, 64 * 128 // (rows * columns)))
    if sinks is None:
        sinks = jnp.full((spec.num_heads,), _NEVER, jnp.float32)
    sinks = _grouped(sinks[:, None] * _LOG2E, shape, spec)[..., 0]  # [K * num_parts, columns]

    def body(
        piece_ref: Any, stats_ref: Any, pieces_ref: Any, sinks_ref: Any, out_ref: Any, smem: Any
    ) -> None:
        part, row = lax.axis_index("part"), lax.axis_index("row")
        share = pl.ds(lax.axis_index("share") * rows, rows)
        item = row * num_parts + part
        first, num = pieces_ref[item, 0], pieces_ref[item, 1]

        def column_vector(ref: Any) -> Any:
            return plgpu.load(ref, layout=_COLUMNS, optimized=False)

        def across(vector: Any) -> Any:
            return lax.broadcast_in_dim(vector, (rows, columns), [1])

        def add(chunk: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            out, top, total = carry
            tops, totals, outs = [], [], []
            for index in range(unroll):  # loads first: they do not wait for each other
                index = chunk * unroll + index
                at = first + jnp.minimum(index, num - 1)
                maximum = column_vector(stats_ref.at[at, 0])
                tops.append(
                    maximum + jnp.where(index < num, 0.0, _NEVER)
                )  # by a scalar: no vector of bools
                totals.append(column_vector(stats_ref.at[at, 1]))
                values = piece_ref.at[at, share]
                outs.append(plgpu.load(values, layout=plgpu.Layout.WGMMA, optimized=False))
            new_top = top
            for maximum in tops:
                new_top = jnp.maximum(new_top, maximum)
            decay = jnp.exp2(top - new_top)
            out, total = out * across(decay), total * decay
            for maximum, weight, values in zip(tops, totals, outs, strict=True):
                decay = jnp.exp2(maximum - new_top)
                out += values * across(decay)
                total += weight * decay
            return out, new_top, total

        nothing = (
            _zeros((rows, columns)),
            plgpu.layout_cast(jnp.full((columns,), _NEVER, jnp.float32), _COLUMNS),
            plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), _COLUMNS),
        )
        chunks = lax.div(num + (unroll - 1), jnp.int32(unroll))
        out, top, total = lax.fori_loop(0, chunks, add, nothing)
        total += jnp.exp2(column_vector(sinks_ref.at[part]) - top)
        out = out / across(jnp.maximum(total, 1e-30))  # zeros where there was nothing
        smem.transpose((1, 0))[...] = out.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, shape.group)], out_ref.at[row, part, :, share])
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, num_parts, shape.group, out_rows), dtype),
        grid=(out_rows // rows, num_parts, num_rows),
        grid_names=("share", "part", "row"),
        scratch_types=[plgpu.SMEM((columns, rows), dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode_merge",
        **({} if interpret is None else {"interpret": interpret}),
    )
    out = run(piece, stats, pieces, sinks)
    out = out.reshape(num_rows, spec.kv.num_kv_heads, shape.num_parts * shape.group, out_rows)
    out = out[:, :, : spec.group].reshape(num_rows, spec.num_heads, out_rows)
    if out_rows == value_dim:
        return out
    whole = value_dim - value_dim % _WGMMA_ROWS
    return jnp.concatenate([out[..., :whole], out[..., out_rows - (value_dim - whole) :]], axis=-1)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

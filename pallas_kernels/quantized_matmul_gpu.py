"""Products of few rows by stored weights on NVIDIA Hopper (Pallas, Mosaic GPU).

cuBLAS multiplies by a bfloat16 copy of an 8-bit weight, which XLA makes anew at each call: 5 bytes
move for a weight of one (read off: 117 MiB of temporaries for 4096 x 14336 int8). XLA's Triton
fusions convert on the way, but a program that scans over layers has to do without them (they copy
each layer's matrices), and scales of blocks make a copy with them, too.
Here weights go from HBM to shared memory as they are stored, become 16 bits on their way through
registers, and are `wgmma`'s left operand, 128 output channels as its rows; tokens are its columns,
so 8 tokens are not padded to 64. One warpgroup loads (TMA, in stages), one converts and multiplies,
or two do, where rows of x are so many that reading them again for other channels would count.

A thread block takes some channels, a *visit* (an expert and up to `columns` of its rows of x) and a
share of the inputs. Its sums go to a place of their own, and XLA adds shares, applies scales a
channel and puts rows in order: nothing is as large as [E, T, F]. All operands lie in shared memory,
so that the interpreter runs what the GPU runs. Scales of blocks of inputs multiply the sums of
their block. The same kernel serves `grouped_matmul`, with bfloat16 weights, too.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.backend import Backend
from pallas_kernels.chips import Chip
from pallas_kernels.quantized import QuantizedArray, spread_columns

_MAX_COLUMNS = 64  # rows of x a visit: an accumulator of 128 x 64 is 64 registers a thread
_MAX_DENSE_ROWS = 256  # four visits; an estimate, for none of this was timed
_WIDE_COLUMNS = 32  # from here on two warpgroups compute on the same rows of x
_NUM_MULTIPROCESSORS = 132


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How a thread block works. Static."""

    warpgroups: int  # that compute, on the same rows of x
    channels: int  # of the output a warpgroup: wgmma's rows
    columns: int  # rows of x: wgmma's columns
    inputs: int  # a step
    product: int  # inputs that are multiplied at once: a step, or the part of one of a scale
    num_stages: int
    num_splits: int  # shares of the inputs, added afterwards


class RowVisits(NamedTuple):
    """Rows of x by the expert that they go to; V is at least the number of visits."""

    num_visits: Array  # [1] int32
    experts: Array  # [V] int32
    x: Array  # [V, columns, D]: copied, as TMA reads tiles of 8 rows and groups start anywhere


def why_not(
    weight: Array | QuantizedArray,
    *,
    chip: Chip,
    x: Array | jax.ShapeDtypeStruct | None = None,
    dynamic_activations: bool = False,
) -> str | None:
    """Why this kernel cannot multiply by such a weight [..., D, F], or None if it can.

    `x` may be left out: then it stands for a few rows of 16 bits.
    """
    if chip.sm != 90:
        return f"it is for compute capability 9.0 (wgmma), this is {chip}"
    D, F = weight.shape[-2:]
    if D % 128 or F % 64:
        return f"{D} inputs are not a multiple of 128, or {F} outputs of 64"
    if dynamic_activations:
        return "dynamic activations: XLA multiplies 8 bits by 8 bits, this kernel 16 by 16"
    if x is not None and x.dtype.name not in ("bfloat16", "float16"):
        return f"x of {x.dtype}: it takes bfloat16 and float16"
    if x is not None and len(weight.shape) == 2 and x.shape[0] > _MAX_DENSE_ROWS:
        return (
            f"{x.shape[0]} rows: it converts the weight for every {_MAX_COLUMNS} of them, which "
            f"beyond {_MAX_DENSE_ROWS} is taken to cost more than a converted copy"
        )
    if not isinstance(weight, QuantizedArray):
        if weight.dtype.name not in ("bfloat16", "float16"):
            return f"weights of {weight.dtype}: it takes bfloat16 and float16"
        return None
    rows, columns = weight.block_rows, weight.block[1]
    if D % rows or rows % _least_product(weight):
        least = _least_product(weight)
        return f"blocks of {rows} inputs do not divide {D}, or are no multiple of {least}"
    if columns > 1 and columns % 64:
        return f"blocks of {columns} outputs are no multiple of 64"
    if weight.zeros is not None and len(weight.shape) == 3:
        return "experts with zero points"
    return None


def _least_product(weight: QuantizedArray) -> int:
    """Inputs of the smallest block: 32 rows as stored, two of wgmma's steps."""
    return 64 if weight.format == "int4" else 32


def quantized_matmul_gpu(x: Array, weight: QuantizedArray, *, backend: Backend) -> Array:
    """x [T, D] @ weight [D, F] -> [T, F] in x's type. See `why_not` for what it takes."""
    T = x.shape[0]
    if T == 0:
        return jnp.zeros((0, weight.out_dim), x.dtype)
    experts = jax.tree.map(lambda part: part[None], weight)
    tile = make_tile(experts, num_rows=T)
    num_visits = -(-T // tile.columns)
    x_padded = jnp.pad(x, ((0, num_visits * tile.columns - T), (0, 0)))
    visits = RowVisits(
        num_visits=jnp.full((1,), num_visits, jnp.int32),
        experts=jnp.zeros((num_visits,), jnp.int32),
        x=x_padded.reshape(num_visits, tile.columns, -1),
    )
    sums = visit_products(visits, experts, tile, backend=backend)
    out = sums.reshape(num_visits * tile.columns, -1)[:T]
    if scales_follow(weight):
        out = out * weight.scales.astype(jnp.float32)
    if weight.zeros is not None:
        blocks = x.astype(jnp.float32).reshape(T, -1, weight.block_rows).sum(-1)
        zeros = weight.zeros.astype(jnp.float32) * weight.scales.astype(jnp.float32)
        zeros = spread_columns(zeros, weight.block[1], weight.out_dim)
        out = out - jnp.matmul(blocks, zeros, precision=lax.Precision.HIGHEST)
    return out.astype(x.dtype)


def scales_follow(weight: Array | QuantizedArray) -> bool:
    """Whether scales are one a channel, and so for whoever has the sums to apply."""
    return isinstance(weight, QuantizedArray) and weight.scales.shape[-2] == weight.block[1] == 1


def make_tile(weights: Array | QuantizedArray, *, num_rows: int) -> Tile:
    """The tile for experts [E, D, F] that share `num_rows` rows of x.

    A multiprocessor has two computing warpgroups, so that one waits while the other computes: in
    thread blocks of their own where rows of x are few, in one, to read x once, where they are many.
    """
    E, D, F = weights.shape
    quantized = isinstance(weights, QuantizedArray)
    int4 = quantized and weights.format == "int4"
    channels = 128 if F % 128 == 0 else 64
    inputs = product = 128 if quantized else 64
    if quantized and not scales_follow(weights):
        product = math.gcd(inputs, weights.block_rows)
        inputs = max(product, 128 if int4 else 64)  # 64 rows as stored, those of a warpgroup
        if weights.block[1] > 1:
            channels = math.gcd(channels, weights.block[1])
    used = min(E, num_rows)  # experts, at most
    rows = -(-num_rows // used)
    # Sums of small blocks of inputs take registers besides those of all.
    most = _MAX_COLUMNS if product == inputs else _MAX_COLUMNS // 2
    columns = min(max(1 << (rows - 1).bit_length(), 8), most)
    warpgroups = 2 if columns >= _WIDE_COLUMNS and F % (2 * channels) == 0 else 1
    steps = D // inputs
    blocks = F // (channels * warpgroups) * used * -(-rows // columns)
    splits = max(1, min(_NUM_MULTIPROCESSORS * 2 // warpgroups // blocks, steps // 8))
    while steps % splits:
        splits -= 1
    weight_bytes = (inputs // 2 if int4 else inputs) * channels * warpgroups
    if not quantized:
        weight_bytes *= 2
    stage = weight_bytes + columns * inputs * 2
    stages = max(2, min(warpgroups * (72 << 10) // stage, 8, steps // splits))
    return Tile(
        warpgroups=warpgroups,
        channels=channels,
        columns=columns,
        inputs=inputs,
        product=product,
        num_stages=stages,
        num_splits=splits,
    )


def visit_products(
    visits: RowVisits, weights: Array | QuantizedArray, tile: Tile, *, backend: Backend
) -> Array:
    """Each visit's rows of x by its expert of weights [E, D, F]: [V, columns, F] float32.

    Scales a channel are not applied. Visits that are not in use hold whatever was there.
    """
    x, V = visits.x, visits.experts.shape[0]
    E, D, F = weights.shape
    quantized = isinstance(weights, QuantizedArray)
    int4 = quantized and weights.format == "int4"
    values = weights.values if quantized else weights
    if int4:
        # A byte is two inputs, and so are its operands: x by even and by odd inputs.
        values = lax.bitcast_convert_type(values, jnp.int8)
        x = x.reshape(V, tile.columns, D // 2, 2) * jnp.array([1, 1 / 16], x.dtype)
        x = x.swapaxes(2, 3).reshape(V, tile.columns, D)
    row_exponents = None
    if quantized and weights.format.startswith("float8"):
        # The hardware converts float8 to float16 only, which holds both kinds exactly. x goes there
        # scaled by a power of two: a row's largest value becomes 2 ** 8 at most.
        largest = jnp.abs(x.astype(jnp.float32)).max(-1, keepdims=True)
        row_exponents = jnp.frexp(largest)[1] - 8  # [V, columns, 1]
        x = jnp.ldexp(x.astype(jnp.float32), -row_exponents).astype(jnp.float16)
    halves = 2 if int4 else 1
    width, part_width = tile.inputs // halves, tile.product // halves  # rows of values as stored
    num_steps = D // tile.inputs // tile.num_splits
    strips = F // (tile.channels * tile.warpgroups)
    block_scales = None
    scale_columns = 0
    if quantized and not scales_follow(weights):
        block_scales = weights.scales.astype(jnp.float32)
        scale_columns = weights.block[1]
        if scale_columns == 1:
            block_scales = block_scales.reshape(E, -1, F // tile.channels, tile.channels)
    block_rows = weights.block_rows if quantized else D
    operand, stored = x.dtype, values.dtype
    converts = stored != operand
    num_stages = tile.num_stages

    def body(
        x_ref: Any,
        w_ref: Any,
        num_ref: Any,
        experts_ref: Any,
        *rest: Any,
    ) -> None:
        *scales_refs, out_ref, x_smem, w_smem, converted, full, free = rest
        strip, visit, split = (lax.axis_index(name) for name in ("strip", "visit", "split"))
        warpgroup = lax.axis_index("warpgroup")
        in_use = visit < num_ref[0]
        expert = experts_ref[visit]
        first_step = split * num_steps

        # A stage is *full* when its copies have arrived, *free* when the computing warpgroups are
        # done with it. Loading waits for `free` before every use of a stage but the first, and
        # once more for each at the end, so that no barrier is left half way.
        @pl.when(in_use & (warpgroup == tile.warpgroups))
        def _load() -> None:
            @pl.loop(0, num_steps)
            def _(step: Any) -> None:
                stage = lax.rem(step, jnp.int32(num_stages))

                @pl.when(step >= num_stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[stage])

                row = pl.multiple_of((first_step + step) * width, width)
                for part in range(tile.warpgroups):
                    first = (strip * tile.warpgroups + part) * tile.channels
                    first = pl.multiple_of(first, tile.channels)
                    plgpu.copy_gmem_to_smem(
                        w_ref.at[expert, pl.ds(row, width), pl.ds(first, tile.channels)],
                        w_smem.at[stage, part],
                        full.at[stage],
                    )
                for half in range(halves):
                    column = pl.multiple_of(half * (D // halves) + row, width)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[visit, :, pl.ds(column, width)],
                        x_smem.at[stage, half],
                        full.at[stage],
                    )

            @pl.loop(max(num_steps - num_stages, 0), num_steps)
            def _(step: Any) -> None:
                plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(num_stages))])

        @pl.when(in_use & (warpgroup < tile.warpgroups))
        def _compute() -> None:
            channel = strip * tile.warpgroups + warpgroup

            def operands(step: Any) -> list[list[tuple[Any, Any]]]:
                """Of each product of a step, what a wgmma takes: (weights, x), when both are there.

                The stage has to be full.
                """
                stage = lax.rem(step, jnp.int32(num_stages))
                plgpu.barrier_wait(full.at[stage])
                w = w_smem.at[stage, warpgroup]
                if converts:
                    _convert(w, converted.at[warpgroup], operand, int4=int4)
                found = []
                for first in range(0, width, part_width):
                    rows = pl.ds(first, part_width)
                    ws = [converted.at[warpgroup, h] for h in range(halves)] if converts else [w]
                    xs = [x_smem.at[stage, half] for half in range(halves)]
                    if part_width < width:
                        ws, xs = [w.at[rows] for w in ws], [x.at[:, rows] for x in xs]
                    found.append(
                        [
                            (w.transpose((1, 0)), x.transpose((1, 0)))
                            for w, x in zip(ws, xs, strict=True)
                        ]
                    )
                return found

            def done(step: Any) -> None:
                plgpu.barrier_arrive(free.at[lax.rem(step, jnp.int32(num_stages))])

            def scale_of(step: Any, part: int) -> Any:
                """The scale of a product's sums, or one a channel."""
                first = (first_step + step) * tile.inputs + part * tile.product
                block = lax.div(first, jnp.int32(block_rows))
                if scale_columns > 1:
                    place = lax.div(channel * tile.channels, jnp.int32(scale_columns))
                    return scales_refs[0][expert, block, place]
                scale = plgpu.load(
                    scales_refs[0].at[expert, block, channel],
                    layout=plgpu.Layout.WGMMA.reduce(1),
                    optimized=False,
                )
                return lax.broadcast_in_dim(scale, (tile.channels, tile.columns), [0])

            def multiply_scaled(step: Any, total: Any) -> Any:
                # Scales are read before the wait, which hides it.
                scales = [scale_of(step, part) for part in range(width // part_width)]
                for scale, pairs in zip(scales, operands(step), strict=True):
                    total = total + _multiply(pairs) * scale
                done(step)
                return total

            def multiply_all(acc: Any) -> Any:
                @pl.loop(0, num_steps)
                def _(step: Any) -> None:
                    for pairs in operands(step):
                        _accumulate(acc, pairs)
                    done(step)

                return acc[...]

            shape = (tile.channels, tile.columns)
            if block_scales is None:
                total = pl.run_scoped(multiply_all, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
            else:
                zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
                total = lax.fori_loop(0, num_steps, multiply_scaled, zeros)
            out_ref[split, visit, channel] = total

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (tile.num_splits, V, F // tile.channels, tile.channels, tile.columns), jnp.float32
        ),
        grid=(strips, V, tile.num_splits),
        grid_names=("strip", "visit", "split"),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            _smem((num_stages, halves, tile.columns, width), operand, part_width),
            _smem((num_stages, tile.warpgroups, width, tile.channels), stored),
            _smem((tile.warpgroups, halves, width, tile.channels), operand, part_width)
            if converts
            else (),
            plgpu.Barrier(num_arrivals=tile.warpgroups + halves, num_barriers=num_stages),
            plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=num_stages),
        ],
        kernel_name="visit_products",
        **({"interpret": interpreter()} if backend.interpret else {}),
    )
    inputs = [x, values, visits.num_visits, visits.experts]
    sums = run(*inputs, *([] if block_scales is None else [block_scales]))
    sums = sums.sum(0) if tile.num_splits > 1 else sums[0]  # [V, F / channels, channels, columns]
    sums = sums.reshape(V, F, tile.columns).swapaxes(1, 2)
    return sums if row_exponents is None else jnp.ldexp(sums, row_exponents)


def interpreter() -> Any:
    """What interprets the kernel where a backend says so."""
    return plgpu.InterpretGPUParams()


def _smem(dims: tuple[int, ...], dtype: Any, part: int | None = None) -> Any:
    """Shared memory as wgmma and TMA swizzle it, so that `part` of the last axis can be sliced."""
    itemsize = jnp.dtype(dtype).itemsize
    size = (part or dims[-1]) * itemsize
    swizzle = next(each for each in (128, 64, 32) if size % each == 0)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    swizzling = plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(dims, dtype, transforms=(tiling, swizzling))


def _convert(stage: Any, target: Any, dtype: Any, *, int4: bool) -> None:
    """A stage of stored values as 16-bit operands. Barriers on both sides of the stores."""
    values = plgpu.load(stage, layout=plgpu.Layout.WGMMA_8BIT)
    if int4:  # bytes know no shifts: 16 times the high nibbles, for x of odd inputs is a 16th
        target[0] = ((values & jnp.int8(15)) ^ jnp.int8(8)).astype(dtype) - jnp.asarray(8, dtype)
        target[1] = (values & jnp.int8(-16)).astype(dtype)
    else:
        target[0] = values.astype(dtype)
    plgpu.commit_smem()


def _multiply(pairs: list[tuple[Any, Any]]) -> Any:
    """The sum of each a [M, K] @ b [K, N] of shared memory, in float32."""

    def issue(acc: Any) -> Any:
        _accumulate(acc, pairs)
        return acc[...]

    shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])
    return pl.run_scoped(issue, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _accumulate(acc: Any, pairs: list[tuple[Any, Any]]) -> None:
    """Adds each a @ b to an accumulator, by wgmmas that are waited for."""
    for a, b in pairs:
        plgpu.wgmma(acc, a, b)
    plgpu.wgmma_wait(0)

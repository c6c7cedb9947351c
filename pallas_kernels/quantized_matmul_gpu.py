"""Products of few rows by stored weights on NVIDIA Hopper (Pallas, Mosaic GPU).

XLA:GPU with cuBLAS multiplies by a bfloat16 copy of an 8-bit weight, which it makes anew at each
call: 5 bytes move for a weight of one (read off: 116 MiB of temporaries for 4096 x 14336 int8).
Here weights go from HBM to shared memory as they are stored, become bfloat16 on their way through
registers, and are `wgmma`'s left operand, 128 output channels as its rows; tokens are its columns,
so 8 tokens are not padded to 64. One warpgroup loads (TMA, in stages), one converts and multiplies.

A thread block takes some channels, a *visit* (an expert and up to `columns` of its rows of x) and a
share of the inputs. Its sums go to a place of their own, and XLA adds shares, applies scales a
channel and puts rows in order: nothing is as large as [E, T, F]. All operands lie in shared memory,
so that the interpreter runs what the GPU runs. Scales of blocks of inputs multiply the sums of
their step. The same kernel serves `grouped_matmul`, with bfloat16 weights, too.
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
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.quantized_matmul_xla import quantized_matmul_xla

_MAX_COLUMNS = 64  # rows of x a visit: two accumulators of 128 x 64 are half of the registers
_MAX_KERNEL_ROWS = 256  # of a dense product: beyond, cuBLAS on a converted copy
_BLOCKS_WANTED = 264  # two a multiprocessor of an H100
_STAGE_BYTES = 72 << 10  # of weights in flight a thread block


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How a thread block works. Static."""

    channels: int  # of the output: wgmma's rows
    columns: int  # rows of x: wgmma's columns
    inputs: int  # a step
    num_stages: int
    num_splits: int  # shares of the inputs, added afterwards


class RowVisits(NamedTuple):
    """Rows of x by the expert that they go to; V is at least the number of visits."""

    num_visits: Array  # [1] int32
    experts: Array  # [V] int32
    x: Array  # [V, columns, D]: copied, as TMA reads tiles of 8 rows and groups start anywhere


def why_not(weight: Array | QuantizedArray, *, chip: Chip) -> str | None:
    """Why this kernel cannot multiply by such a weight [..., D, F], or None if it can."""
    if chip.sm != 90:
        return f"it is for compute capability 9.0 (wgmma), this is {chip}"
    D, F = weight.shape[-2:]
    if D % 128 or F % 64:
        return f"{D} inputs are not a multiple of 128, or {F} outputs of 64"
    if not isinstance(weight, QuantizedArray):
        if weight.dtype.name not in ("bfloat16", "float16"):
            return f"weights of {weight.dtype}: it takes bfloat16 and float16"
        return None
    rows, columns = weight.block_rows, weight.block[1]
    if D % rows or rows % 32 or (weight.format == "int4" and rows % 64):
        return f"blocks of {rows} inputs do not divide {D}, or are too small to multiply alone"
    if columns > 1 and columns % 64:
        return f"blocks of {columns} outputs are no multiple of 64"
    if weight.zeros is not None and len(weight.shape) == 3:
        return "experts with zero points"
    return None


def quantized_matmul_gpu(
    x: Array, weight: QuantizedArray, *, backend: Backend, dynamic_activations: bool = False
) -> Array:
    """x [T, D] @ weight [D, F] -> [T, F] in x's type.

    More than 256 rows, rows of float32, and dynamic activations are left to XLA: cuBLAS, which
    multiplies 8 bits by 8 bits, and pays for a converted copy of the weight less the more rows.
    """
    T = x.shape[0]
    if T == 0 or T > _MAX_KERNEL_ROWS or dynamic_activations or x.dtype == jnp.float32:
        return quantized_matmul_xla(x, weight, dynamic_activations=dynamic_activations)
    experts = jax.tree.map(lambda part: part[None], weight)
    tile = make_tile(experts, num_rows=T, max_visits=-(-T // _MAX_COLUMNS))
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
        zeros = jnp.repeat(zeros, weight.block[1], axis=-1)[:, : weight.out_dim]
        out = out - jnp.matmul(blocks, zeros, precision=lax.Precision.HIGHEST)
    return out.astype(x.dtype)


def scales_follow(weight: Array | QuantizedArray) -> bool:
    """Whether scales are one a channel, and so for whoever has the sums to apply."""
    return isinstance(weight, QuantizedArray) and weight.scales.shape[-2] == weight.block[1] == 1


def make_tile(weights: Array | QuantizedArray, *, num_rows: int, max_visits: int) -> Tile:
    """The tile for experts [E, D, F] of which each has about `num_rows` rows of x."""
    D, F = weights.shape[-2:]
    channels = 128 if F % 128 == 0 else 64
    inputs, bytes_a_weight = 128, 1.0
    if isinstance(weights, QuantizedArray):
        if not scales_follow(weights):
            inputs = math.gcd(inputs, weights.block_rows)
            if weights.block[1] > 1:
                channels = math.gcd(channels, weights.block[1])
        bytes_a_weight = 0.5 if weights.format == "int4" else 1.0
    else:
        inputs, bytes_a_weight = 64, 2.0
    columns = min(max(1 << (max(num_rows, 1) - 1).bit_length(), 8), _MAX_COLUMNS)
    steps = D // inputs
    blocks = F // channels * max_visits
    splits = max(1, min(_BLOCKS_WANTED // blocks, steps // 8))
    while steps % splits:
        splits -= 1
    stage = int(inputs * channels * bytes_a_weight) + columns * inputs * 2
    stages = max(2, min(_STAGE_BYTES // stage, 8, steps // splits))
    return Tile(
        channels=channels, columns=columns, inputs=inputs, num_stages=stages, num_splits=splits
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
    width = tile.inputs // halves  # rows of stored values a step
    num_steps = D // tile.inputs // tile.num_splits
    block_scales = None
    scale_columns = 0
    if quantized and not scales_follow(weights):
        block_scales = weights.scales.astype(jnp.float32)
        scale_columns = weights.block[1]
        if scale_columns == 1:
            block_scales = block_scales.reshape(E, -1, F // tile.channels, tile.channels)
    steps_a_block = 1 if block_scales is None else weights.block_rows // tile.inputs
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
        channel, visit, split = (lax.axis_index(name) for name in ("channel", "visit", "split"))
        in_use = visit < num_ref[0]
        expert = experts_ref[visit]
        first_step = split * num_steps

        # A stage is *full* when its copies have arrived, *free* when the computing warpgroup is
        # done with it. Loading waits for `free` before every use of a stage but the first, and
        # once more for each at the end, so that no barrier is left half way.
        @pl.when(in_use & (lax.axis_index("warpgroup") == 1))
        def _load() -> None:
            first_channel = pl.multiple_of(channel * tile.channels, tile.channels)

            @pl.loop(0, num_steps)
            def _(step: Any) -> None:
                stage = lax.rem(step, jnp.int32(num_stages))

                @pl.when(step >= num_stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[stage])

                row = pl.multiple_of((first_step + step) * width, width)
                plgpu.copy_gmem_to_smem(
                    w_ref.at[expert, pl.ds(row, width), pl.ds(first_channel, tile.channels)],
                    w_smem.at[stage],
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

        @pl.when(in_use & (lax.axis_index("warpgroup") == 0))
        def _compute() -> None:
            def multiply(step: Any, total: Any) -> Any:
                stage = lax.rem(step, jnp.int32(num_stages))
                scale = None
                if block_scales is not None:  # read before the wait, which hides it
                    block = lax.div(first_step + step, jnp.int32(steps_a_block))
                    if scale_columns == 1:
                        scale = plgpu.load(
                            scales_refs[0].at[expert, block, channel],
                            layout=plgpu.Layout.WGMMA.reduce(1),
                            optimized=False,
                        )
                        scale = lax.broadcast_in_dim(scale, total.shape, [0])
                    else:
                        place = lax.div(channel * tile.channels, jnp.int32(scale_columns))
                        scale = scales_refs[0][expert, block, place]
                plgpu.barrier_wait(full.at[stage])
                if converts:
                    _convert(w_smem.at[stage], converted, operand, int4=int4)
                part = None
                for half in range(halves):
                    w = converted.at[half] if converts else w_smem.at[stage]
                    product = _multiply(
                        w.transpose((1, 0)), x_smem.at[stage, half].transpose((1, 0))
                    )
                    part = product if part is None else part + product
                plgpu.barrier_arrive(free.at[stage])
                if scale is not None:
                    part = part * scale
                return total + part

            zeros = jnp.zeros((tile.channels, tile.columns), jnp.float32)
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            out_ref[split, visit, channel] = lax.fori_loop(0, num_steps, multiply, zeros)

    def smem(dims: tuple[int, ...], dtype: Any) -> Any:
        itemsize = jnp.dtype(dtype).itemsize
        swizzle = next(size for size in (128, 64, 32) if dims[-1] * itemsize % size == 0)
        tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
        swizzling = plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(dims, dtype, transforms=(tiling, swizzling))

    interpret = {"interpret": plgpu.InterpretGPUParams()} if backend.interpret else {}
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (tile.num_splits, V, F // tile.channels, tile.channels, tile.columns), jnp.float32
        ),
        grid=(F // tile.channels, V, tile.num_splits),
        grid_names=("channel", "visit", "split"),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[
            smem((num_stages, halves, tile.columns, width), operand),
            smem((num_stages, width, tile.channels), stored),
            smem((halves, width, tile.channels), operand) if converts else (),
            plgpu.Barrier(num_arrivals=1 + halves, num_barriers=num_stages),
            plgpu.Barrier(num_barriers=num_stages),
        ],
        kernel_name="visit_products",
        **interpret,
    )
    inputs = [x, values, visits.num_visits, visits.experts]
    sums = run(*inputs, *([] if block_scales is None else [block_scales]))
    sums = sums.sum(0) if tile.num_splits > 1 else sums[0]  # [V, F / channels, channels, columns]
    sums = sums.reshape(V, F, tile.columns).swapaxes(1, 2)
    return sums if row_exponents is None else jnp.ldexp(sums, row_exponents)


def _convert(stage: Any, target: Any, dtype: Any, *, int4: bool) -> None:
    """A stage of stored values as 16-bit operands. Barriers on both sides of the stores."""
    values = plgpu.load(stage, layout=plgpu.Layout.WGMMA_8BIT)
    if int4:  # bytes know no shifts: 16 times the high nibbles, for x of odd inputs is a 16th
        target[0] = ((values & jnp.int8(15)) ^ jnp.int8(8)).astype(dtype) - jnp.asarray(8, dtype)
        target[1] = (values & jnp.int8(-16)).astype(dtype)
    else:
        target[0] = values.astype(dtype)
    plgpu.commit_smem()


def _multiply(a: Any, b: Any) -> Any:
    """a [M, K] @ b [K, N] of shared memory in float32, by wgmmas that are waited for."""

    def issue(acc: Any) -> Any:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(issue, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))

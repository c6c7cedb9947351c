"""8-bit keys and values as float16 operands of products, on NVIDIA GPUs.

float16 holds every value of float8_e4m3fn, float8_e5m2 and int8 exactly, infinities and NaN
included. Four values lie in a register of 32 bits and become two pairs:

- float8_e4m3fn has an instruction from compute capability 8.9 on. Before, the sign and the other
  bits are put where float16 has them, which is the value times 2 ** -8, subnormals too. The one
  magnitude beyond 448 is NaN; a multiplication that overflows for it alone makes it one.
- float8_e5m2 is the upper byte of a float16.
- int8 plus 128 is the lower byte of a float16 between 1024 and 1280.

Hopper's own kernels convert by what Mosaic GPU has: float8 to float16, int8 to the queries' type.
"""

import math
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jaxlib.mlir import ir

DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")  # that can be widened
WIDE = jnp.dtype(jnp.float16)

# Four warps by rows; a thread has four values of a row, a warp 8 rows of 16. Of swizzled tiles that
# touches each bank of shared memory once, 8 bits wide and, half a warp at a time, 16 bits wide.
LAYOUT = plgpu.Layout.TILED(
    Tiling(((32, 16), (8, 16), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_PIECE = 128  # columns at a time, in registers

# From $1, four values, to $0, two of them: the first two and the last two by the two selectors.
_E4M3 = """{{
.reg .b16 low, high;
mov.b32 {{low, high}}, $1;
cvt.rn.f16x2.e4m3x2 $0, {half};
}}"""
_E4M3_BY_BITS = """{{
.reg .b32 sign, rest, huge, whole, scale, zero;
prmt.b32 rest, $1, 0, {selector};
and.b32 sign, rest, 0x80008000;
shr.u32 rest, rest, 1;
and.b32 rest, rest, 0x3f803f80;
or.b32 rest, rest, sign;
mov.b32 scale, 0x78657865;
mul.rn.f16x2 huge, rest, scale;
mov.b32 scale, 0x5c005c00;
mul.rn.f16x2 whole, rest, scale;
mov.b32 zero, 0;
fma.rn.f16x2 $0, huge, zero, whole;
}}"""  # times 36000, which is infinite for 480 / 256 but not for 448 / 256, and times 256
_E5M2 = "prmt.b32 $0, $1, 0, {selector};"
_INT8 = """{{
.reg .b32 raised, offset;
xor.b32 raised, $1, 0x80808080;
prmt.b32 raised, raised, 0x64, {low_selector};
mov.b32 offset, 0x64806480;
sub.rn.f16x2 $0, raised, offset;
}}"""
_HALVES = (
    {"half": "low", "selector": "0x1404", "low_selector": "0x4140"},
    {"half": "high", "selector": "0x3424", "low_selector": "0x4342"},
)


def widens(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a cache of `dtype` is one of 8 bits that has to be widened."""
    return jnp.dtype(dtype).name in DTYPES


def operand_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Of the products' operands, for a cache of `dtype`."""
    return WIDE if widens(dtype) else jnp.dtype(dtype)


def hopper_operand_dtype(dtype: jax.typing.DTypeLike, q_dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The same in Hopper's kernels: int8 becomes the queries' type, where that has 16 bits."""
    if jnp.dtype(dtype).name == "int8" and jnp.dtype(q_dtype).itemsize == 2:
        return jnp.dtype(q_dtype)
    return operand_dtype(dtype)


def as_operand(q: Array, dtype: jax.typing.DTypeLike) -> Array:
    """Queries as `dtype`; what float16 cannot hold is cut off beside bits that are widened."""
    dtype = jnp.dtype(dtype)
    if dtype == WIDE and q.dtype != dtype:
        largest = float(jnp.finfo(dtype).max)
        q = jnp.clip(q, -largest, largest)
    return q.astype(dtype)


def widen_block(source: Any, target: Any, *, interpret: bool) -> None:
    """Values `[rows, columns]` of shared memory, 8 bits, to float16 in shared memory.

    `rows` is a multiple of 32, `columns` of 32. All threads of one warpgroup do a part; the caller
    makes them wait for each other. The interpreter, which knows no PTX, has a plain conversion in
    its place.
    """
    columns = source.shape[1]
    width = math.gcd(columns, _PIECE)
    for column in range(0, columns, width):
        values = plgpu.load(source.at[:, pl.ds(column, width)], layout=LAYOUT, optimized=False)
        wide = values.astype(WIDE) if interpret else widen(values)
        target[:, pl.ds(column, width)] = wide


def widen_for_wgmma(source: Any, target: Any, *, rows: int, columns: int) -> None:
    """The same in Hopper's kernels, to `target`'s type, `rows` by `columns` at a time in registers.

    `rows` is a multiple of 64, `columns` of the pieces that either is swizzled in.
    """
    for row in range(0, source.shape[0], rows):
        for column in range(0, source.shape[1], columns):
            part = pl.ds(row, rows), pl.ds(column, columns)
            values = plgpu.load(source.at[part], layout=plgpu.Layout.WGMMA_8BIT)
            target[part] = values.astype(target.dtype)


def widen(values: Array) -> Array:
    """8-bit values `[rows, columns]` in registers, laid out as `LAYOUT`, as float16."""

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct(values.shape, WIDE, layout=LAYOUT),
    )
    def convert(_: Any, narrow: Any) -> Any:
        text = {
            "float8_e4m3fn": _E4M3 if _has_e4m3() else _E4M3_BY_BITS,
            "float8_e5m2": _E5M2,
            "int8": _INT8,
        }[values.dtype.name]
        byte, word = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
        four_bytes = ir.VectorType.get((4,), byte)
        two_wide = ir.VectorType.get((2,), ir.F16Type.get())
        registers = np.empty_like(narrow.registers)
        for index, register in np.ndenumerate(narrow.registers):
            four = mgpu.utils.bitcast(mgpu.utils.bitcast(register, four_bytes), word)
            halves = [
                mgpu.utils.inline_ptx(text.format(**half), four, result_types=word)
                for half in _HALVES
            ]
            registers[index] = mgpu.utils.vector_concat(
                [mgpu.utils.bitcast(half, two_wide) for half in halves]
            )
        return mgpu.FragmentedArray(_registers=registers, _layout=narrow.layout, _is_signed=None)

    return convert(values)  # pyright: ignore[reportCallIssue]


def _has_e4m3() -> bool:
    arch = mgpu.utils.get_arch()
    return (arch.major, arch.minor) >= (8, 9)

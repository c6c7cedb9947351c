"""Quantized matmul on TPU (Pallas, Mosaic TPU): weight tiles are read from HBM once, as stored.

A grid step holds a strip of the weight [D, columns], all of the contraction, and a tile of rows of
x. Pallas' pipeline reads the next strip meanwhile. What the strip is multiplied as, `Plan` says:

- *converted*: the values to bfloat16 (or float32, for such x) in registers.
- *terms*: x in 8-bit terms, x = sum of scale_i * term_i, multiplied by the 8-bit values as they are
  and summed in float32. At decode a matmul is bound by pushing the weight into the MXU, and 8-bit
  values push twice as fast; more rows of x are nearly free. Two float8_e4m3fn terms hold as many
  bits of a mantissa as bfloat16, three int8 terms 21 bits below the largest value of a token.
  Converting float8_e4m3fn to bfloat16 is slower than HBM before tpu7x (187 % of the time of the
  read on v6e, by the compiler's schedule; two terms 38 %).
- one term is `activations="dynamic"`: 8 bits by 8 bits.

Scales of blocks of 128 inputs or more multiply partial sums [rows, columns]; smaller blocks would
use a fraction of the MXU, so their scales multiply the values. int4 is a bitcast of its bytes.
Zero points are one small matmul: (q - z) s x = q s x - (z s) (sum of x over the block).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import Backend
from pallas_kernels.chips import Chip
from pallas_kernels.quantized import (
    Format,
    QuantizedArray,
    activation_dtype,
    quantize_activations,
    spread_columns,
)

LANES = 128
_CHUNK = 1024  # inputs multiplied at once: bounds the converted copy in VMEM
_MIN_SCALED_SUM = 128  # inputs of a block whose scale multiplies the sum and not the values
_SUMS_IN_REGISTERS = 32 * 1024  # float32, half of the registers
_VMEM = {"v4": 16, "tpu7x": 64}  # MiB a core; others: 128
_FULL_PRECISION = jax.lax.Precision.HIGHEST

# Formats that are multiplied as 8-bit terms while x has few rows: (dtype, terms, rows of x up to
# which it is the faster way). Read off the static schedules of 4096 x 512 and 4096 x 2048 strips.
_TERMS: dict[tuple[str, Format], tuple[str, int, int]] = {
    ("v5e", "float8_e4m3fn"): ("float8_e4m3fn", 2, 32),
    ("v5p", "float8_e4m3fn"): ("float8_e4m3fn", 2, 32),
    ("v6e", "float8_e4m3fn"): ("float8_e4m3fn", 2, 64),
    ("tpu7x", "float8_e4m3fn"): ("float8_e4m3fn", 2, 64),
    ("tpu7x", "float8_e5m2"): ("float8_e4m3fn", 2, 64),
    ("tpu7x", "int4"): ("float8_e4m3fn", 2, 64),
    ("v5p", "int8"): ("int8", 3, 32),
    ("v5p", "int4"): ("int8", 3, 32),
    ("v6e", "int4"): ("int8", 3, 32),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How tiles are cut and multiplied. Static."""

    rows: int  # of x a tile
    columns: int  # of the weight a strip: a multiple of 128, or all
    operand: str  # dtype that both are multiplied as
    terms: int = 0  # 0: x as it is; 1: dynamic activations; more: x in 8-bit terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """What the kernel knows of a weight. Static."""

    in_dim: int
    format: Format | None  # None: not quantized
    block_rows: int
    scalar_columns: int  # columns that share a scale in SMEM; 0: a scale a column, in VMEM
    zeros: bool

    @classmethod
    def of(cls, weight: Array | QuantizedArray) -> "Strip":
        """The static part of a weight [..., D, F]."""
        if not isinstance(weight, QuantizedArray):
            D = weight.shape[-2]
            return cls(in_dim=D, format=None, block_rows=D, scalar_columns=0, zeros=False)
        columns = weight.block[1]
        in_smem = columns % LANES == 0 and weight.zeros is None
        return cls(
            in_dim=weight.in_dim,
            format=weight.format,
            block_rows=weight.block_rows,
            scalar_columns=columns if in_smem else 0,
            zeros=weight.zeros is not None,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks along the contraction."""
        return self.in_dim // self.block_rows


def why_not(weight: Array | QuantizedArray, *, chip: Chip) -> str | None:
    """Why the TPU kernels cannot multiply by such a weight [..., D, F], or None if they can."""
    if chip.tpu_generation is None:
        return f"no TPU generation is known for {chip}"
    D, F = weight.shape[-2:]
    if D % LANES:
        return f"{D} inputs are not a multiple of {LANES}"
    strip = Strip.of(weight)
    if strip.format == "int4" and D % (2 * LANES):
        return f"{D} int4 inputs are not a multiple of {2 * LANES}"
    if strip.format is not None and (D % strip.block_rows or strip.block_rows % 32):
        return f"blocks of {strip.block_rows} inputs do not divide {D}, or are no multiple of 32"
    bits = 16 if strip.format is None else 8
    if D * min(F, LANES) * bits // 8 > 8 << 20:
        return f"{D} inputs: a strip of {LANES} outputs is over 8 MiB"
    return None


def quantized_matmul_tpu(
    x: Array, weight: QuantizedArray, *, backend: Backend, dynamic_activations: bool = False
) -> Array:
    """x [T, D] @ weight [D, F] -> [T, F] in x's type. See `why_not` for what it takes."""
    T, F = x.shape[0], weight.out_dim
    if T == 0:
        return jnp.zeros((0, F), x.dtype)
    plan = make_plan(weight, num_rows=T, chip=backend.chip, dtype=x.dtype)
    if dynamic_activations:
        operand = jnp.dtype(activation_dtype(weight.format)).name
        plan = make_plan(weight, num_rows=T, chip=backend.chip, dtype=x.dtype, dynamic=operand)
    strip = Strip.of(weight)
    tiles = -(-T // plan.rows)
    padded = jnp.pad(x, ((0, tiles * plan.rows - T), (0, 0)))
    parts, specs = operands(padded, weight, plan, tile=lambda f, t: t, expert=None)
    out = pl.pallas_call(
        functools.partial(_kernel, plan=plan, strip=strip),
        grid=(-(-F // plan.columns), tiles),
        in_specs=specs,
        out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda f, t: (t, f)),
        out_shape=jax.ShapeDtypeStruct((tiles * plan.rows, F), x.dtype),
        compiler_params=compiler_params(backend.chip, ("parallel", "arbitrary")),
        interpret=interpreter(backend),
        name="quantized_matmul",
    )(*parts)
    return out[:T]


def make_plan(
    weight: Array | QuantizedArray,
    *,
    num_rows: int,
    chip: Chip,
    dtype: Any,
    tile_rows: int | None = None,
    dynamic: str | None = None,
) -> Plan:
    """The plan for x of `num_rows` rows; `tile_rows` sets the tile, `dynamic` one 8-bit term."""
    generation = chip.tpu_generation or "v5e"
    strip = Strip.of(weight)
    rows = min(-(-num_rows // 8) * 8, 256) if tile_rows is None else tile_rows
    operand, terms = ("bfloat16" if dtype == jnp.bfloat16 else "float32"), 0
    if strip.format is not None and strip.block_rows >= _MIN_SCALED_SUM:
        known = _TERMS.get((generation, strip.format))
        if dynamic is not None:
            operand, terms = dynamic, 1
        elif known is not None and rows <= known[2] and dtype == jnp.bfloat16:
            operand, terms, _ = known
    # One strip is 2 to 4 MiB as stored: long enough to hide a step's overhead, short enough for
    # several steps.
    D, F = weight.shape[-2:]
    bytes_a_column = D * {None: 2, "int4": 0.5}.get(strip.format, 1)
    most = max(int((4 << 20) / bytes_a_column) // LANES * LANES, LANES)
    steps = 4 if tile_rows is None else 1  # the groups are steps enough
    most = min(most, max(-(-F // steps) // LANES * LANES, LANES), 2048)
    columns = F if F <= LANES else most
    for fitting in range(most, most // 2, -LANES):  # rather one that divides F
        if F % fitting == 0:
            columns = fitting
            break
    return Plan(rows=rows, columns=columns, operand=operand, terms=terms)


def operands(
    x: Array, weight: Array | QuantizedArray, plan: Plan, *, tile: Any, expert: Any
) -> tuple[list[Array], list[pl.BlockSpec]]:
    """The kernel's inputs and how they are cut: x, its scales and sums, values, scales, zeros.

    x [tiles * rows, D]. `tile` gives the tile of x of a grid step; `expert`, if not None, the
    expert (the weight is then [E, D, F]). A grid step's first index is the strip.
    """
    strip = Strip.of(weight)
    D, num_blocks = strip.in_dim, strip.num_blocks
    rows = plan.rows * max(plan.terms, 1)
    parts: list[Array] = []
    specs: list[pl.BlockSpec] = []

    def add_rows(part: Array) -> None:
        parts.append(part)
        block = (rows, part.shape[1])
        specs.append(pl.BlockSpec(block, lambda f, *rest: (tile(f, *rest), 0)))

    def add_weight(part: Array, block: tuple[int, int], column: bool, smem: bool = False) -> None:
        parts.append(part)
        space = pltpu.SMEM if smem else None

        def index(f: Any, *rest: Any) -> Any:
            place = (0, f if column else 0)
            return place if expert is None else (expert(f, *rest), *place)

        lead = () if expert is None else (None,)
        specs.append(pl.BlockSpec((*lead, *block), index, memory_space=space))

    if plan.terms:
        x, scales = activation_terms(x, plan)
        add_rows(x)
        add_rows(scales)
    else:
        x = x.astype(plan.operand)
        add_rows(x)
    if not isinstance(weight, QuantizedArray):
        add_weight(weight.astype(plan.operand), (D, plan.columns), True)
        return parts, specs
    values = weight.values
    add_weight(values, (values.shape[-2], plan.columns), True)
    scales = weight.scales.astype(jnp.float32)
    if strip.scalar_columns:
        add_weight(scales, (num_blocks, scales.shape[-1]), False, smem=True)
        return parts, specs
    scales = spread_columns(scales, weight.block[1], weight.out_dim)
    add_weight(scales, (num_blocks, plan.columns), True)
    if weight.zeros is not None:
        zeros = spread_columns(weight.zeros.astype(jnp.float32), weight.block[1], weight.out_dim)
        blocks = x.astype(jnp.float32).reshape(x.shape[0], num_blocks, strip.block_rows)
        add_rows(blocks.sum(-1))
        add_weight(zeros * scales, (num_blocks, plan.columns), True)
    return parts, specs


def activation_terms(x: Array, plan: Plan) -> tuple[Array, Array]:
    """x [tiles * rows, D] as 8-bit terms and their scales, the terms of a tile one below another.

    -> [tiles * terms * rows, D] of `plan.operand`, [tiles * terms * rows, 1] float32.
    """
    x = x.astype(jnp.float32)
    if plan.terms == 1:
        values, scales = quantize_activations(x, plan.operand)
        parts = [(values, scales)]
    elif plan.operand == "int8":
        # Fixed point: the largest value is 127 * 2 ** 14, in digits of base 2 ** 7.
        largest = jnp.abs(x).max(-1, keepdims=True)
        unit = jnp.where(largest > 0, largest / (127 << 14), 1.0)
        rest = jnp.round(x / unit).astype(jnp.int32)
        parts = []
        for power in (14, 7, 0):
            digit = (rest + ((1 << power) >> 1)) >> power  # to nearest, so that |rest| shrinks
            rest -= digit << power
            parts.append((digit.astype(jnp.int8), unit * (1 << power)))
    else:
        values, scales = quantize_activations(x, plan.operand)
        rest = (x / scales - values.astype(jnp.float32)) * 16.0  # at most 16 * 16 = 256 of 448
        parts = [(values, scales), (rest.astype(plan.operand), scales / 16.0)]
    shape = (x.shape[0] // plan.rows, plan.rows, -1)
    values = jnp.stack([values.reshape(shape) for values, _ in parts], axis=1)
    scales = jnp.stack([scales.reshape(shape) for _, scales in parts], axis=1)
    return values.reshape(-1, x.shape[1]), scales.reshape(-1, 1)


def strip_products(
    refs: tuple[Any, ...], *, plan: Plan, strip: Strip, columns: int
) -> Iterator[tuple[slice, Array]]:
    """A tile of x by a strip of the weight, in pieces: columns, and their [rows, ...] float32.

    `refs` are the blocks of what `operands` gave, in its order. A piece is as wide as its sums
    may be to stay in registers.
    """
    rows = plan.rows * max(plan.terms, 1)
    width = max(_SUMS_IN_REGISTERS // rows // LANES, 2) * LANES
    for start in range(0, columns, width):
        piece = slice(start, min(start + width, columns))
        yield piece, _product(refs, piece, plan=plan, strip=strip)


def _product(refs: tuple[Any, ...], columns: slice, *, plan: Plan, strip: Strip) -> Array:
    inputs = list(refs)
    x_ref = inputs.pop(0)
    x_scales_ref = inputs.pop(0) if plan.terms else None
    w_ref = inputs.pop(0)
    scales_ref = inputs.pop(0) if strip.format is not None else None

    scaled_sums = strip.num_blocks > 1 and strip.block_rows >= _MIN_SCALED_SUM
    chunk = strip.block_rows if scaled_sums else min(_CHUNK, strip.in_dim)
    total = jnp.zeros((), jnp.float32)
    for start in range(0, strip.in_dim, chunk):
        size = min(chunk, strip.in_dim - start)
        w = _operand_values(w_ref, start, size, columns, strip, plan)
        if not scaled_sums and strip.num_blocks > 1:
            w = _scale_values(w, scales_ref, start, columns, strip, plan).astype(plan.operand)
        part = jnp.dot(
            x_ref[:, start : start + size],
            w,
            preferred_element_type=jnp.int32 if w.dtype == jnp.int8 else jnp.float32,
            precision=_FULL_PRECISION if plan.operand == "float32" else None,
        )
        if scaled_sums:
            scales = _scale_row(scales_ref, start // strip.block_rows, columns, strip, plan)
            part = part.astype(jnp.float32) * scales
        total = part if start == 0 else total + part
    total = total.astype(jnp.float32)
    if strip.format is not None and strip.num_blocks == 1:
        total *= _scale_row(scales_ref, 0, columns, strip, plan)
    if strip.zeros:
        sums_ref, zeros_ref = inputs
        total -= _outer(sums_ref[...], zeros_ref[:, columns])
    if x_scales_ref is None:
        return total
    total *= x_scales_ref[...]
    return functools.reduce(
        jnp.add, [total[i * plan.rows : (i + 1) * plan.rows] for i in range(plan.terms)]
    )


def compiler_params(chip: Chip, semantics: tuple[Any, ...]) -> pltpu.CompilerParams:
    """Compiler parameters: seven eighths of a core's VMEM, at most 96 MiB, may be used."""
    mebibytes = min(_VMEM.get(chip.tpu_generation or "", 128) * 7 // 8, 96)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=mebibytes << 20)


def interpreter(backend: Backend) -> Any:
    """What pallas_call's `interpret` is for a backend: with races looked for, where asked."""
    return pltpu.InterpretParams(detect_races=True) if backend.interpret else False


def _kernel(*refs: Any, plan: Plan, strip: Strip) -> None:
    *inputs, out_ref = refs
    for columns, product in strip_products(
        tuple(inputs), plan=plan, strip=strip, columns=out_ref.shape[1]
    ):
        out_ref[:, columns] = product.astype(out_ref.dtype)


def _operand_values(
    w_ref: Any, start: int, size: int, columns: slice, strip: Strip, plan: Plan
) -> Array:
    """Values of `size` inputs from `start`, in the dtype that they are multiplied as.

    float32 where a scale a value is still to come, and float8 as stored where x is float8, too.
    """
    if strip.format == "int4":
        w = pltpu.bitcast(w_ref[start // 2 : (start + size) // 2, columns], jnp.int4)
    else:
        w = w_ref[start : start + size, columns]
    if strip.format is None:
        return w
    if strip.num_blocks > 1 and strip.block_rows < _MIN_SCALED_SUM:
        return w.astype(jnp.float32)
    if plan.terms and strip.format.startswith("float8"):
        return w
    return w.astype(plan.operand)


def _scale_values(
    w: Array, scales_ref: Any, start: int, columns: slice, strip: Strip, plan: Plan
) -> Array:
    """Values [inputs, columns] by the scales of their blocks."""
    first, count = start // strip.block_rows, w.shape[0] // strip.block_rows
    blocks = w.reshape(count, strip.block_rows, w.shape[1])
    if strip.scalar_columns:
        rows = [_scale_row(scales_ref, first + i, columns, strip, plan) for i in range(count)]
        scales = jnp.concatenate(rows)
    else:
        scales = scales_ref[first : first + count, columns]
    return (blocks * scales[:, None, :]).reshape(w.shape)


def _scale_row(scales_ref: Any, block: int, columns: slice, strip: Strip, plan: Plan) -> Array:
    """The scales of a block of inputs, one a column: [1, columns]."""
    if not strip.scalar_columns:
        return scales_ref[block : block + 1, columns]
    first = pl.program_id(0) * plan.columns + columns.start
    pieces = []
    for lane in range(0, columns.stop - columns.start, LANES):
        # The last strip may overhang: its surplus columns take the last scale.
        index = jnp.minimum((first + lane) // strip.scalar_columns, scales_ref.shape[1] - 1)
        width = min(LANES, columns.stop - columns.start - lane)
        pieces.append(jnp.full((1, width), scales_ref[block, index]))
    return jnp.concatenate(pieces, axis=1)


def _outer(sums: Array, zeros: Array) -> Array:
    """sums [rows, blocks] @ zeros [blocks, columns], in full precision."""
    if sums.shape[1] == 1:
        return sums * zeros
    return jnp.dot(sums, zeros, preferred_element_type=jnp.float32, precision=_FULL_PRECISION)

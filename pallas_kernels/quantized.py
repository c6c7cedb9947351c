"""Weights in 8 or 4 bits with scales: the data type of `quantized_matmul` and `grouped_matmul`.

A weight W is [D, F]: D is the contraction, F the output channels; experts stack it as [E, D, F].

    W[d, f] = (values[d, f] - zeros[d // rows, f // columns]) * scales[d // rows, f // columns]

`block` is (rows, columns). (None, 1) is a scale an output channel; (128, 1) a scale for 128 inputs
of a channel, as in GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978), which have zero points, too;
(128, 128) are the blocks of DeepSeek-V3 in fp8 (arXiv 2412.19437).
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Format = Literal["int8", "float8_e4m3fn", "float8_e5m2", "int4"]
FORMATS: tuple[Format, ...] = ("int8", "float8_e4m3fn", "float8_e5m2", "int4")

# The largest value that quantization uses: symmetric, so -128 and -8 do not occur without zeros.
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int4": 7.0}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "zeros"],
    meta_fields=["block"],
)
@dataclass(frozen=True, kw_only=True)
class QuantizedArray:
    """A quantized weight [..., D, F]: a pytree of its values, scales and, maybe, zero points.

    int8, float8_e4m3fn and float8_e5m2 values are stored as they are, [..., D, F]. int4 values are
    two's-complement nibbles, two to a byte: `values` is uint8 [..., D / 2, F], row 2i of the weight
    in the low nibble of byte row i, row 2i + 1 in the high one. Neighbouring inputs share a byte,
    so that a packed weight can be sharded along D as well as along F. Unsigned 4-bit checkpoints
    (0..15 with zero point z) are stored as value - 8 with zero point z - 8.
    """

    values: Array
    scales: Array  # [..., ceil(D / rows), ceil(F / columns)] float
    zeros: Array | None = None  # as scales, in units of values; need not be whole
    block: tuple[int | None, int] = (None, 1)  # (rows, columns) a scale is for; None: all of D

    @property
    def format(self) -> Format:
        """What a value is."""
        name = self.values.dtype.name
        return "int4" if name == "uint8" else name  # pyright: ignore[reportReturnType]

    @property
    def in_dim(self) -> int:
        """D, the inputs."""
        return self.values.shape[-2] * (2 if self.format == "int4" else 1)

    @property
    def out_dim(self) -> int:
        """F, the outputs."""
        return self.values.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., D, F], of the weight that this stands for."""
        return (*self.values.shape[:-2], self.in_dim, self.out_dim)

    @property
    def block_rows(self) -> int:
        """Inputs that share a scale."""
        return self.block[0] or self.in_dim

    def check(self) -> None:
        """Raises ValueError if the parts do not fit together."""
        if self.format not in FORMATS:
            raise ValueError(f"values of {self.values.dtype} are none of {FORMATS}; int4 is uint8")
        if self.format == "int4" and self.block_rows % 2:
            raise ValueError(f"a block of {self.block_rows} rows ends inside a byte of int4 values")
        expected = (
            *self.values.shape[:-2],
            -(-self.in_dim // self.block_rows),
            -(-self.out_dim // self.block[1]),
        )
        parts = {"scales": self.scales} | ({} if self.zeros is None else {"zeros": self.zeros})
        for name, part in parts.items():
            if part.shape != expected:
                raise ValueError(
                    f"{name} {part.shape} of a weight {self.shape} in blocks of {self.block}: "
                    f"expected {expected}"
                )


def quantize(
    weight: Array,
    format: Format,
    *,
    block: tuple[int | None, int] = (None, 1),
    zeros: bool = False,
    scale_dtype: jax.typing.DTypeLike = jnp.float32,
) -> QuantizedArray:
    """The weight [..., D, F] rounded to nearest, each block scaled so that its largest value fits.

    With `zeros` (int4 only) a block's range is [its minimum, its maximum] and not symmetric.
    Raises ValueError for an odd D or block of int4, or zeros with another format.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is none of {FORMATS}")
    if zeros and format != "int4":
        raise ValueError(f"zero points are for int4, not {format}")
    weight = weight.astype(jnp.float32)
    rows, columns = block[0] or weight.shape[-2], block[1]
    if format == "int4" and (weight.shape[-2] % 2 or rows % 2):
        raise ValueError(f"int4 packs pairs of rows: {weight.shape[-2]} rows, blocks of {rows}")
    tiles = _tiles(weight, rows, columns)  # [..., D/rows, rows, F/columns, columns]
    zero = None
    if zeros:
        low = jnp.minimum(tiles.min((-3, -1)), 0.0)
        high = jnp.maximum(tiles.max((-3, -1)), 0.0)
        scale = jnp.where(high > low, (high - low) / 15.0, 1.0)
        zero = jnp.clip(jnp.round(-8.0 - low / scale), -8, 7)
    else:
        largest = jnp.abs(tiles).max((-3, -1))
        scale = jnp.where(largest > 0, largest / _LARGEST[format], 1.0)
    scale = scale.astype(scale_dtype)
    values = weight / _spread(scale.astype(jnp.float32), weight.shape, rows, columns)
    if zero is not None:
        values += _spread(zero, weight.shape, rows, columns)
        zero = zero.astype(scale_dtype)
    return QuantizedArray(
        values=_encode(values, format, asymmetric=zeros), scales=scale, zeros=zero, block=block
    )


def dequantize(weight: QuantizedArray, dtype: jax.typing.DTypeLike = jnp.float32) -> Array:
    """The weight [..., D, F] that `weight` stands for; computed in float32, rounded to `dtype`."""
    shape, rows, columns = weight.shape, weight.block_rows, weight.block[1]
    values = unpacked(weight).astype(jnp.float32)
    if weight.zeros is not None:
        values -= _spread(weight.zeros.astype(jnp.float32), shape, rows, columns)
    return (values * _spread(weight.scales.astype(jnp.float32), shape, rows, columns)).astype(dtype)


def unpacked(weight: QuantizedArray) -> Array:
    """The values [..., D, F]: int8 for int4, else as stored."""
    if weight.format != "int4":
        return weight.values
    return unpack_int4(weight.values)


def pack_int4(values: Array) -> Array:
    """Whole numbers in -8..7, [..., D, F], as nibbles: uint8 [..., D / 2, F]."""
    bits = values.astype(jnp.int8).astype(jnp.uint8) & 15
    return bits[..., 0::2, :] | (bits[..., 1::2, :] << 4)


def unpack_int4(packed: Array) -> Array:
    """uint8 [..., D / 2, F] -> int8 [..., D, F]; the inverse of pack_int4."""
    nibbles = jnp.stack([packed & 15, packed >> 4], axis=-2)  # [..., D / 2, 2, F]
    signed = (nibbles ^ 8).astype(jnp.int8) - 8
    return signed.reshape(*packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1])


def spread_columns(part: Array, columns: int, out_dim: int) -> Array:
    """Scales or zeros a block of columns, [..., ceil(F / columns)], as one a channel: [..., F]."""
    return part if columns == 1 else jnp.repeat(part, columns, axis=-1)[..., :out_dim]


def activation_dtype(format: Format) -> jax.typing.DTypeLike:
    """What activations are quantized to for a matmul with weights of that format."""
    return jnp.int8 if format in ("int8", "int4") else jnp.float8_e4m3fn


def quantize_activations(x: Array, dtype: jax.typing.DTypeLike) -> tuple[Array, Array]:
    """x [T, D] as int8 or float8_e4m3fn [T, D] and a float32 scale a token [T, 1]."""
    x = x.astype(jnp.float32)
    limit = _LARGEST[jnp.dtype(dtype).name]
    largest = jnp.abs(x).max(-1, keepdims=True)
    scale = jnp.where(largest > 0, largest / limit, 1.0)
    x = jnp.clip(x / scale, -limit, limit)
    return (jnp.round(x) if jnp.dtype(dtype) == jnp.int8 else x).astype(dtype), scale


def _encode(values: Array, format: Format, *, asymmetric: bool) -> Array:
    limit = _LARGEST[format]
    if format == "int4":
        low, high = (-8, 7) if asymmetric else (-7, 7)
        return pack_int4(jnp.clip(jnp.round(values), low, high))
    values = jnp.clip(values, -limit, limit)  # a cast to float8_e4m3fn beyond its range gives NaN
    return (jnp.round(values) if format == "int8" else values).astype(format)


def _tiles(weight: Array, rows: int, columns: int) -> Array:
    """[..., D, F] -> [..., D / rows, rows, F / columns, columns], zeros where a block overhangs."""
    *lead, D, F = weight.shape
    pad = [(0, 0)] * len(lead) + [(0, -D % rows), (0, -F % columns)]
    return jnp.pad(weight, pad).reshape(*lead, -(-D // rows), rows, -(-F // columns), columns)


def _spread(part: Array, shape: tuple[int, ...], rows: int, columns: int) -> Array:
    """One number a block -> one an element of [..., D, F] (a broadcast where that is enough)."""
    part = spread_columns(part, columns, shape[-1])
    return part if part.shape[-2] == 1 else jnp.repeat(part, rows, axis=-2)[..., : shape[-2], :]

"""Dequantisation of ggml block formats to float32, vectorised over blocks.

The formats are those of ggml's `ggml-common.h`; products are taken in its order, so results are
bit for bit those of the reference implementations. Every function takes blocks [n, block bytes]
of uint8 and returns values [n, block size] of float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One quantised encoding: consecutive values of a row share a block."""

    values: int
    nbytes: int
    dequantize: Callable[[np.ndarray], np.ndarray]


def _half(blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
    """float16 numbers at some bytes of each block, as float32."""
    return np.ascontiguousarray(blocks[:, start:stop]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., k] bytes -> [..., 2 k] values: all low halves, then all high halves."""
    return np.concatenate((packed & 0x0F, packed >> 4), axis=-1)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0, 2)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    quants = _nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8)
    return quants.astype(np.float32) * _half(blocks, 0, 2)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    values = _nibbles(blocks[:, 4:]).astype(np.float32)
    values *= _half(blocks, 0, 2)
    values += _half(blocks, 2, 4)
    return values


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """[n, 4] bytes -> [n, 32] values of 0 or 16: the upper bit of each 5-bit quant."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    quants = (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).view(np.int8) - np.int8(16)
    return quants.astype(np.float32) * _half(blocks, 0, 2)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    values = (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])).astype(np.float32)
    values *= _half(blocks, 0, 2)
    values += _half(blocks, 2, 4)
    return values


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of Q4_K and Q5_K: 8 groups of 32 values, each with a 6-bit scale and minimum [n, 8, 1]."""
    n = len(blocks)
    packed = blocks[:, 4:16].reshape(n, 3, 4)
    low, mid, high = packed[:, 0], packed[:, 1], packed[:, 2]
    # Groups 0-3 lie in the low 6 bits; of groups 4-7 the upper 2 bits are kept above those.
    scales = np.concatenate((low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)), axis=-1)
    minima = np.concatenate((mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)), axis=-1)
    scale = _half(blocks, 0, 2) * scales.astype(np.float32)  # [n, 8]
    minimum = _half(blocks, 2, 4) * minima.astype(np.float32)
    return scale[:, :, None], minimum[:, :, None]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    scale, minimum = _scales_and_minima(blocks)
    values = _nibbles(blocks[:, 16:].reshape(n, 4, 32)).astype(np.float32).reshape(n, 8, 32)
    values *= scale
    values -= minimum
    return values.reshape(n, 256)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    scale, minimum = _scales_and_minima(blocks)
    low = _nibbles(blocks[:, 48:].reshape(n, 4, 32)).reshape(n, 8, 32)
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)  # bit g belongs to group g
    high = (blocks[:, 16:48].reshape(n, 1, 32) >> shifts) & 1
    values = (low | (high << 4)).astype(np.float32)
    values *= scale
    values -= minimum
    return values.reshape(n, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """256 values: 4 low bits, 2 high bits, and 16 groups of 16 with an 8-bit scale."""
    n = len(blocks)
    low = _nibbles(blocks[:, :128].reshape(n, 2, 64))  # [n, 2, 128]
    packed = blocks[:, 128:192].reshape(n, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = ((packed >> shifts) & 3).reshape(n, 2, 128)
    quants = (low | (high << 4)).view(np.int8) - np.int8(32)
    scale = _half(blocks, 208, 210) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values = quants.astype(np.float32).reshape(n, 16, 16)
    values *= scale[:, :, None]
    return values.reshape(n, 256)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    """256 values of 2 bits, and 16 groups of 16 with a 4-bit scale and minimum."""
    n = len(blocks)
    packed = blocks[:, :16]
    scale = _half(blocks, 80, 82) * (packed & 0x0F).astype(np.float32)  # [n, 16]
    minimum = _half(blocks, 82, 84) * (packed >> 4).astype(np.float32)
    values = _pairs_of_bits(blocks[:, 16:80]).astype(np.float32).reshape(n, 16, 16)
    values *= scale[:, :, None]
    values -= minimum[:, :, None]
    return values.reshape(n, 256)


def _pairs_of_bits(packed: np.ndarray) -> np.ndarray:
    """[n, 64] bytes -> [n, 256] values of 0 to 3: of each 32 bytes, their bits 0-1, 2-3, ..."""
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    pairs = (packed.reshape(-1, 2, 1, 32) >> shifts) & 3
    return pairs.reshape(len(packed), 256)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    """256 values of 2 bits and a third apart, and 16 groups of 16 with a 6-bit scale."""
    n = len(blocks)
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)  # bit g belongs to the g-th 32 values
    high = (blocks[:, :32].reshape(n, 1, 32) >> shifts) & 1
    # The third bit says that nothing is taken away.
    taken = ((high ^ 1) << 2).reshape(n, 256).view(np.int8)
    quants = _pairs_of_bits(blocks[:, 32:96]).view(np.int8) - taken
    low = _nibbles(blocks[:, 96:104])  # [n, 16]
    top = (blocks[:, 104:108].reshape(n, 1, 4) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scales = (low | (top.reshape(n, 16) << 4)).view(np.int8) - np.int8(32)
    values = quants.astype(np.float32).reshape(n, 16, 16)
    values *= (_half(blocks, 108, 110) * scales.astype(np.float32))[:, :, None]
    return values.reshape(n, 256)


def _q8_k(blocks: np.ndarray) -> np.ndarray:
    """256 values of 8 bits with a float32 scale; the sums after them are for dot products."""
    scale = np.ascontiguousarray(blocks[:, :4]).view("<f4")
    return blocks[:, 4:260].view(np.int8).astype(np.float32) * scale


# The 16 values of 4-bit quants that are not evenly spaced.
_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return _IQ4[_nibbles(blocks[:, 2:])] * _half(blocks, 0, 2)


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    """256 values from the table of 16, and 8 groups of 32 with a 6-bit scale."""
    n = len(blocks)
    top = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    packed = blocks[:, 4:8]
    low = np.stack((packed & 0x0F, packed >> 4), axis=-1).reshape(n, 8)
    scales = (low | ((top & 3) << 4).astype(np.uint8)).view(np.int8) - np.int8(32)
    values = _IQ4[_nibbles(blocks[:, 8:].reshape(n, 8, 16))]  # [n, 8, 32]
    values *= (_half(blocks, 0, 2) * scales.astype(np.float32))[:, :, None]
    return values.reshape(n, 256)


def _tq1_0(blocks: np.ndarray) -> np.ndarray:
    """256 values of -1, 0 or 1: 5 in a byte in base 3 (the last 16 values: 4 in a byte)."""
    n = len(blocks)
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    parts = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    digits = [(part[:, None, :] * powers[:count]).reshape(n, -1) for part, count in parts]
    # A byte is a fraction of 256; times 3 its upper byte is the digit.
    quants = ((np.concatenate(digits, axis=-1).astype(np.uint16) * 3) >> 8).astype(np.int8)
    return (quants - np.int8(1)).astype(np.float32) * _half(blocks, 52, 54)


def _tq2_0(blocks: np.ndarray) -> np.ndarray:
    """256 values of -1, 0 or 1 (or 2, which no converter writes) in 2 bits."""
    quants = _pairs_of_bits(blocks[:, :64]).view(np.int8) - np.int8(1)
    return quants.astype(np.float32) * _half(blocks, 64, 66)


# Twice the values of a 4-bit float of 2 bits of exponent and 1 of mantissa (OCP MX, e2m1).
TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    """32 values of 4 bits whose scale is a power of two (OCP MX, e8m0)."""
    exponent = blocks[:, :1].astype(np.uint32)
    # Half of the scale, for the table is doubled; the two smallest are subnormal numbers.
    bits = np.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
    return TWICE_E2M1[_nibbles(blocks[:, 1:])] * bits.astype(np.uint32).view(np.float32)


BLOCK_FORMATS: dict[str, BlockFormat] = {
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q2_K": BlockFormat(256, 84, _q2_k),
    "Q3_K": BlockFormat(256, 110, _q3_k),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q6_K": BlockFormat(256, 210, _q6_k),
    "Q8_K": BlockFormat(256, 292, _q8_k),
    "IQ4_NL": BlockFormat(32, 18, _iq4_nl),
    "IQ4_XS": BlockFormat(256, 136, _iq4_xs),
    "TQ1_0": BlockFormat(256, 54, _tq1_0),
    "TQ2_0": BlockFormat(256, 66, _tq2_0),
    "MXFP4": BlockFormat(32, 17, _mxfp4),
}


def dequantize(raw: np.ndarray, encoding: str, num_rows: int) -> np.ndarray:
    """Whole blocks of `num_rows` rows, as bytes -> float32 [num_rows, values of a row]."""
    block = BLOCK_FORMATS[encoding]
    # A scale of inf or nan is the file's own affair: the values become inf or nan, as in ggml.
    with np.errstate(invalid="ignore", over="ignore"):
        return block.dequantize(raw.reshape(-1, block.nbytes)).reshape(num_rows, -1)


def unpermute_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Whole heads whose rows are stored as rotated pairs -> Hugging Face's halves.

    Rows (2 i, 2 i + 1) of a head are rotated together in GGUF's llama; Hugging Face rotates
    (i, i + head_dim / 2).
    """
    total, width = rows.shape
    paired = rows.reshape(total // head_dim, head_dim // 2, 2, width)
    return paired.swapaxes(1, 2).reshape(total, width)

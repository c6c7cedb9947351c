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


BLOCK_FORMATS: dict[str, BlockFormat] = {
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q6_K": BlockFormat(256, 210, _q6_k),
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

"""Decoding of MXFP4 (OCP Microscaling Formats 1.0) as Hugging Face stores it: GPT-OSS's experts.

A block is 32 values of 4 bits (1 sign, 2 exponent, 1 mantissa), two to a byte, the first in the
low nibble, and a power of two, stored in another tensor as its exponent plus 127.
"""

import numpy as np

ENCODING = "MXFP4_BLOCKS"
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-v for v in _POSITIVE)], np.float32)


def decode_blocks(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bytes [R, n, 16] and exponents [R, n] -> float32 [R, 32 n]."""
    values = np.empty((*blocks.shape[:-1], 32), np.float32)
    values[..., 0::2] = _VALUES[blocks & 15]
    values[..., 1::2] = _VALUES[blocks >> 4]
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(len(blocks), -1)

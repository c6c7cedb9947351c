"""Decoding of MXFP4 (OCP Microscaling Formats 1.0) as Hugging Face stores it: GPT-OSS's experts.

A block is 32 values of 4 bits (1 sign, 2 exponent, 1 mantissa), two to a byte, the first in the
low nibble, and a power of two, stored in another tensor as its exponent plus 127.
"""

import numpy as np

from jaxserve.weights.gguf import TWICE_E2M1

ENCODING = "MXFP4_BLOCKS"


def decode_blocks(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bytes [R, n, 16] and exponents [R, n] -> float32 [R, 32 n]."""
    values = np.empty((*blocks.shape[:-1], 32), np.float32)
    values[..., 0::2] = TWICE_E2M1[blocks & 15]
    values[..., 1::2] = TWICE_E2M1[blocks >> 4]
    # 128, not 127: the table holds twice the values.
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 128)
    return values.reshape(len(blocks), -1)

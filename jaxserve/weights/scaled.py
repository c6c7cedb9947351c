"""Decoding of float8 and int8 values that share scales."""

import ml_dtypes
import numpy as np

from jaxserve.scaled_tensors import SCALED

_CODES = np.arange(256, dtype=np.uint8)
# What each byte means; a look-up is several times as fast as a conversion.
VALUES: dict[str, np.ndarray] = {
    f"F8_E4M3{SCALED}": _CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    f"F8_E5M2{SCALED}": _CODES.view(ml_dtypes.float8_e5m2).astype(np.float32),
    f"I8{SCALED}": _CODES.view(np.int8).astype(np.float32),
}
SCALE_TYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


def decode(
    raw: np.ndarray,
    encoding: str,
    scales: np.ndarray,
    *,
    first: tuple[int, int],
    block: tuple[int, int],
) -> np.ndarray:
    """Values float32 of a part of a matrix.

    Args:
        raw: Bytes [rows, columns] of the part.
        encoding: A key of VALUES.
        scales: Of the whole matrix [blocks down, blocks across], float32.
        first: Row and column of the matrix where the part begins.
        block: Rows and columns that share a scale.
    """
    values = VALUES[encoding][raw]
    rows, columns = (
        np.arange(start, start + count) // size
        for start, count, size in zip(first, raw.shape, block, strict=True)
    )
    if scales.shape[1] == 1:
        values *= scales[rows]
    else:
        values *= scales[np.ix_(rows, columns)]
    return values

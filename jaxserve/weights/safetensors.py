"""Decoding of the plain encodings that safetensors files hold."""

import ml_dtypes
import numpy as np

# encoding -> dtype of the stored values
PLAIN: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

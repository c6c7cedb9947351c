"""Quantized matmul in the plainest form: the definition of correct."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantized import (
    QuantizedArray,
    activation_dtype,
    dequantize,
    quantize_activations,
)


def quantized_matmul_reference(
    x: Array, weight: QuantizedArray, *, dynamic_activations: bool = False
) -> Array:
    """x [T, D] @ weight [D, F] in float32, rounded to x's type at the end."""
    inputs = x.astype(jnp.float32)
    if dynamic_activations:
        values, scales = quantize_activations(x, activation_dtype(weight.format))
        inputs = values.astype(jnp.float32) * scales
    out = jnp.matmul(inputs, dequantize(weight), precision=jax.lax.Precision.HIGHEST)
    return out.astype(x.dtype)  # [T, F]

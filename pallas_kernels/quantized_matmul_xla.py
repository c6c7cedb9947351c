"""Quantized matmul by XLA: for CPUs, and for chips and shapes that no kernel supports."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantized import (
    QuantizedArray,
    activation_dtype,
    dequantize,
    quantize_activations,
    unpacked,
)


def quantized_matmul_xla(
    x: Array, weight: QuantizedArray, *, dynamic_activations: bool = False
) -> Array:
    """x [T, D] @ weight [D, F] with float32 sums, in x's type.

    A scale an output channel is applied to the product, so the weight is only converted. With
    blocks the weight is dequantized to x's type first. XLA:TPU fuses the conversion into the
    matmul; XLA:CPU and cuBLAS under XLA:GPU read a converted copy of the weight.
    """
    if dynamic_activations:
        return _dynamic(x, weight)
    if weight.scales.shape[0] > 1 or weight.block[1] > 1 or weight.zeros is not None:
        out = jnp.matmul(x, dequantize(weight, x.dtype), preferred_element_type=jnp.float32)
        return out.astype(x.dtype)
    values = unpacked(weight).astype(x.dtype)  # exact: 8 bits fit bfloat16's mantissa
    out = jnp.matmul(x, values, preferred_element_type=jnp.float32)
    return (out * weight.scales.astype(jnp.float32)).astype(x.dtype)


def _dynamic(x: Array, weight: QuantizedArray) -> Array:
    if weight.scales.shape[0] > 1 or weight.block[1] > 1 or weight.zeros is not None:
        # The products of each block would need a sum of their own; the rounding of x is kept.
        values, scales = quantize_activations(x, activation_dtype(weight.format))
        out = jnp.matmul(
            values.astype(x.dtype),
            dequantize(weight, x.dtype),
            preferred_element_type=jnp.float32,
        )
        return (out * scales).astype(x.dtype)
    values, scales = quantize_activations(x, activation_dtype(weight.format))
    sums = jnp.int32 if values.dtype == jnp.int8 else jnp.float32
    out = jnp.matmul(values, unpacked(weight), preferred_element_type=sums)
    out = out.astype(jnp.float32) * scales * weight.scales.astype(jnp.float32)
    return out.astype(x.dtype)

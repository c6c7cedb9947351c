"""Grouped matmul in the plainest form, every token by every expert: the definition of correct."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantized import QuantizedArray, dequantize


def grouped_matmul_reference(
    x: Array, weights: Array | QuantizedArray, group_sizes: Array
) -> Array:
    """x [T, D] sorted by expert, by its expert of weights [E, D, F], in float32. -> [T, F]."""
    if isinstance(weights, QuantizedArray):
        weights = dequantize(weights)
    row = jnp.arange(x.shape[0])
    out = jnp.zeros((x.shape[0], weights.shape[-1]), jnp.float32)
    start = jnp.int32(0)
    for expert in range(weights.shape[0]):
        end = start + group_sizes[expert]
        product = jnp.matmul(
            x.astype(jnp.float32),
            weights[expert].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        out = jnp.where(((row >= start) & (row < end))[:, None], product, out)
        start = end
    return out.astype(x.dtype)

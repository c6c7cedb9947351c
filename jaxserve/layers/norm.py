"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class RMSNorm(nnx.Module):
    """Scales each vector to unit mean square, in float32, then by a learned weight."""

    def __init__(self, size: int, *, eps: float, dtype: jax.typing.DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:  # [..., size]
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * x32.astype(x.dtype)

"""Feed-forward blocks."""

import jax
from flax import nnx
from jax import Array

from jaxserve.layers.linear import Linear


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(
        self, size: int, hidden_size: int, *, use_bias: bool, dtype: jax.typing.DTypeLike
    ) -> None:
        self.gate_proj = Linear(size, hidden_size, use_bias=use_bias, dtype=dtype)
        self.up_proj = Linear(size, hidden_size, use_bias=use_bias, dtype=dtype)
        self.down_proj = Linear(hidden_size, size, use_bias=use_bias, dtype=dtype)

    def __call__(self, x: Array) -> Array:  # [T, D] -> [T, D]
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))

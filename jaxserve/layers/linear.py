"""Dense projections, stored [in, out]: the order XLA:CPU multiplies fastest at few tokens."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Linear(nnx.Module):
    """y = x W + b."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        dtype: jax.typing.DTypeLike,
    ) -> None:
        self.weight = nnx.Param(jnp.zeros((in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None

    def __call__(self, x: Array) -> Array:  # [..., in] -> [..., out]
        y = x @ self.weight[...]
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """Token embeddings [V, D], and the head when it is tied to them."""

    def __init__(self, vocab_size: int, size: int, *, dtype: jax.typing.DTypeLike) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab_size, size), dtype))

    def __call__(self, token_ids: Array) -> Array:  # [T] -> [T, D]
        return self.weight[...].at[token_ids].get(mode="clip")

    def attend(self, x: Array) -> Array:  # [R, D] -> [R, V], float32
        return jax.lax.dot_general(
            x,
            self.weight[...],
            (((x.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

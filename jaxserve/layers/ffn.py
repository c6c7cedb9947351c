"""Feed-forward blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.layers.linear import Linear


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _relu_squared(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


# By config.json's names, as transformers spells them.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": _relu_squared,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNSpec:
    """A dense feed-forward block. Static."""

    intermediate_size: int
    activation: str = "silu"  # a key of ACTIVATIONS, or "xielu", which is learned
    gated: bool = True
    bias: bool = False

    @property
    def activation_size(self) -> int:
        """Values a token has between the projections."""
        return (2 if self.gated else 1) * self.intermediate_size


class XIELU(nnx.Module):
    """An activation with two learned slopes (Huang and Schlag, arXiv 2411.13010)."""

    beta = 0.5
    eps = -1e-6

    def __init__(self, *, dtype: jax.typing.DTypeLike) -> None:
        self.alpha_p = nnx.Param(jnp.zeros((1,), dtype))
        self.alpha_n = nnx.Param(jnp.zeros((1,), dtype))

    def __call__(self, x: Array) -> Array:  # [..., F]
        x32 = x.astype(jnp.float32)
        positive = jax.nn.softplus(self.alpha_p[...].astype(jnp.float32))
        negative = self.beta + jax.nn.softplus(self.alpha_n[...].astype(jnp.float32))
        above = positive * x32 * x32
        below = (jnp.expm1(jnp.minimum(x32, self.eps)) - x32) * negative
        return (jnp.where(x32 > 0, above, below) + self.beta * x32).astype(x.dtype)


class FFN(nnx.Module):
    """down(act(up(x))), or gated down(act(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, size: int, *, spec: FFNSpec, dtype: jax.typing.DTypeLike) -> None:
        hidden_size = spec.intermediate_size
        self.spec = spec
        self.gate_proj = (
            Linear(size, hidden_size, use_bias=spec.bias, dtype=dtype) if spec.gated else None
        )
        self.up_proj = Linear(size, hidden_size, use_bias=spec.bias, dtype=dtype)
        self.down_proj = Linear(hidden_size, size, use_bias=spec.bias, dtype=dtype)
        self.xielu = XIELU(dtype=dtype) if spec.activation == "xielu" else None

    def __call__(self, x: Array) -> Array:  # [T, D] -> [T, D]
        act = self.xielu or ACTIVATIONS[self.spec.activation]
        if self.gate_proj is None:
            return self.down_proj(act(self.up_proj(x)))
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))

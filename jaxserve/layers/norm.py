"""Normalisation: root-mean-square (Zhang and Sennrich, 2019) and layer norm (Ba et al., 2016)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """How vectors are normalised. Static."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float
    weight: bool = True  # False: no learned scale
    bias: bool = False
    plus_one: bool = False  # the stored weight is the scale less 1 (Gemma's, Nemotron's)


class Norm(nnx.Module):
    """Normalises the last axis, in float32, then scales by a learned weight and adds a bias.

    `shape` is the weight's: (size,), or (heads, size) if each head has its own.
    """

    def __init__(self, *shape: int, spec: NormSpec, dtype: jax.typing.DTypeLike) -> None:
        self.spec = spec
        self.weight = nnx.Param(jnp.ones(shape, dtype)) if spec.weight else None
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if spec.bias else None

    def __call__(self, x: Array) -> Array:  # [..., size]
        spec = self.spec
        x32 = x.astype(jnp.float32)
        if spec.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + spec.eps)
        if self.weight is not None:
            weight = self.weight[...].astype(jnp.float32)
            if spec.kind == "rms" and not spec.plus_one:  # rounded first, as Llama does
                x32 = x32.astype(x.dtype).astype(jnp.float32)
            x32 = x32 * (1 + weight if spec.plus_one else weight)
        if self.bias is not None:
            x32 = x32 + self.bias[...].astype(jnp.float32)
        return x32.astype(x.dtype)

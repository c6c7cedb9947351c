"""Rotary position embedding (Su et al., 2021) and its scalings to longer contexts."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """How positions turn into angles. Static.

    `kind` is "default", "linear" (Chen et al., 2023), "llama3" (Llama 3.1's), or "yarn" (Peng et
    al., 2023); fields that a kind does not use keep their defaults.
    """

    head_dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 8192  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: from `factor`
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def frequencies(self) -> np.ndarray:  # [H / 2] float32
        """Radians a position, for each pair of dimensions."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        base = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.kind == "default":
            return base
        if self.kind == "linear":
            return base / np.float32(self.factor)
        return (self._llama3(base) if self.kind == "llama3" else self._yarn(base)).astype(
            np.float32
        )

    def amplitude(self) -> float:
        """What cosines and sines are multiplied by (1 but for yarn)."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def _llama3(self, base: np.ndarray) -> np.ndarray:
        wavelengths = 2 * math.pi / base
        longest = self.original_max_position_embeddings / self.low_freq_factor
        shortest = self.original_max_position_embeddings / self.high_freq_factor
        smooth = (self.original_max_position_embeddings / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * base / self.factor + smooth * base
        scaled = np.where(wavelengths > longest, base / self.factor, base)
        return np.where((wavelengths <= longest) & (wavelengths >= shortest), between, scaled)

    def _yarn(self, base: np.ndarray) -> np.ndarray:
        def dimension(rotations: float) -> float:
            context = self.original_max_position_embeddings
            return (
                self.head_dim
                * math.log(context / (rotations * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        ramp = (np.arange(self.head_dim // 2) - low) / max(high - low, 0.001)
        keep = 1 - np.clip(ramp, 0, 1)  # high frequencies are kept, low ones interpolated
        return base / self.factor * (1 - keep) + base * keep


def angles(spec: RopeSpec, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines [T, H / 2], float32, of positions [T]."""
    a = positions.astype(jnp.float32)[:, None] * jnp.asarray(spec.frequencies())
    return jnp.cos(a) * spec.amplitude(), jnp.sin(a) * spec.amplitude()


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (i, i + H / 2) of x [T, N, H] by the angles [T, H / 2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)

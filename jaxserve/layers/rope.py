"""Rotary position embedding (Su et al., 2021) and its scalings to longer contexts."""

import math
from dataclasses import dataclass, replace
from typing import Self

import jax.numpy as jnp
import numpy as np
from jax import Array

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """How positions turn into angles. Static.

    `kind` is "default", "linear" (Chen et al., 2023), "dynamic" (which up to the context that a
    model was trained with, all that is served, is "default"), "llama3" (Llama 3.1's), "yarn" (Peng
    et al., 2023) or "longrope" (Ding et al., 2024); fields that a kind does not use keep their
    defaults. Meanings and defaults are those of transformers' `modeling_rope_utils`.
    """

    head_dim: int  # columns that are rotated: the first ones, where a head has more
    theta: float
    interleaved: bool = False  # pairs are (2i, 2i + 1), not (i, i + head_dim / 2)
    backwards: bool = False  # by the negative angles
    kind: str = "default"  # one of KINDS
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 8192  # llama3, yarn, longrope
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: from `factor`
    mscale: float | None = None  # yarn: with mscale_all_dim, instead of attention_factor
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: what divides each frequency
    long_factor: tuple[float, ...] = ()  # longrope: the same, for contexts beyond the original
    long_context: bool = False  # longrope: which of the two
    # longrope: attention_factor of long contexts, where it is not that of short ones (PhiMoE's)
    long_attention_factor: float | None = None

    def for_context(self, max_len: int) -> Self:
        """The spec for sequences of up to `max_len` tokens.

        longrope's factors depend on the length. A cached key cannot be rotated anew when its
        sequence grows, so all sequences of an engine are rotated as its longest.
        """
        if self.kind != "longrope":
            return self
        return replace(self, long_context=max_len > self.original_max_position_embeddings)

    def frequencies(self) -> np.ndarray:  # [H / 2] float32
        """Radians a position, for each pair of dimensions."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        wavelengths = np.float32(self.theta) ** exponents
        base = (1.0 / wavelengths).astype(np.float32)
        match self.kind:
            case "default" | "dynamic":
                return base
            case "linear":
                return base / np.float32(self.factor)
            case "llama3":
                return self._llama3(base).astype(np.float32)
            case "yarn":
                return self._yarn(base).astype(np.float32)
            case "longrope":
                factors = self.long_factor if self.long_context else self.short_factor
                return (1.0 / (np.asarray(factors, np.float32) * wavelengths)).astype(np.float32)
            case _:
                raise ValueError(f"no rope of kind {self.kind!r}: one of {KINDS}")

    def amplitude(self) -> float:
        """What cosines and sines are multiplied by (1 but for yarn and longrope)."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.long_context and self.long_attention_factor is not None:
            return self.long_attention_factor
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            if self.factor <= 1:
                return 1.0
            context = self.original_max_position_embeddings
            return math.sqrt(1 + math.log(self.factor) / math.log(context))
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return yarn_mscale(self.factor)

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
        ramp = (np.arange(self.head_dim // 2) - low) / ((high - low) or 0.001)
        keep = 1 - np.clip(ramp, 0, 1)  # high frequencies are kept, low ones interpolated
        return base / self.factor * (1 - keep) + base * keep


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """yarn's temperature for a context `factor` times as long (Peng et al., 2023, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def angles(spec: RopeSpec, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines [T, H / 2], float32, of positions [T]."""
    a = positions.astype(jnp.float32)[:, None] * jnp.asarray(spec.frequencies())
    a = -a if spec.backwards else a
    return jnp.cos(a) * spec.amplitude(), jnp.sin(a) * spec.amplitude()


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool = False) -> Array:
    """Rotates the first H columns of x [T, N, >= H] by the angles [T, H / 2]; the rest stays.

    Pairs are columns (i, i + H / 2), or (2i, 2i + 1) if `interleaved`.
    """
    width = 2 * cos.shape[-1]
    x32 = x[..., :width].astype(jnp.float32)
    cos, sin = cos[:, None, :], sin[:, None, :]
    if interleaved:
        first, second = x32[..., 0::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        turned = jnp.stack(pair, axis=-1).reshape(x32.shape)
    else:
        turned = jnp.concatenate(pair, axis=-1)
    turned = turned.astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)

"""Grouped-query attention (Ainslie et al., 2023) over paged KV (Kwon et al., 2023)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.layers.kernels import AttentionSpec, Kernels, KVSpec, PageMetadata
from jaxserve.layers.linear import Linear
from jaxserve.layers.norm import Norm, NormSpec
from jaxserve.layers.rope import RopeSpec, rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """Queries grow with position: 1 + scale * log(1 + floor((position + first) / floor_scale)).

    Llama 4's, for layers without rotary embedding; Ministral 3 counts positions from 0.
    """

    floor_scale: float
    scale: float
    first: int = 1

    def __call__(self, positions: Array) -> Array:  # [T] -> [T] float32
        steps = jnp.floor((positions.astype(jnp.float32) + self.first) / self.floor_scale)
        return 1 + self.scale * jnp.log1p(steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAttentionSpec:
    """Attention that caches a key and a value for each kv head. Static."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # logits = scale * q . k
    rope: RopeSpec | None  # None: positions are not rotated in
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    output_bias: bool = False
    qk_norm: NormSpec | None = None
    # "head": one weight [H] for all heads; "heads": each has its own [N, H]; "all": the heads of a
    # token are normalised as one vector [N * H].
    qk_norm_over: Literal["head", "heads", "all"] = "head"
    qk_norm_after_rope: bool = False
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    chunked: bool = False  # it sees those of its own window, one of 0 .., window .., 2 window ..
    soft_cap: float | None = None
    sinks: bool = False
    alibi: tuple[float, ...] | None = None  # slope of each head (Press et al., 2022)
    clip: float | None = None  # queries, keys and values stay within +- clip
    temperature: Temperature | None = None

    def attention(self, *, page_size: int, dtype: jax.typing.DTypeLike) -> AttentionSpec:
        """What the kernels are told, for a cache that stores `dtype`."""
        kv = KVSpec(
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=page_size,
            dtype=dtype,
        )
        return AttentionSpec(
            kv=kv,
            num_heads=self.num_heads,
            scale=self.scale,
            window=self.window,
            chunked=self.chunked,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
            alibi=self.alibi,
        )

    @property
    def activation_size(self) -> int:
        """Values a token has between the projections."""
        return (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class HeadAttention(nnx.Module):
    """Projects, rotates, writes the new keys and values, attends, projects back."""

    def __init__(
        self,
        size: int,
        *,
        spec: HeadAttentionSpec,
        attention: AttentionSpec,
        kernels: Kernels,
        dtype: jax.typing.DTypeLike,
    ) -> None:
        heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.spec = spec
        self.attention_spec = attention
        self.kernels = kernels
        self.q_proj = Linear(size, heads * head_dim, use_bias=spec.q_bias, dtype=dtype)
        self.k_proj = Linear(size, kv_heads * head_dim, use_bias=spec.k_bias, dtype=dtype)
        self.v_proj = Linear(size, kv_heads * head_dim, use_bias=spec.v_bias, dtype=dtype)
        self.o_proj = Linear(heads * head_dim, size, use_bias=spec.output_bias, dtype=dtype)
        self.q_norm = self._make_norm(heads, dtype)
        self.k_norm = self._make_norm(kv_heads, dtype)
        self.sinks = nnx.Param(jnp.zeros((heads,), jnp.float32)) if spec.sinks else None

    def _make_norm(self, num_heads: int, dtype: jax.typing.DTypeLike) -> Norm | None:
        spec, head_dim = self.spec, self.spec.head_dim
        if spec.qk_norm is None:
            return None
        shape = {
            "head": (head_dim,),
            "heads": (num_heads, head_dim),
            "all": (num_heads * head_dim,),
        }[spec.qk_norm_over]
        return Norm(*shape, spec=spec.qk_norm, dtype=dtype)

    def __call__(
        self,
        x: Array,  # [T, D]
        kv_pages: Array,
        pages: PageMetadata,
        cos_sin: tuple[Array, Array] | None,
        positions: Array,  # [T]
        layer: int | Array,
    ) -> tuple[Array, Array]:
        spec = self.spec
        q = self._prepare(self.q_proj(x), self.q_norm, cos_sin)  # [T, N, H]
        k = self._prepare(self.k_proj(x), self.k_norm, cos_sin)  # [T, K, H]
        v = self._clipped(self.v_proj(x)).reshape(-1, spec.num_kv_heads, spec.head_dim)
        if spec.temperature is not None:
            q = (q * spec.temperature(positions)[:, None, None]).astype(q.dtype)
        sinks = None if self.sinks is None else self.sinks[...]
        out, kv_pages = self.kernels.attend(
            q, k, v, kv_pages, pages, layer, self.attention_spec, sinks
        )
        return self.o_proj(out.reshape(-1, spec.num_heads * spec.head_dim)), kv_pages  # [T, D]

    def _prepare(
        self, x: Array, norm: Norm | None, cos_sin: tuple[Array, Array] | None
    ) -> Array:  # [T, N * H] -> [T, N, H]
        spec = self.spec
        if norm is not None and spec.qk_norm_over == "all":
            x, norm = norm(x), None
        x = self._clipped(x)  # after such a norm: OLMoE's way; no other model has both
        x = x.reshape(len(x), -1, spec.head_dim)
        if norm is not None and not spec.qk_norm_after_rope:
            x = norm(x)
        if cos_sin is not None and spec.rope is not None:
            x = rotate(x, *cos_sin, interleaved=spec.rope.interleaved)
        return norm(x) if norm is not None and spec.qk_norm_after_rope else x

    def _clipped(self, x: Array) -> Array:
        clip = self.spec.clip
        return x if clip is None else jnp.clip(x, -clip, clip)

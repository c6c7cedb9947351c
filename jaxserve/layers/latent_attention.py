"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over paged latent rows."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.layers.kernels import AttentionSpec, Kernels, KVSpec, PageMetadata
from jaxserve.layers.linear import Linear
from jaxserve.layers.norm import Norm, NormSpec
from jaxserve.layers.rope import RopeSpec, rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionSpec:
    """Attention that caches one latent row a token, for all heads. Static."""

    num_heads: int
    q_rank: int | None  # None: queries are projected in one step
    kv_rank: int
    nope_dim: int  # columns of a query or key without a position
    rope_dim: int  # columns of a query or key that are rotated; the key's are shared by all heads
    value_dim: int
    scale: float  # logits = scale * q . k
    rope: RopeSpec
    norm: NormSpec  # of both latents
    bias: bool = False  # of the projections to latents, and of the output's

    def attention(self, *, page_size: int, dtype: jax.typing.DTypeLike) -> AttentionSpec:
        """What the kernels are told, for a cache that stores `dtype`."""
        kv = KVSpec(
            kind="latent",
            num_kv_heads=1,
            head_dim=self.kv_rank + self.rope_dim,
            value_dim=self.kv_rank,
            page_size=page_size,
            dtype=dtype,
        )
        return AttentionSpec(kv=kv, num_heads=self.num_heads, scale=self.scale)

    @property
    def window(self) -> None:
        """Every token sees all before it."""
        return None

    @property
    def activation_size(self) -> int:
        """Values a token has between the projections."""
        latent = 2 * self.kv_rank + self.rope_dim
        head = self.nope_dim + self.rope_dim + self.value_dim + latent
        return self.num_heads * head + latent + (self.q_rank or 0)


class LatentAttention(nnx.Module):
    """Attends in the latent space: the up-projections are part of the query and of the output.

    A head's key is k_b c for a token's latent c, so q . (k_b c) = (k_b^T q) . c; its value is
    v_b c, so the weighted sum of values is v_b times the weighted sum of latents. The cache holds c
    and the rotated part of the key, which all heads share.
    """

    def __init__(
        self,
        size: int,
        *,
        spec: LatentAttentionSpec,
        attention: AttentionSpec,
        kernels: Kernels,
        dtype: jax.typing.DTypeLike,
    ) -> None:
        heads, rank = spec.num_heads, spec.kv_rank
        q_size = heads * (spec.nope_dim + spec.rope_dim)
        self.spec = spec
        self.attention_spec = attention
        self.kernels = kernels
        if spec.q_rank is None:
            self.q_proj = Linear(size, q_size, dtype=dtype)
        else:
            self.q_a_proj = Linear(size, spec.q_rank, use_bias=spec.bias, dtype=dtype)
            self.q_a_norm = Norm(spec.q_rank, spec=spec.norm, dtype=dtype)
            self.q_b_proj = Linear(spec.q_rank, q_size, dtype=dtype)
        self.kv_a_proj = Linear(size, rank + spec.rope_dim, use_bias=spec.bias, dtype=dtype)
        self.kv_a_norm = Norm(rank, spec=spec.norm, dtype=dtype)
        # Rows of all heads, as checkpoints store them: neither is transposed where it is used.
        self.k_b = nnx.Param(jnp.zeros((heads * spec.nope_dim, rank), dtype))
        self.v_b = nnx.Param(jnp.zeros((heads * spec.value_dim, rank), dtype))
        self.o_proj = Linear(heads * spec.value_dim, size, use_bias=spec.bias, dtype=dtype)

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
        heads, rank = spec.num_heads, spec.kv_rank
        if cos_sin is None:
            raise ValueError("latent attention has rotated columns: it needs their angles")
        turn = functools.partial(
            rotate, cos=cos_sin[0], sin=cos_sin[1], interleaved=spec.rope.interleaved
        )

        q = self._queries(x).reshape(len(x), heads, -1)  # [T, N, nope + rope]
        q_rope = turn(q[..., spec.nope_dim :])
        k_b = self.k_b[...].reshape(heads, spec.nope_dim, rank)
        q_latent = jnp.einsum("tnh,nhr->tnr", q[..., : spec.nope_dim], k_b)
        q = jnp.concatenate([q_latent, q_rope], axis=-1)  # [T, N, rank + rope]

        row = self.kv_a_proj(x)  # [T, rank + rope]
        latent = self.kv_a_norm(row[:, :rank])[:, None]
        k_rope = turn(row[:, None, rank:])
        k = jnp.concatenate([latent, k_rope], axis=-1)  # [T, 1, rank + rope]

        out, kv_pages = self.kernels.attend(
            q, k, None, kv_pages, pages, layer, self.attention_spec
        )  # [T, N, rank]
        v_b = self.v_b[...].reshape(heads, spec.value_dim, rank)
        out = jnp.einsum("tnr,nvr->tnv", out, v_b).reshape(len(x), -1)
        return self.o_proj(out), kv_pages  # [T, D]

    def _queries(self, x: Array) -> Array:  # [T, D] -> [T, N * (nope + rope)]
        if self.spec.q_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))

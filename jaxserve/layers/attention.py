"""Grouped-query attention (Ainslie et al., 2023) over paged KV (Kwon et al., 2023)."""

import jax
from flax import nnx
from jax import Array

from jaxserve.layers.kernels import AttentionSpec, Kernels, PageMetadata
from jaxserve.layers.linear import Linear
from jaxserve.layers.rope import rotate


class Attention(nnx.Module):
    """Projects, rotates, writes the new keys and values, attends, projects back."""

    def __init__(
        self,
        size: int,
        *,
        spec: AttentionSpec,
        kernels: Kernels,
        use_bias: bool,
        use_output_bias: bool,
        dtype: jax.typing.DTypeLike,
    ) -> None:
        head_dim = spec.kv.head_dim
        self.spec = spec
        self.kernels = kernels
        self.q_proj = Linear(size, spec.num_heads * head_dim, use_bias=use_bias, dtype=dtype)
        self.k_proj = Linear(size, spec.kv.num_kv_heads * head_dim, use_bias=use_bias, dtype=dtype)
        self.v_proj = Linear(size, spec.kv.num_kv_heads * head_dim, use_bias=use_bias, dtype=dtype)
        self.o_proj = Linear(spec.num_heads * head_dim, size, use_bias=use_output_bias, dtype=dtype)

    def __call__(
        self,
        x: Array,
        kv_pages: Array,
        pages: PageMetadata,
        cos_sin: tuple[Array, Array],
        layer: int | Array,
    ) -> tuple[Array, Array]:
        heads, kv_heads, head_dim = (
            self.spec.num_heads,
            self.spec.kv.num_kv_heads,
            self.spec.kv.head_dim,
        )
        q = rotate(self.q_proj(x).reshape(-1, heads, head_dim), *cos_sin)  # [T, N, H]
        k = rotate(self.k_proj(x).reshape(-1, kv_heads, head_dim), *cos_sin)  # [T, K, H]
        v = self.v_proj(x).reshape(-1, kv_heads, head_dim)  # [T, K, H]
        out, kv_pages = self.kernels.attend(q, k, v, kv_pages, pages, layer, self.spec)
        return self.o_proj(out.reshape(-1, heads * head_dim)), kv_pages  # [T, D]

"""Attention over paged KV on TPUs: which kernel attends to what."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.attention_tpu_decode import attend_decode
from pallas_kernels.attention_tpu_latent import attend_latent, why_not_latent
from pallas_kernels.attention_tpu_mixed import attend_mixed
from pallas_kernels.backend import Backend
from pallas_kernels.chips import Chip
from pallas_kernels.types import AttentionSpec, PageMetadata

_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")  # of a cache
_MAX_PAGE_SIZE = 256
_MAX_HEAD_DIM = 256


def why_not(spec: AttentionSpec, chip: Chip) -> str | None:
    """Why these kernels cannot attend to this kind of layer on this chip, or None if they can."""
    kv = spec.kv
    if chip.tpu_generation is None:
        return f"it needs a TPU of a known generation, this is {chip}"
    if kv.kind == "latent":
        return why_not_latent(spec, chip)
    if jnp.dtype(kv.dtype).name not in _DTYPES:
        return f"a cache of {jnp.dtype(kv.dtype)}: it reads {', '.join(_DTYPES)}"
    if kv.page_size % 8 or not 8 <= kv.page_size <= _MAX_PAGE_SIZE or 256 % kv.page_size:
        return f"page_size={kv.page_size} is none of 8, 16, 32, 64, 128, 256"
    if kv.head_dim > _MAX_HEAD_DIM:
        return f"head_dim={kv.head_dim} is more than {_MAX_HEAD_DIM}"
    return None


def attend_tpu(
    q: Array,  # [T, N, H]
    kv_pages: Array,  # [L * num_pages, *page], with this step's tokens written
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N] float32, if spec.sinks
) -> Array:
    """Attention of every token to its row's tokens up to itself: [T, N, out_dim].

    Padding gets zeros.
    """
    options = {"spec": spec, "backend": backend, "sinks": sinks}
    if spec.kv.kind == "latent":
        return attend_latent(q, kv_pages, pages, layer, **options)
    out = attend_decode(q, kv_pages, pages, layer, **options)
    out = jnp.pad(out, ((0, q.shape[0] - out.shape[0]), (0, 0), (0, 0)))
    token = lax.broadcasted_iota(jnp.int32, (q.shape[0], 1, 1), 0)
    out = jnp.where(token < pages.num_decode_rows, out, jnp.zeros_like(out))
    return attend_mixed(q, out, kv_pages, pages, layer, **options)

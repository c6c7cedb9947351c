"""A kernel beside the XLA path on a small ragged batch: run once where a kernel is first used."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention import paged_attention
from pallas_kernels.backend import XLA, Backend, BackendRefused
from pallas_kernels.kv_write import kv_pages_shape, write_kv
from pallas_kernels.ragged import RaggedShape, scatter_pages
from pallas_kernels.types import AttentionSpec, PageMetadata

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}
_LAYERS, _LAYER = 2, 1


def verify(
    spec: AttentionSpec, backend: Backend, *, dtype: jax.typing.DTypeLike, seed: int = 0
) -> float:
    """`self_check`, which must pass: raises BackendRefused where the kernel is wrong."""
    found, allowed = self_check(spec, backend, dtype=dtype, seed=seed), tolerance(dtype)
    if found <= allowed:
        return found
    raise BackendRefused(
        f"attention backend {backend.name!r} is wrong on this {backend.chip}: it differs from "
        f"'xla' by {found:.2g} of the result, more than the {allowed:g} that rounding explains. "
        "Use the backend xla, and please report this"
    )


def tolerance(dtype: jax.typing.DTypeLike) -> float:
    """The most that a right kernel differs, by q's type."""
    return TOLERANCE[jnp.dtype(dtype).name]


def self_check(
    spec: AttentionSpec, backend: Backend, *, dtype: jax.typing.DTypeLike, seed: int = 0
) -> float:
    """||out - expected|| / ||expected|| of `backend` beside "xla", on the default device.

    Decode rows, a chunk with history, a whole prompt, page borders, an empty row and unused rows;
    pages that no row owns hold NaN. `dtype` is that of q, k and v. Infinity if a value is not
    finite or padding is not zero.
    """
    size = spec.kv.page_size
    shape = RaggedShape(
        rows=[
            (1, 1),
            (1, size),
            (1, size + 1),
            (1, 333),
            (0, 0),
            (40, 40 + size),
            (1, 7),
            (70, 70),
        ],
        num_tokens=128,
        max_rows=16,
        table_pages=-(-512 // size),
    )
    pages, older = scatter_pages(shape, page_size=size, seed=seed)
    run = jax.jit(functools.partial(_attend), static_argnames=("spec", "backend", "dtype"))
    expected, out = (
        np.asarray(
            run(pages, jnp.asarray(older), seed, spec=spec, backend=each, dtype=jnp.dtype(dtype)),
            np.float64,
        )
        for each in (dataclasses.replace(XLA, chip=backend.chip), backend)
    )
    num_used = int(pages.query_starts[-1])
    if np.any(out[num_used:]) or not np.all(np.isfinite(out)):
        return float("inf")
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def _attend(
    pages: PageMetadata,
    older: Array,
    seed: int,
    *,
    spec: AttentionSpec,
    backend: Backend,
    dtype: jnp.dtype,
) -> Array:
    """Fill a cache with the rows' older tokens, then attend to it."""
    kv = spec.kv
    keys = iter(jax.random.split(jax.random.key(seed), 6))

    def normal(num_tokens: int, num_heads: int) -> Array:
        shape = (num_tokens, num_heads, kv.head_dim)
        return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

    def key_and_value(num_tokens: int) -> tuple[Array, Array | None]:
        k, v = normal(num_tokens, kv.num_kv_heads), normal(num_tokens, kv.num_kv_heads)
        return k, None if kv.kind == "latent" else v

    cache = kv_pages_shape(kv, _LAYERS, pages.num_pages, backend=backend)
    is_float = jnp.issubdtype(cache.dtype, jnp.floating)
    kv_pages = jnp.full(cache.shape, jnp.nan if is_float else 100, cache.dtype)
    k, v = key_and_value(older.shape[0])
    history = dataclasses.replace(pages, slots=older)
    kv_pages = write_kv(kv_pages, k, v, history, _LAYER, spec=kv, backend=backend)
    num_tokens = pages.slots.shape[0]
    k, v = key_and_value(num_tokens)
    sinks = jax.random.normal(next(keys), (spec.num_heads,)) if spec.sinks else None
    out, _ = paged_attention(
        normal(num_tokens, spec.num_heads),
        k,
        v,
        kv_pages,
        pages,
        jnp.int32(_LAYER),
        spec=spec,
        backend=backend,
        sinks=sinks,
    )
    return out

"""Attention over a latent cache (MLA) on Hopper: decode and prefill by the decode kernel.

With the up-projections absorbed (arXiv 2405.04434) all query heads of a token share one key, so a
single token already is a tile of as many rows as there are heads, 128 in DeepSeek-V3. Here each
token is a row of its own, of the tokens up to itself, and `attention_gpu_decode` shares their KV
out; tokens of one chunk read the same pages one after the other, from the L2 cache.

What the thread blocks found of a token lies in memory until it is merged, 2 KiB a head. So of a
long batch 256 tokens are worked on at a time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_gpu_decode import attend_decode
from pallas_kernels.backend import Backend
from pallas_kernels.types import AttentionSpec, PageMetadata

_MOST_TOKENS = 256  # at a time


def attend_latent(
    q: Array,  # [T, N, H]
    kv_pages: Array,  # [L * num_pages, page_size, 1, H], with this step's tokens written
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N] float32
    **options: Any,  # of attend_decode
) -> Array:
    """Attention of every token to its row's tokens up to itself: [T, N, out_dim]; padding: 0."""

    def attend(q: Array, first: int | Array) -> Array:
        rows = token_rows(pages, first, q.shape[0])
        return attend_decode(
            q, kv_pages, rows, layer, spec=spec, backend=backend, sinks=sinks, **options
        )

    num_tokens, num_heads, width = q.shape
    if num_tokens <= _MOST_TOKENS:
        return attend(q, 0)
    num_slices = -(-num_tokens // _MOST_TOKENS)
    size = -(-num_tokens // num_slices)
    q = jnp.pad(q, ((0, num_slices * size - num_tokens), (0, 0), (0, 0)))
    firsts = jnp.arange(num_slices, dtype=jnp.int32) * size
    slices = q.reshape(num_slices, size, num_heads, width)
    out = jax.lax.map(lambda each: attend(*each), (slices, firsts))
    return out.reshape(num_slices * size, *out.shape[2:])[:num_tokens]


def token_rows(pages: PageMetadata, first: int | Array, num: int) -> PageMetadata:
    """Tokens `first` to `first + num` of a batch as decode rows: each sees the tokens up to itself.

    They are decode rows as far as tokens belong to somebody; the last rows of a batch do not.
    """
    starts = pages.query_starts
    token = first + jnp.arange(num, dtype=jnp.int32)
    row = jnp.searchsorted(starts[1:], token, side="right", method="compare_all")
    row = jnp.minimum(row, pages.kv_lens.shape[0] - 1).astype(jnp.int32)
    is_owned = token < starts[-1]
    kv_lens = pages.kv_lens[row] - (starts[row + 1] - 1 - token)
    return dataclasses.replace(
        pages,
        page_table=pages.page_table[row],
        slots=token,  # nobody writes
        kv_lens=jnp.where(is_owned, kv_lens, 0),
        query_starts=jnp.arange(num + 1, dtype=jnp.int32),
        num_rows=is_owned.sum(dtype=jnp.int32),
        num_decode_rows=is_owned.sum(dtype=jnp.int32),
    )

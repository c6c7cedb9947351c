"""Attention over paged KV, the definition of correct: one token at a time, float32, no tricks.

It gathers all the pages of a token's row for each token, so its time is quadratic. For tests only.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.kv_write import split_kv
from pallas_kernels.types import AttentionSpec, PageMetadata


def attend_reference(
    q: Array,  # [T, N, H]
    kv_pages: Array,  # [L * num_pages, page_size, 2K, H], with this step's tokens written
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
) -> Array:
    """Attention of every token to its row's tokens up to itself: [T, N, H]. Padding gets zeros."""
    num_kv_heads, head_dim = spec.kv.num_kv_heads, spec.kv.head_dim
    group = spec.num_heads // num_kv_heads
    num_rows = pages.kv_lens.shape[0]

    def attend_token(token: Array, query: Array) -> Array:  # [], [N, H] -> [N, H]
        row = jnp.searchsorted(pages.query_starts, token, side="right") - 1
        in_use = row < num_rows
        row = jnp.minimum(row, num_rows - 1)
        tokens_after = pages.query_starts[row + 1] - 1 - token
        position = pages.kv_lens[row] - 1 - tokens_after

        ids = layer * pages.num_pages + pages.page_table[row]
        pairs = kv_pages[ids].astype(jnp.float32)  # [P, page_size, 2K, H]
        k, v = split_kv(pairs.reshape(-1, 2 * num_kv_heads, head_dim))  # [S, K, H]
        kv_position = jnp.arange(k.shape[0])
        seen = in_use & (kv_position <= position)
        if spec.window is not None:
            seen &= kv_position > position - spec.window

        grouped = query.astype(jnp.float32).reshape(num_kv_heads, group, head_dim)
        logits = spec.scale * jnp.sum(grouped[None] * k[:, :, None], axis=-1)  # [S, K, G]
        if spec.soft_cap is not None:
            logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
        seen = seen[:, None, None]
        logits = jnp.where(seen, logits, -jnp.inf)
        top = jnp.max(logits, axis=0, initial=jnp.finfo(jnp.float32).min)
        weights = jnp.where(seen, jnp.exp(logits - top), 0.0)  # [S, K, G]
        values = jnp.where(seen, v, 0.0)  # whatever an unseen slot holds, NaN too, must not leak
        out = jnp.sum(weights[..., None] * values[:, :, None], axis=0)  # [K, G, H]
        total = jnp.sum(weights, axis=0)[..., None]
        out = jnp.where(in_use, out / jnp.where(in_use, total, 1.0), 0.0)
        return out.reshape(query.shape).astype(query.dtype)

    tokens = jnp.arange(q.shape[0], dtype=jnp.int32)
    return jax.lax.map(lambda each: attend_token(*each), (tokens, q))

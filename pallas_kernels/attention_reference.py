"""Attention over paged KV, the definition of correct: one token at a time, float32, no tricks.

It gathers all the pages of a token's row for each token, so its time is quadratic. For tests only.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.kv_write import page_layout, split_kv, token_rows
from pallas_kernels.types import AttentionSpec, PageMetadata


def attend_reference(
    q: Array,  # [T, N, H]
    kv_pages: Array,  # [L * num_pages, *page], with this step's tokens written
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend = REFERENCE,
    sinks: Array | None = None,  # [N]
) -> Array:
    """Attention of every token to its row's tokens up to itself: [T, N, out_dim].

    Padding gets zeros. `backend` names the layout of the pages: that of a kernel whose cache is
    being checked, or the plain one.
    """
    kv, group = spec.kv, spec.group
    num_rows = pages.kv_lens.shape[0]
    layout = page_layout(kv, backend)

    def attend_token(token: Array, query: Array) -> Array:  # [], [N, H] -> [N, out_dim]
        row = jnp.searchsorted(pages.query_starts, token, side="right") - 1
        in_use = row < num_rows
        row = jnp.minimum(row, num_rows - 1)
        tokens_after = pages.query_starts[row + 1] - 1 - token
        position = pages.kv_lens[row] - 1 - tokens_after

        ids = layer * pages.num_pages + pages.page_table[row]
        rows = token_rows(kv_pages[ids].astype(jnp.float32), layout)  # [P, page_size, C, W]
        k, v = split_kv(rows.reshape(-1, *rows.shape[2:]), kv, layout)  # [S, K, H]
        kv_position = jnp.arange(k.shape[0])
        seen = in_use & (kv_position <= position)
        if spec.window is not None and spec.chunked:
            seen &= kv_position // spec.window == position // spec.window
        elif spec.window is not None:
            seen &= kv_position > position - spec.window

        grouped = query.astype(jnp.float32).reshape(kv.num_kv_heads, group, kv.head_dim)
        logits = spec.scale * jnp.sum(grouped[None] * k[:, :, None], axis=-1)  # [S, K, G]
        if spec.soft_cap is not None:
            logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
        if spec.alibi is not None:
            slopes = jnp.asarray(spec.alibi, jnp.float32).reshape(kv.num_kv_heads, group)
            logits += slopes * (kv_position - position)[:, None, None]
        seen = seen[:, None, None]
        logits = jnp.where(seen, logits, -jnp.inf)
        top = jnp.max(logits, axis=0, initial=jnp.finfo(jnp.float32).min)  # [K, G]
        sink = jnp.full(top.shape, -jnp.inf) if sinks is None else sinks.reshape(top.shape)
        top = jnp.maximum(top, sink)
        weights = jnp.where(seen, jnp.exp(logits - top), 0.0)  # [S, K, G]
        values = jnp.where(seen, v, 0.0)  # whatever an unseen slot holds, NaN too, must not leak
        out = jnp.sum(weights[..., None] * values[:, :, None], axis=0)  # [K, G, out_dim]
        total = (jnp.sum(weights, axis=0) + jnp.exp(sink - top))[..., None]
        out = jnp.where(in_use, out / jnp.where(in_use, total, 1.0), 0.0)
        return out.reshape(spec.num_heads, kv.out_dim).astype(query.dtype)

    tokens = jnp.arange(q.shape[0], dtype=jnp.int32)
    return jax.lax.map(lambda each: attend_token(*each), (tokens, q))

"""Random ragged batches over scattered pages, and a dense numpy oracle for them."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.kv_write import kv_pages_shape
from pallas_kernels.types import AttentionSpec, PageMetadata


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "k", "v", "kv_pages", "pages", "layer", "histories"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Arguments of paged_attention, and each row's tokens as numpy float32."""

    q: Array  # [T, N, H]
    k: Array  # [T, K, H]
    v: Array  # [T, K, H]
    kv_pages: Array
    pages: PageMetadata
    layer: int | Array
    histories: list[tuple[np.ndarray, np.ndarray]]  # each row's keys and values [kv_len, K, H]


def make_batch(
    spec: AttentionSpec,
    rows: list[tuple[int, int]],  # (query tokens, kv tokens those included), decode rows first
    *,
    num_decode_rows: int,
    num_tokens: int,  # T
    max_rows: int,  # B
    num_layers: int = 2,
    layer: int = 1,
    spare_pages: int = 3,
    poison: float = np.nan,
    seed: int = 0,
) -> Batch:
    """A batch whose cache holds each row's older tokens on shuffled pages and poison elsewhere."""
    rng = np.random.default_rng(seed)
    kv = spec.kv
    size = kv.page_size
    num_pages_of = [-(-kv_len // size) for _, kv_len in rows]
    num_pages = _power_of_two(max(64, 1 + sum(num_pages_of) + spare_pages))
    free = list(rng.permutation(np.arange(1, num_pages)))
    table = np.zeros((max_rows, _power_of_two(max([8, *num_pages_of]) + 1)), np.int32)
    shape = kv_pages_shape(kv, num_layers, num_pages)
    cache = np.full(shape.shape, poison, np.float32)
    slots = rng.integers(0, size, num_tokens).astype(np.int32)
    kv_lens = np.zeros(max_rows, np.int32)
    starts = np.zeros(max_rows + 1, np.int32)
    q = rng.standard_normal((num_tokens, spec.num_heads, kv.head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, num_tokens, kv.num_kv_heads, kv.head_dim)).astype(np.float32)
    histories = []
    token = 0
    for row, (num_queries, kv_len) in enumerate(rows):
        ids = [free.pop() for _ in range(num_pages_of[row])]
        table[row, : len(ids)] = ids
        kv_lens[row], starts[row] = kv_len, token
        shape_of_row = (2, kv_len, kv.num_kv_heads, kv.head_dim)
        keys, values = rng.standard_normal(shape_of_row).astype(np.float32)
        old = kv_len - num_queries
        keys[old:], values[old:] = k[token : token + num_queries], v[token : token + num_queries]
        for position in range(kv_len):
            page, offset = ids[position // size], position % size
            if position < old:
                where = layer * num_pages + page
                cache[where, offset, 0::2], cache[where, offset, 1::2] = (
                    keys[position],
                    values[position],
                )
            else:
                slots[token + position - old] = page * size + offset
        histories.append((keys, values))
        token += num_queries
    starts[len(rows) :] = token
    pages = PageMetadata(
        page_table=jnp.asarray(table),
        slots=jnp.asarray(slots),
        kv_lens=jnp.asarray(kv_lens),
        query_starts=jnp.asarray(starts),
        num_rows=jnp.int32(len(rows)),
        num_decode_rows=jnp.int32(num_decode_rows),
        num_pages=num_pages,
    )
    cast = [jnp.asarray(each, kv.dtype) for each in (q, k, v, cache)]
    return Batch(
        q=cast[0],
        k=cast[1],
        v=cast[2],
        kv_pages=cast[3],
        pages=pages,
        layer=layer,
        histories=histories,
    )


def _power_of_two(least: int) -> int:
    """Sizes of few kinds, so that batches share executables."""
    return 1 << (least - 1).bit_length()


def oracle(spec: AttentionSpec, batch: Batch) -> np.ndarray:
    """Dense attention in float64 numpy, row by row: [T, N, H]."""
    q = np.asarray(batch.q, np.float64)
    out = np.zeros(q.shape)
    group = spec.num_heads // spec.kv.num_kv_heads
    starts = np.asarray(batch.pages.query_starts)
    for row, (keys, values) in enumerate(batch.histories):
        queries = q[starts[row] : starts[row + 1]]
        k, v = (np.repeat(each.astype(np.float64), group, axis=1) for each in (keys, values))
        logits = spec.scale * np.einsum("qnh,snh->nqs", queries, k)
        if spec.soft_cap is not None:
            logits = spec.soft_cap * np.tanh(logits / spec.soft_cap)
        at = len(keys) - len(queries) + np.arange(len(queries))[:, None]
        seen = np.arange(len(keys)) <= at
        if spec.window is not None:
            seen &= np.arange(len(keys)) > at - spec.window
        logits = np.where(seen, logits, -np.inf)
        if logits.size:
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[starts[row] : starts[row + 1]] = np.einsum("nqs,snh->qnh", weights, v)
    return out

"""Random ragged batches over scattered pages, and a dense numpy oracle for them."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention import paged_attention
from pallas_kernels.backend import XLA, Backend
from pallas_kernels.kv_write import kv_pages_shape, saturate, write_kv
from pallas_kernels.types import AttentionSpec, PageMetadata


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "k", "v", "kv_pages", "pages", "layer", "sinks", "histories"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Arguments of paged_attention, and each row's tokens as numpy float32."""

    q: Array  # [T, N, H]
    k: Array  # [T, K, H]
    v: Array | None  # [T, K, H]
    kv_pages: Array
    pages: PageMetadata
    layer: int | Array
    sinks: Array | None  # [N]
    histories: list[tuple[np.ndarray, np.ndarray]]  # each row's keys and values [kv_len, K, H]


@functools.partial(jax.jit, static_argnames=("spec", "backend"))
def run(batch: Batch, *, spec: AttentionSpec, backend: Backend) -> tuple[Array, Array]:
    """paged_attention of a batch without histories."""
    return paged_attention(
        batch.q,
        batch.k,
        batch.v,
        batch.kv_pages,
        batch.pages,
        batch.layer,
        spec=spec,
        backend=backend,
        sinks=batch.sinks,
    )


def error(out: Array, expected: np.ndarray) -> float:
    """||out - expected|| / ||expected||, NaN if any value is."""
    difference = np.linalg.norm(np.asarray(out, np.float64) - expected)
    return float(difference / max(float(np.linalg.norm(expected)), 1e-30))


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
    backend: Backend = XLA,  # whose layout the cache has
    dtype: jax.typing.DTypeLike | None = None,  # of q, k and v; None: the cache's, or bfloat16
) -> Batch:
    """A batch whose cache holds each row's older tokens on shuffled pages and poison elsewhere."""
    rng = np.random.default_rng(seed)
    kv = spec.kv
    size = kv.page_size
    stored = jnp.dtype(kv.dtype)
    if dtype is None:
        dtype = stored if stored.itemsize > 1 else jnp.bfloat16
    num_pages_of = [-(-kv_len // size) for _, kv_len in rows]
    num_pages = _power_of_two(max(64, 1 + sum(num_pages_of) + spare_pages))
    free = list(rng.permutation(np.arange(1, num_pages)))
    table = np.zeros((max_rows, _power_of_two(max([8, *num_pages_of]) + 1)), np.int32)
    slots = rng.integers(0, size, num_tokens).astype(np.int32)
    kv_lens = np.zeros(max_rows, np.int32)
    starts = np.zeros(max_rows + 1, np.int32)
    q = rng.standard_normal((num_tokens, spec.num_heads, kv.head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, num_tokens, kv.num_kv_heads, kv.head_dim)).astype(np.float32)
    q, k, v = (np.asarray(jnp.asarray(x, dtype), np.float32) for x in (q, k, v))
    sinks = rng.standard_normal(spec.num_heads).astype(np.float32) + 1
    histories = []
    old_slots, old_keys, old_values = [], [], []
    token = 0
    for row, (num_queries, kv_len) in enumerate(rows):
        ids = np.array([free.pop() for _ in range(num_pages_of[row])], np.int32)
        table[row, : len(ids)] = ids
        kv_lens[row], starts[row] = kv_len, token
        shape_of_row = (2, kv_len, kv.num_kv_heads, kv.head_dim)
        keys, values = rng.standard_normal(shape_of_row).astype(np.float32)
        old = kv_len - num_queries
        keys[old:], values[old:] = k[token : token + num_queries], v[token : token + num_queries]
        if kv.kind == "latent":
            values = keys[..., : kv.out_dim]
        position = np.arange(kv_len)
        where = ids[position // size] * size + position % size
        slots[token : token + num_queries] = where[old:]
        old_slots.append(where[:old])
        old_keys.append(keys[:old])
        old_values.append(values[:old])
        histories.append((_stored(keys, stored), _stored(values, stored)))
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
    shape = kv_pages_shape(kv, num_layers, num_pages, backend=backend)
    if jnp.issubdtype(stored, jnp.integer) and not np.isfinite(poison):
        poison = 100
    cache = jnp.full(shape.shape, poison, stored)
    if rows:
        cache = _fill(cache, old_slots, old_keys, old_values, pages, layer, spec, backend)
    is_latent = kv.kind == "latent"
    return Batch(
        q=jnp.asarray(q, dtype),
        k=jnp.asarray(k, dtype),
        v=None if is_latent else jnp.asarray(v, dtype),
        kv_pages=cache,
        pages=pages,
        layer=layer,
        sinks=jnp.asarray(sinks) if spec.sinks else None,
        histories=histories,
    )


def _fill(
    cache: Array,
    slots: list[np.ndarray],
    keys: list[np.ndarray],
    values: list[np.ndarray],
    pages: PageMetadata,
    layer: int,
    spec: AttentionSpec,
    backend: Backend,
) -> Array:
    """The cache with the rows' older tokens in it, padded with tokens of the null page."""
    slot, key, value = (np.concatenate(each) for each in (slots, keys, values))
    num_padding = _power_of_two(max(8, len(slot))) - len(slot)
    slot = np.pad(slot, (0, num_padding))
    key, value = (
        np.pad(each, ((0, num_padding), (0, 0), (0, 0)), constant_values=np.nan)
        for each in (key, value)
    )
    old = PageMetadata(
        page_table=pages.page_table,
        slots=jnp.asarray(slot, jnp.int32),
        kv_lens=pages.kv_lens,
        query_starts=pages.query_starts,
        num_rows=pages.num_rows,
        num_decode_rows=pages.num_decode_rows,
        num_pages=pages.num_pages,
    )
    v = None if spec.kv.kind == "latent" else jnp.asarray(value)
    return write_kv(cache, jnp.asarray(key), v, old, layer, spec=spec.kv, backend=backend)


def _stored(values: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """What a cache of `dtype` keeps of the values."""
    return np.asarray(saturate(jnp.asarray(values), dtype).astype(jnp.float32))


def _power_of_two(least: int) -> int:
    """Sizes of few kinds, so that batches share executables."""
    return 1 << (least - 1).bit_length()


def oracle(spec: AttentionSpec, batch: Batch) -> np.ndarray:
    """Dense attention in float64 numpy, row by row: [T, N, out_dim]."""
    q = np.asarray(batch.q, np.float64)
    out = np.zeros((*q.shape[:2], spec.kv.out_dim))
    group = spec.num_heads // spec.kv.num_kv_heads
    starts = np.asarray(batch.pages.query_starts)
    for row, (keys, values) in enumerate(batch.histories):
        queries = q[starts[row] : starts[row + 1]]
        k, v = (np.repeat(each.astype(np.float64), group, axis=1) for each in (keys, values))
        logits = spec.scale * np.einsum("qnh,snh->nqs", queries, k)
        if spec.soft_cap is not None:
            logits = spec.soft_cap * np.tanh(logits / spec.soft_cap)
        at = len(keys) - len(queries) + np.arange(len(queries))[:, None]
        if spec.alibi is not None:
            logits += np.asarray(spec.alibi)[:, None, None] * (np.arange(len(keys)) - at)
        seen = np.arange(len(keys)) <= at
        if spec.window is not None and spec.chunked:
            seen &= np.arange(len(keys)) // spec.window == at // spec.window
        elif spec.window is not None:
            seen &= np.arange(len(keys)) > at - spec.window
        logits = np.where(seen, logits, -np.inf)
        if logits.size:
            sink = -np.inf if batch.sinks is None else np.asarray(batch.sinks)[:, None, None]
            top = np.maximum(logits.max(-1, keepdims=True), sink)
            weights = np.exp(logits - top)
            weights /= weights.sum(-1, keepdims=True) + np.exp(sink - top)
            out[starts[row] : starts[row + 1]] = np.einsum("nqs,snh->qnh", weights, v)
    return out

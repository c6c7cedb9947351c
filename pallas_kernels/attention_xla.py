"""Attention over paged KV in plain XLA: the CPU's backend, and that of chips without a kernel.

Online softmax over chunks of pages (FlashAttention, arXiv 2205.14135), in two loops whose trip
counts follow the data: one over the chunks of all decode rows, one over tiles of the other rows'
queries. The cache is only ever gathered from, about a megabyte a step: more is slower on a CPU.

Measured on a busy 2-core AVX512 machine with benchmarks.attention_xla's model (9 heads, 3 kv heads,
head_dim 64, float32, pages of 16), in ms of process time a layer, variants in turns; runs differ by
10%, and wall time was no less. 64 decode rows of 100-380 tokens, where dense attention on
contiguous KV took 5.0:

    lanes x chunk     8 x 64: 6.3   16 x 32: 6.4   16 x 64: 6.3   8 x 32: 7.0   4 x 128: 6.7
                      8 x 128: 6.5   64 x 64: 8.2
    what is gathered  rows of a pair, heads first: 6.4   of a token, then copies: 7.5
    values            masked with their keys: 6.4   parted from them and masked: 7.2

The same in a loop without softmax or masks, over 256 tokens a row in 8 lanes x 64:

    gather alone: 3.2    pairs: 6.6    tokens, then copies: 7.5    rows of a head: 9.7
    tokens as one row each, queries block-diagonal: 8.4    as 2K rows each, other heads masked: 14.4
    tokens, multiply and sum: 7.7    pages that keep heads first: 7.0    keys, then values: 7.4
    pages that keep keys transposed, dot: 8.4    multiply and sum: 9.4

Half of that is the gather. C that only reads those pages takes 2.1, and 2.7 to copy them: on one
core float32 keys and values cannot be had for less.

Prefill, before pairs were gathered, least of 5 to 9; queries a tile x chunk, for mixed 512 / 32
rows of 32 over a shared prefix / one of 512. Pairs took 2 to 5% off the first two; dots over whole
pairs, as decode's, made the second 46.

    32 x 64: 7.9 / 35 / 9.3     32 x 128: 8.7 / 37 / 9.9    32 x 512: 14.5 / 50 / 14.2
    16 x 64: 9.1 / 42 / 11.2    64 x 64: 7.8 / 57 / 8.1     64 x 128: 8.4 / 58 / 8.5
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.backend import XLA, Backend
from pallas_kernels.types import AttentionSpec, PageMetadata

_CHUNK = 64  # kv tokens of a row that one step reads
_DECODE_BYTES = 1 << 20  # of keys and values all lanes read in a step
_QUERY_TILE = 32  # queries of one row that share a pass over its context
_NEVER = float(jnp.finfo(jnp.float32).min)  # the logit of what is not seen; finite: no NaN of it
_LEAST = _NEVER / 2  # where the largest logit starts: so far above _NEVER that exp gives zero


class _Softmax(NamedTuple):
    """Online softmax: the state after some of the context has been seen. All float32."""

    top: Array  # [..., 1] largest logit
    total: Array  # [..., 1] sum of exp(logit - top)
    out: Array  # [..., V] sum of exp(logit - top) * v


def attend_xla(
    q: Array,  # [T, N, H]
    kv_pages: Array,  # [L * num_pages, page_size, 2K, H], with this step's tokens written
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend = XLA,
    sinks: Array | None = None,  # [N]
) -> Array:
    """Attention of every token to its row's tokens up to itself: [T, N, out_dim].

    Padding gets zeros. The pages are in the plain layout, for any chip.
    """
    num_tokens = q.shape[0]
    grouped = q.reshape(num_tokens, spec.kv.num_kv_heads, -1, spec.kv.head_dim)  # [T, K, G, H]
    first_page = jnp.asarray(layer, jnp.int32) * pages.num_pages
    sink = None if sinks is None else sinks.reshape(grouped.shape[1:3])[..., None]  # [K, G, 1]

    out = _attend_decode(grouped, kv_pages, pages, first_page, sink, spec=spec)
    if num_tokens > 1:
        out = jnp.pad(out, ((0, num_tokens - out.shape[0]), (0, 0), (0, 0), (0, 0)))
        out = _attend_prefill(grouped, out, kv_pages, pages, first_page, sink, spec=spec)
    return out.reshape(num_tokens, spec.num_heads, spec.kv.out_dim)


def _attend_decode(
    q: Array,  # [T, K, G, H]
    kv_pages: Array,
    pages: PageMetadata,
    first_page: Array,
    sink: Array | None,  # [K, G, 1]
    *,
    spec: AttentionSpec,
) -> Array:
    """Attention of the leading decode rows, whose one token is row i's token i: [B, K, G, V].

    The chunks of all rows form one list, cut into equal parts: each lane works through a part, all
    lanes in step (Stream-K, arXiv 2301.03598). So the work is that of the chunks there are, however
    unequal the rows, and a single long row is shared by all lanes. Lane j keeps row i's state in
    partial i + j: both rise along the list, so no two lanes write to the same.

    The dots run over whole (key, value) pairs, the query beside zeros and half of what comes out
    unused: with few queries, twice the arithmetic costs less than a copy that parts the pairs. A
    latent row is its own pair: all of it the key, and the value its first columns.
    """
    num_rows = min(q.shape[0], pages.kv_lens.shape[0])
    row_ids = jnp.arange(num_rows, dtype=jnp.int32)
    # A batch of one token needs no other loop: its row decodes, whatever it is called.
    num_decode_rows = pages.num_rows if q.shape[0] == 1 else pages.num_decode_rows
    kv_lens = jnp.where(row_ids < num_decode_rows, pages.kv_lens[:num_rows], 0)
    first_seen = _first_seen(kv_lens - 1, spec)

    table, chunk = _chunked(pages.page_table[:num_rows], spec)  # [B, C, P]
    num_lanes = _num_lanes(num_rows, chunk, spec)
    lanes = jnp.arange(num_lanes, dtype=jnp.int32)
    first_chunk = first_seen // chunk
    num_chunks = (kv_lens + chunk - 1) // chunk - first_chunk
    ends = jnp.cumsum(num_chunks)  # [B] of the rows' chunks in the list
    starts = ends - num_chunks
    part = (ends[-1] + num_lanes - 1) // num_lanes  # chunks a lane
    dtype = _compute_dtype(q, spec)
    beside = 0 if spec.kv.kind == "latent" else q.shape[-1]
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, beside)))  # [T, K, G, 2H]

    def step(index: Array, partials: _Softmax) -> _Softmax:
        item = lanes * part + index  # [M]
        row = jnp.searchsorted(ends, item, side="right", method="compare_all")
        in_use = row < num_rows
        row = jnp.minimum(row, num_rows - 1)
        at = jnp.where(in_use, first_chunk[row] + item - starts[row], 0)
        ids = first_page + _take(table, (row, at))
        pairs = _gather(kv_pages, ids, spec).astype(dtype)  # [M, K, S, 2H]
        position = at[:, None] * chunk + jnp.arange(chunk, dtype=jnp.int32)  # [M, S]
        seen = in_use[:, None] & (position < kv_lens[row][:, None])
        if spec.window is not None:
            seen &= position >= first_seen[row][:, None]
        pairs = jnp.where(seen[:, None, :, None], pairs, 0)
        logits = _dot("mkgh,mksh->mkgs", _take(padded, row), pairs)
        state = jax.tree.map(lambda each: _take(each, row + lanes), partials)
        bias = _alibi((position - kv_lens[row][:, None] + 1)[:, None, None], spec, 1)
        state = _advance(state, logits, bias, seen[:, None, None], pairs, "mkgs,mksh->mkgh", spec)
        return jax.tree.map(
            lambda each, new: each.at[row + lanes].set(
                new,
                mode="promise_in_bounds",
                unique_indices=True,
                indices_are_sorted=True,
                wrap_negative_indices=False,
            ),
            partials,
            state,
        )

    partials = _start((num_rows + num_lanes, *q.shape[1:3]), spec)
    partials = lax.fori_loop(0, part, step, partials)

    # Row i's partials end with that of the lane that reads its last chunk.
    last = row_ids + jnp.maximum(ends - 1, 0) // jnp.maximum(part, 1)
    partial_ids = jnp.arange(num_rows + num_lanes, dtype=jnp.int32)
    row_of = jnp.searchsorted(last, partial_ids, side="left", method="compare_all")
    row_of = jnp.minimum(row_of, num_rows - 1)
    merge = functools.partial(
        jax.ops.segment_sum, segment_ids=row_of, num_segments=num_rows, indices_are_sorted=True
    )
    top = jax.ops.segment_max(partials.top, row_of, num_rows, indices_are_sorted=True)
    share = jnp.exp(partials.top - top[row_of])
    merged = _Softmax(top, merge(partials.total * share), merge(partials.out * share))
    return _finish(merged, sink).astype(q.dtype)


def _attend_prefill(
    q: Array,  # [T, K, G, H]
    out: Array,  # [T, K, G, V]: zeros but for the decode rows
    kv_pages: Array,
    pages: PageMetadata,
    first_page: Array,
    sink: Array | None,  # [K, G, 1]
    *,
    spec: AttentionSpec,
) -> Array:
    """Attention of the rows after the decode rows, a tile of queries at a time, into `out`."""
    num_tokens = q.shape[0]
    tile = min(_QUERY_TILE, num_tokens)
    dtype = _compute_dtype(q, spec)
    table, chunk = _chunked(pages.page_table, spec)  # [B, C, P]

    num_queries = jnp.diff(pages.query_starts)
    row_ids = jnp.arange(num_queries.shape[0], dtype=jnp.int32)
    is_prefill = (row_ids >= pages.num_decode_rows) & (row_ids < pages.num_rows)
    tiles_end = jnp.cumsum(jnp.where(is_prefill, (num_queries + tile - 1) // tile, 0))  # [B]

    # A tile may reach past its row's end: it writes zeros there, which the next tiles write over.
    pad = ((0, tile), (0, 0), (0, 0), (0, 0))
    q, out = jnp.pad(q, pad), jnp.pad(out, pad)

    def attend_tile(index: Array, out: Array) -> Array:
        row = jnp.searchsorted(tiles_end, index, side="right", method="compare_all")
        row_tile = index - jnp.where(row > 0, tiles_end[row - 1], 0)
        token = pages.query_starts[row] + row_tile * tile
        num_valid = jnp.minimum(tile, pages.query_starts[row + 1] - token)
        position = pages.kv_lens[row] - (pages.query_starts[row + 1] - token)
        positions = position + jnp.arange(tile, dtype=jnp.int32)  # [Q]
        valid = jnp.arange(tile, dtype=jnp.int32) < num_valid
        queries = lax.dynamic_slice_in_dim(q, token, tile).transpose(1, 2, 0, 3)  # [K, G, Q, H]
        first_seen = _first_seen(position, spec)
        end = position + num_valid  # of the context the tile's last query sees

        def step(index: Array, state: _Softmax) -> _Softmax:
            ids = _take(table, (row, index))
            pairs = _gather(kv_pages, first_page + ids, spec).astype(dtype)  # [K, S, 2H]
            k, v = pairs[..., : spec.kv.head_dim], _values(pairs, spec)
            kv_position = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
            in_reach = kv_position < end  # what is not, some other row may have written
            if spec.window is not None:
                in_reach &= kv_position >= first_seen
            v = jnp.where(in_reach[:, None], v, 0)
            seen = valid[:, None] & (kv_position <= positions[:, None])  # [Q, S]
            if spec.window is not None:
                seen &= kv_position >= _first_seen(positions, spec)[:, None]
            logits = _dot("kgqh,ksh->kgqs", queries, k)
            bias = _alibi(kv_position - positions[:, None], spec, 2)
            return _advance(state, logits, bias, seen, v, "kgqs,ksh->kgqh", spec)

        start = first_seen // chunk
        stop = (end + chunk - 1) // chunk
        state = lax.fori_loop(start, stop, step, _start(queries.shape[:-1], spec))
        result = _finish(state, sink if sink is None else sink[:, :, None])
        result = result.astype(out.dtype).transpose(2, 0, 1, 3)  # [Q, K, G, V]
        return lax.dynamic_update_slice_in_dim(out, result, token, axis=0)

    out = lax.fori_loop(0, tiles_end[-1], attend_tile, out)
    return out[:num_tokens]


def _chunked(table: Array, spec: AttentionSpec) -> tuple[Array, int]:
    """The table [B, P] as chunks of pages [B, C, P / C], with null pages after the last, and the
    tokens a chunk: about _CHUNK, in whole pages."""
    num_rows, num_pages = table.shape
    pages_per_chunk = min(max(1, _CHUNK // spec.kv.page_size), num_pages)
    table = jnp.pad(table, ((0, 0), (0, -num_pages % pages_per_chunk)))
    return table.reshape(num_rows, -1, pages_per_chunk), pages_per_chunk * spec.kv.page_size


def _num_lanes(num_rows: int, chunk: int, spec: AttentionSpec) -> int:
    """Lanes of the decode loop: what it gathers at once should stay in a core's cache."""
    token_bytes = 2 * spec.kv.num_kv_heads * spec.kv.head_dim * jnp.dtype(spec.kv.dtype).itemsize
    fitting = _DECODE_BYTES // (chunk * token_bytes)
    return max(2, min(fitting, 8 if num_rows >= 8 else 4))


def _first_seen(position: Array, spec: AttentionSpec) -> Array:
    """The first position a query at `position` sees."""
    if spec.window is None:
        return jnp.zeros_like(position)
    if spec.chunked:
        return position // spec.window * spec.window
    return jnp.maximum(position - (spec.window - 1), 0)


def _compute_dtype(q: Array, spec: AttentionSpec) -> jnp.dtype:
    """What stored keys and values are multiplied in: as they are, but for 8-bit ones q's type."""
    stored = jnp.dtype(spec.kv.dtype)
    return stored if stored.itemsize > 1 else q.dtype


def _values(pairs: Array, spec: AttentionSpec) -> Array:
    """The value columns of (key, value) pairs [..., 2H], or of latent rows [..., H]."""
    width = spec.kv.out_dim
    return pairs[..., :width] if spec.kv.kind == "latent" else pairs[..., -width:]


def _gather(kv_pages: Array, ids: Array, spec: AttentionSpec) -> Array:
    """The tokens of pages `ids [..., P]` in order, each key beside its value: [..., K, S, 2H].

    Of a latent cache the rows themselves: [..., 1, S, H].
    """
    size, num_kv_heads = spec.kv.page_size, spec.kv.num_kv_heads
    width = spec.kv.head_dim * (1 if spec.kv.kind == "latent" else 2)
    slots = ids[..., None] * size + jnp.arange(size, dtype=jnp.int32)  # [..., P, page_size]
    slots = slots.reshape(*ids.shape[:-1], -1)  # [..., S]

    def flat(kv_pages: Array) -> Array:
        heads = jnp.arange(num_kv_heads, dtype=jnp.int32)[:, None]
        rows = slots[..., None, :] * num_kv_heads + heads  # [..., K, S]
        return _take(kv_pages.reshape(-1, width), rows)

    def whole(kv_pages: Array) -> Array:
        tokens = _take(kv_pages.reshape(-1, *kv_pages.shape[2:]), slots)  # [..., S, 2K, H]
        return jnp.moveaxis(tokens.reshape(*slots.shape, num_kv_heads, -1), -2, -3)

    # Rows of one pair come heads first at no cost, but on TPU that view would copy the cache.
    return lax.platform_dependent(kv_pages, tpu=whole, default=flat)


def _take(array: Array, indices: Array | tuple[Array, ...]) -> Array:
    """array[indices], for indices that are known to be in bounds."""
    return array.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    """Einsum in the inputs' precision, float32 out."""
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return einsum(subscripts, a, b.astype(a.dtype), precision=lax.Precision.HIGHEST)


def _start(shape: tuple[int, ...], spec: AttentionSpec) -> _Softmax:
    return _Softmax(
        top=jnp.full((*shape, 1), _LEAST, jnp.float32),
        total=jnp.zeros((*shape, 1), jnp.float32),
        out=jnp.zeros((*shape, spec.kv.out_dim), jnp.float32),
    )


def _alibi(distance: Array, spec: AttentionSpec, num_axes: int) -> Array | float:
    """What is added to the logits, [..., K, G, *axes], of keys `distance` behind their query."""
    if spec.alibi is None:
        return 0.0
    slopes = jnp.asarray(spec.alibi, jnp.float32)
    return slopes.reshape(spec.kv.num_kv_heads, -1, *[1] * num_axes) * distance


def _advance(
    state: _Softmax,
    logits: Array,
    bias: Array | float,
    seen: Array,
    v: Array,
    subscripts: str,
    spec: AttentionSpec,
) -> _Softmax:
    """The state after a chunk of raw logits [..., S] and `v`, values or pairs, where `seen`.

    What is not seen must be finite in `v`.
    """
    logits = logits * spec.scale
    if spec.soft_cap is not None:
        logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
    logits = jnp.where(seen, logits + bias, _NEVER)
    top = jnp.maximum(state.top, jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)  # zeros where not seen
    decay = jnp.exp(state.top - top)
    out = _dot(subscripts, weights.astype(v.dtype), v)
    out = out if out.shape[-1] == spec.kv.out_dim else _values(out, spec)
    return _Softmax(
        top=top,
        total=state.total * decay + jnp.sum(weights, axis=-1, keepdims=True),
        out=state.out * decay + out,
    )


def _finish(state: _Softmax, sink: Array | None) -> Array:
    """The attention output; zeros where nothing was seen."""
    if sink is not None:
        top = jnp.maximum(state.top, sink)
        decay = jnp.exp(state.top - top)
        total = state.total * decay + jnp.exp(sink - top)
        state = _Softmax(top=top, total=total, out=state.out * decay)
    return state.out / jnp.where(state.total > 0, state.total, 1.0)

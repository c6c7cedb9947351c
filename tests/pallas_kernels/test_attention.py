"""paged_attention: each backend against dense numpy, over ragged batches on scattered pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels.attention import paged_attention
from pallas_kernels.backend import REFERENCE, XLA, Backend
from pallas_kernels.cases import attention_case
from pallas_kernels.kv_write import kv_pages_shape, saturate
from pallas_kernels.types import AttentionSpec, PageMetadata
from tests.pallas_kernels.batches import Batch, error, make_batch, oracle, run

BACKENDS = (REFERENCE, XLA)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def check(spec: AttentionSpec, batch: Batch) -> None:
    expected = oracle(spec, batch)
    num_used = int(batch.pages.query_starts[-1])
    for backend in BACKENDS:
        out, _ = run(dataclasses.replace(batch, histories=[]), spec=spec, backend=backend)
        assert out.dtype == batch.q.dtype
        assert error(out, expected) <= TOLERANCE[batch.q.dtype.name], backend
        assert not np.any(np.asarray(out[num_used:], np.float32)), f"{backend}: padding not zero"


def ragged(page_size: int) -> list[tuple[int, int]]:
    """Decode rows, then others: empty, of one token, at page borders, chunked, whole."""
    size = page_size
    decode = [(1, 1), (1, size), (1, size + 1), (1, 3 * size - 1)]
    others = [(0, 0), (7, 7), (1, 2 * size + 1), (size, size), (3, 5 * size), (40, 40 + size)]
    return decode + others


@pytest.mark.parametrize(
    ("name", "dtype", "page_size", "window", "soft_cap"),
    [
        ("smollm2-135m", "float32", 16, None, None),
        ("smollm2-135m", "bfloat16", 16, 20, None),
        ("tiny", "float32", 8, 9, 3.0),
        ("tiny", "bfloat16", 128, None, None),
        ("tiny-mha", "float32", 32, None, 5.0),
        ("tiny-mqa", "float32", 64, 70, None),
        ("tiny-mqa", "float32", 128, None, None),
        ("llama-3.1-8b/tp8", "bfloat16", 16, None, None),
        ("gemma-2b", "float32", 16, 1, None),
        ("tiny-sinks", "float32", 16, None, None),
        ("gpt-oss-20b", "bfloat16", 16, None, None),
        ("tiny-latent", "float32", 8, None, None),
        ("deepseek-v3/tp8", "bfloat16", 64, None, None),
        ("tiny", "float8_e4m3fn", 16, None, None),
        ("tiny-mqa", "float8_e5m2", 32, 20, 2.0),
        ("tiny-latent", "int8", 16, None, None),
    ],
)
def test_ragged_batches_match_dense_attention(
    name: str, dtype: str, page_size: int, window: int | None, soft_cap: float | None
) -> None:
    spec = attention_case(name, page_size=page_size, dtype=dtype, window=window, soft_cap=soft_cap)
    rows = ragged(page_size)
    total = sum(num_queries for num_queries, _ in rows)
    batch = make_batch(spec, rows, num_decode_rows=4, num_tokens=total + 5, max_rows=16)
    check(spec, batch)


@pytest.mark.parametrize(("name", "window"), [("tiny", None), ("tiny-mha", 20)])
def test_biases_by_distance_match_dense_attention(name: str, window: int | None) -> None:
    spec = attention_case(name, page_size=16, window=window)
    slopes = tuple(0.5 / (i + 1) for i in range(spec.num_heads))
    spec = dataclasses.replace(spec, alibi=slopes)
    rows = ragged(16)
    total = sum(num_queries for num_queries, _ in rows)
    batch = make_batch(spec, rows, num_decode_rows=4, num_tokens=total + 5, max_rows=16)
    check(spec, batch)


@pytest.mark.parametrize("seed", range(6))
def test_random_batches_match_dense_attention(seed: int) -> None:
    rng = np.random.default_rng(seed)
    window, soft_cap = [(None, None), (30, None), (None, 2.0)][seed % 3]
    spec = attention_case("tiny", window=window, soft_cap=soft_cap)
    decode = [(1, int(n)) for n in rng.integers(1, 400, 5)]
    others = [(int(n), int(n + rng.integers(0, 150))) for n in rng.integers(0, 70, 4)]
    others = [(min(n, 100), kv_len) for n, kv_len in others]
    batch = make_batch(
        spec, decode + others, num_decode_rows=5, num_tokens=320, max_rows=12, seed=seed
    )
    check(spec, batch)


@pytest.mark.parametrize("num_decode_rows", [0, 1])
@pytest.mark.parametrize("kv_len", [1, 16, 17, 700])
def test_a_batch_of_one_token(kv_len: int, num_decode_rows: int) -> None:
    spec = attention_case("smollm2-135m")
    batch = make_batch(
        spec, [(1, kv_len)], num_decode_rows=num_decode_rows, num_tokens=1, max_rows=1
    )
    check(spec, batch)


@pytest.mark.parametrize("name", ["tiny", "tiny-sinks"])
def test_attention_within_chunks_matches_dense_attention(name: str) -> None:
    spec = dataclasses.replace(attention_case(name, window=24), chunked=True)
    rows = [*ragged(16), (1, 23), (1, 24), (1, 25), (50, 70), (90, 90)]
    total = sum(num_queries for num_queries, _ in rows)
    batch = make_batch(spec, rows, num_decode_rows=4, num_tokens=total + 5, max_rows=16)
    check(spec, batch)


@pytest.mark.parametrize("chunked", [False, True])
def test_pages_that_a_window_has_passed_may_hold_anything(chunked: bool) -> None:
    spec = dataclasses.replace(attention_case("tiny", window=20), chunked=chunked)
    rows = [(1, 75), (9, 75)]
    batch = make_batch(spec, rows, num_decode_rows=1, num_tokens=16, max_rows=2)
    # The first token of the second row is at 66: it sees none of the first two pages. Page 0 holds
    # NaN, as all pages do that nobody has written.
    table = batch.pages.page_table.at[:, :2].set(0)
    passed = dataclasses.replace(batch, pages=dataclasses.replace(batch.pages, page_table=table))
    check(spec, passed)


@pytest.mark.parametrize("num_rows", [0, 3, 8])
def test_decode_rows_alone_some_or_all_unused(num_rows: int) -> None:
    spec = attention_case("tiny-mha")
    rows = [(1, 5 + 90 * row) for row in range(num_rows)]
    batch = make_batch(spec, rows, num_decode_rows=num_rows, num_tokens=8, max_rows=8)
    check(spec, batch)


def test_one_long_row_is_shared_by_all_lanes_beside_short_ones() -> None:
    spec = attention_case("tiny")
    rows = [(1, 3), (1, 2000), (1, 64), (1, 65)]
    batch = make_batch(spec, rows, num_decode_rows=4, num_tokens=8, max_rows=8)
    check(spec, batch)


def test_every_layer_reads_and_writes_its_own_pages() -> None:
    spec = attention_case("tiny")
    rows = [(1, 20), (9, 30)]
    for layer in range(3):
        batch = make_batch(
            spec, rows, num_decode_rows=1, num_tokens=16, max_rows=4, num_layers=3, layer=layer
        )
        check(spec, batch)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("row", [0, 1])
def test_a_wrong_page_is_noticed(row: int, backend: Backend) -> None:
    spec = attention_case("tiny")
    batch = make_batch(
        spec, [(1, 40), (20, 60)], num_decode_rows=1, num_tokens=32, max_rows=2, poison=0.5
    )
    table = batch.pages.page_table
    table = table.at[row, 1].set(table[1 - row, 0])
    wrong = dataclasses.replace(batch, pages=dataclasses.replace(batch.pages, page_table=table))
    out, _ = run(wrong, spec=spec, backend=backend)
    assert error(out, oracle(spec, batch)) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_new_tokens_are_in_the_cache_that_comes_back(backend: Backend) -> None:
    spec = attention_case("tiny")
    batch = make_batch(spec, [(1, 12), (5, 9)], num_decode_rows=1, num_tokens=8, max_rows=2)
    _, kv_pages = run(batch, spec=spec, backend=backend)
    pages = np.asarray(kv_pages)[batch.layer * batch.pages.num_pages :]
    slots = np.asarray(batch.pages.slots)[:6]
    written = pages[slots // spec.kv.page_size, slots % spec.kv.page_size]  # [6, 2K, H]
    assert np.array_equal(written[:, 0::2], np.asarray(batch.k)[:6])
    assert np.array_equal(written[:, 1::2], np.asarray(batch.v)[:6])


def test_what_does_not_fit_is_named() -> None:
    spec = attention_case("tiny")
    batch = make_batch(spec, [(1, 4)], num_decode_rows=1, num_tokens=2, max_rows=1)
    bad = dataclasses.replace(batch, k=batch.k[:1], kv_pages=batch.kv_pages[:, :4])
    with pytest.raises(ValueError, match=r"k has shape \(1, 2, 8\), .* \(2, 2, 8\); kv_pages"):
        run(bad, spec=spec, backend=XLA)
    with pytest.raises(ValueError, match="layer is 2, expected"):
        paged_attention(
            batch.q, batch.k, batch.v, batch.kv_pages, batch.pages, 2, spec=spec, backend=XLA
        )


@pytest.mark.parametrize("looped", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("num_tokens", [1, 2, 64])
def test_the_cache_is_never_copied(num_tokens: int, looped: bool) -> None:
    """Through layers whose keys and values follow from the layer before, as a model's do."""
    num_layers = 3
    spec = attention_case("smollm2-135m")
    rows = [(1, 40)] if num_tokens == 1 else [(1, 40), (num_tokens - 1, 80)]
    batch = make_batch(
        spec,
        rows,
        num_decode_rows=1,
        num_tokens=num_tokens,
        max_rows=min(num_tokens, 8),
        num_layers=num_layers,
        spare_pages=500,
    )

    def layer(pages: PageMetadata, x: Array, kv_pages: Array, index: int | Array):
        k, v = x[:, :3] / 2, x[:, 3:6] / 3
        return paged_attention(x, k, v, kv_pages, pages, index, spec=spec, backend=XLA)

    def step(kv_pages: Array, x: Array, pages: PageMetadata) -> tuple[Array, Array]:
        if looped:
            return jax.lax.fori_loop(
                0, num_layers, lambda i, each: layer(pages, each[0], each[1], i), (x, kv_pages)
            )
        for index in range(num_layers):
            x, kv_pages = layer(pages, x, kv_pages, index)
        return x, kv_pages

    lowered = jax.jit(step, donate_argnums=0).lower(batch.kv_pages, batch.q, batch.pages)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * batch.kv_pages.nbytes


def test_on_tpu_the_cache_is_not_viewed_flat() -> None:
    """There a view that merges a pair of heads and head_dim is a copy of the whole cache."""
    spec = attention_case("smollm2-135m")
    batch = make_batch(spec, [(1, 9), (5, 20)], num_decode_rows=1, num_tokens=8, max_rows=2)
    flat = f"tensor<{batch.kv_pages.shape[0] * 16 * 3}x128xf32>"
    traced = run.trace(dataclasses.replace(batch, histories=[]), spec=spec, backend=XLA)
    for platform, is_flat in {"tpu": False, "cpu": True, "cuda": True}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert (flat in text) == is_flat, platform


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["tiny", "tiny-latent"])
def test_scales_bring_a_quantized_cache_to_the_values_range(name: str, dtype: str) -> None:
    """A cache whose keys and values need scales to fit, beside one in float32."""
    exact = attention_case(name)
    spec = dataclasses.replace(exact, kv=dataclasses.replace(exact.kv, dtype=dtype))
    rows = [(1, 1), (12, 12)]
    batch = make_batch(exact, rows, num_decode_rows=1, num_tokens=16, max_rows=2)
    magnitude = jnp.asarray([0.01, 30.0, 0.5, 7.0][: spec.kv.num_scales], jnp.float32)
    keys = magnitude[0::2] if batch.v is not None else magnitude
    values = None if batch.v is None else batch.v * magnitude[1::2, None]
    batch = dataclasses.replace(batch, k=batch.k * keys[:, None], v=values, histories=[])
    cache = kv_pages_shape(spec.kv, 2, batch.pages.num_pages, backend=XLA)
    scales = 4 * magnitude / float(saturate(jnp.inf + jnp.zeros(1), dtype)[0])
    outs = []
    for each, kv_scales in ((exact, None), (spec, scales)):
        pages = batch.kv_pages if each is exact else jnp.zeros(cache.shape, cache.dtype)
        out, _ = paged_attention(
            batch.q,
            batch.k,
            batch.v,
            pages,
            batch.pages,
            batch.layer,
            spec=each,
            backend=XLA,
            kv_scales=kv_scales,
        )
        outs.append(out)
    assert error(outs[1], np.asarray(outs[0], np.float64)) < 0.06


def test_what_is_given_must_be_what_the_layer_has() -> None:
    spec = attention_case("tiny-sinks")
    batch = make_batch(spec, [(1, 4)], num_decode_rows=1, num_tokens=2, max_rows=1)
    with pytest.raises(ValueError, match="sinks is missing"):
        run(dataclasses.replace(batch, sinks=None), spec=spec, backend=XLA)
    with pytest.raises(ValueError, match="v is missing"):
        run(dataclasses.replace(batch, v=None), spec=spec, backend=XLA)
    with pytest.raises(ValueError, match="sinks is given, but spec has none"):
        run(batch, spec=dataclasses.replace(spec, sinks=False), backend=XLA)

"""The TPU kernel for latent caches, in Pallas' interpreter with races looked for."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention_tpu_latent
from pallas_kernels.attention_tpu_latent import (
    LatentTiles,
    _Fetcher,
    attend_latent,
    default_tiles,
    why_not_latent,
)
from pallas_kernels.backend import Backend
from pallas_kernels.cases import attention_case
from pallas_kernels.chips import CPU, Chip
from pallas_kernels.kv_write import write_kv
from pallas_kernels.types import AttentionSpec, KVSpec
from tests.pallas_kernels.batches import Batch, error, make_batch, oracle

V5E = Chip(platform="tpu", kind="TPU v5 lite")
TPU = Backend(name="tpu", chip=V5E, interpret=True)
SMALL = LatentTiles(block=256, span=256, unit=128, groups=2, depth=3)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def _interpreter_starts_clean() -> Iterator[None]:
    pltpu.reset_tpu_interpret_mode_state()
    yield
    pltpu.reset_tpu_interpret_mode_state()


def layer_of(
    num_heads: int = 4,
    dtype: str = "bfloat16",
    *,
    head_dim: int = 160,
    value_dim: int = 128,
    page_size: int = 32,
    **features: Any,
) -> AttentionSpec:
    kv = KVSpec(
        num_kv_heads=1,
        head_dim=head_dim,
        page_size=page_size,
        dtype=jnp.dtype(dtype),
        kind="latent",
        value_dim=value_dim,
    )
    return AttentionSpec(kv=kv, num_heads=num_heads, scale=head_dim**-0.5, **features)


def batch_of(
    spec: AttentionSpec,
    rows: list[tuple[int, int]],
    *,
    num_tokens: int = 64,
    max_rows: int = 8,
    **more: Any,
) -> Batch:
    """Rows in a cache that holds NaN (an integer cache: 100) wherever nobody wrote."""
    single = [num_queries == 1 for num_queries, _ in rows]
    return make_batch(
        spec,
        rows,
        num_decode_rows=single.index(False) if False in single else len(rows),
        num_tokens=num_tokens,
        max_rows=max_rows,
        backend=TPU,
        **more,
    )


def attend(spec: AttentionSpec, batch: Batch, *, tiles: LatentTiles = SMALL) -> Array:
    @jax.jit
    def step(batch: Batch, layer: Array) -> Array:
        cache = write_kv(
            batch.kv_pages, batch.k, batch.v, batch.pages, layer, spec=spec.kv, backend=TPU
        )
        return attend_latent(
            batch.q,
            cache,
            batch.pages,
            layer,
            spec=spec,
            backend=TPU,
            sinks=batch.sinks,
            tiles=tiles,
        )

    return step(dataclasses.replace(batch, histories=[]), jnp.int32(batch.layer))


def races_found() -> bool:
    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


def check(spec: AttentionSpec, batch: Batch, *, tiles: LatentTiles = SMALL) -> None:
    out = attend(spec, batch, tiles=tiles)
    assert out.shape == (*batch.q.shape[:2], spec.kv.out_dim)
    assert out.dtype == batch.q.dtype
    assert error(out, oracle(spec, batch)) <= TOLERANCE[batch.q.dtype.name]
    assert not np.asarray(out[int(batch.pages.query_starts[-1]) :], np.float32).any()
    assert not races_found()


# One token, page borders, whole blocks, one token more, several blocks; no queries; a chunk with
# history, a whole prompt, drafts to verify.
MIXED = [(1, 1), (1, 32), (1, 257), (0, 0), (20, 300), (0, 40), (9, 9), (3, 513)]
DECODE = [(1, 1), (1, 32), (1, 33), (1, 256), (1, 550), (1, 257)]


@pytest.mark.parametrize(
    "spec",
    [
        layer_of(),
        layer_of(32, sinks=True, window=40, soft_cap=5.0),
        pytest.param(layer_of(4, "float32", page_size=16), marks=pytest.mark.slow),
        pytest.param(layer_of(16, "float8_e4m3fn", page_size=64), marks=pytest.mark.slow),
        pytest.param(layer_of(128, "bfloat16", window=300), marks=pytest.mark.slow),
        pytest.param(layer_of(20, "int8", page_size=128, window=1), marks=pytest.mark.slow),
        pytest.param(
            layer_of(8, "float8_e5m2", value_dim=256, head_dim=256), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_mixed_batches_match_dense_attention(spec: AttentionSpec) -> None:
    check(spec, batch_of(spec, MIXED))


@pytest.mark.parametrize("num_heads", [16, pytest.param(128, marks=pytest.mark.slow)])
def test_decode_rows_match_dense_attention(num_heads: int) -> None:
    spec = layer_of(num_heads)
    tiles = LatentTiles(block=128, span=128, unit=128, groups=1, depth=2)
    check(spec, batch_of(spec, DECODE, num_tokens=8), tiles=tiles)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_batches_match_dense_attention(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = layer_of((4, 48)[seed % 2], window=(None, 130)[seed // 2])
    rows = [(1, int(rng.integers(1, 700))) for _ in range(3)]
    for num_queries in rng.integers(0, 40, 4):
        rows.append((int(num_queries), int(num_queries + rng.integers(0, 400))))
    batch = batch_of(spec, rows, num_tokens=256, seed=seed)
    tiles = LatentTiles(block=512, span=256, unit=128, groups=3, depth=2 + seed)
    check(spec, batch, tiles=tiles)


def test_float32_queries_read_a_bfloat16_cache() -> None:
    spec = layer_of()
    batch = batch_of(spec, [(1, 70), (5, 140)], num_tokens=8, dtype=jnp.float32)
    out = attend(spec, batch)
    assert out.dtype == jnp.float32
    assert error(out, oracle(spec, batch)) <= 1e-2  # the batch's newest k is not rounded


@pytest.mark.parametrize("rows", [[], [(0, 0), (0, 100)]])
def test_a_batch_without_queries_gives_zeros(rows: list[tuple[int, int]]) -> None:
    spec = layer_of()
    out = attend(spec, batch_of(spec, rows, num_tokens=4))
    assert not np.asarray(out, np.float32).any()
    assert not races_found()


def test_a_row_of_nan_keeps_it_to_itself() -> None:
    """Its neighbours' partly filled tiles, blocks and units pass through the same buffers."""
    spec = layer_of()
    batch = batch_of(spec, [(1, 600), (3, 300), (1, 5), (2, 2)], num_tokens=8)
    ids = np.asarray(batch.pages.page_table[0])
    ids = batch.pages.num_pages * int(batch.layer) + ids[ids > 0]
    poisoned = dataclasses.replace(batch, kv_pages=batch.kv_pages.at[ids].set(np.nan))
    out = np.asarray(attend(spec, poisoned), np.float32)
    assert np.isnan(out[0]).any()
    assert error(jnp.asarray(out[1:]), oracle(spec, batch)[1:]) <= 1e-2


def test_a_page_of_another_row_is_noticed() -> None:
    spec = layer_of()
    batch = batch_of(spec, [(1, 300), (2, 200)], num_tokens=4)
    table = batch.pages.page_table.at[0, 2].set(batch.pages.page_table[1, 1])
    wrong = dataclasses.replace(batch, pages=dataclasses.replace(batch.pages, page_table=table))
    assert error(attend(spec, wrong), oracle(spec, batch)) > 0.05


def test_a_missing_wait_for_queries_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    monkeypatch.setattr(attention_tpu_latent, "interpreter", lambda _: eager)
    monkeypatch.setattr(_Fetcher, "wait_for_queries", lambda *_: None)
    spec = layer_of()
    attend(spec, batch_of(spec, [(1, 300), (2, 200)], num_tokens=4))
    assert races_found()


def test_a_missing_wait_for_a_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies when it is waited for: without that the buffer has nothing."""
    monkeypatch.setattr(_Fetcher, "wait_for_block", lambda *_: None)
    spec = layer_of()
    batch = batch_of(spec, [(1, 300), (2, 200)], num_tokens=4)
    assert not error(attend(spec, batch), oracle(spec, batch)) <= 0.05  # NaN, too


def test_tiles_that_do_not_fit_are_refused() -> None:
    spec = layer_of()
    batch = batch_of(spec, [(1, 3)], num_tokens=1)
    with pytest.raises(ValueError, match="do not fit"):
        attend(spec, batch, tiles=dataclasses.replace(SMALL, span=192))
    with pytest.raises(ValueError, match="at least two blocks"):
        attend(spec, batch, tiles=dataclasses.replace(SMALL, depth=1))


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3/tp8"])
@pytest.mark.parametrize("page_size", [32, 64, 128, 512])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn", "int8"])
def test_models_with_latents_are_taken(name: str, page_size: int, dtype: str) -> None:
    spec = attention_case(name, page_size=page_size, dtype=dtype)
    assert why_not_latent(spec, V5E) is None
    tiles = default_tiles(spec, TPU)
    assert tiles.block % page_size == tiles.block % tiles.span == tiles.span % tiles.unit == 0


@pytest.mark.parametrize(
    ("spec", "chip", "reason"),
    [
        (attention_case("llama-3.1-8b"), V5E, "latent cache only"),
        (layer_of(), CPU, "does not know cpu"),
        (layer_of(page_size=8), V5E, "page_size=8 is not a multiple of 16"),
        (layer_of(dtype="int8", page_size=16), V5E, "page_size=16 is not a multiple of 32"),
        (layer_of(dtype="float16"), V5E, "no float16 cache"),
        (attention_case("tiny-latent", dtype="bfloat16"), V5E, "value_dim=16"),
    ],
)
def test_what_it_cannot_run_is_refused(spec: AttentionSpec, chip: Chip, reason: str) -> None:
    assert reason in (why_not_latent(spec, chip) or "")

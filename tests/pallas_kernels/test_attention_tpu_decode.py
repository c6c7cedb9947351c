"""The TPU decode kernel in Pallas' interpreter, races looked for, against dense numpy."""

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

from pallas_kernels import attention_tpu_decode
from pallas_kernels.attention_tpu_decode import DecodeTiles, attend_decode, default_tiles
from pallas_kernels.backend import Backend
from pallas_kernels.cases import CASES, attention_case
from pallas_kernels.chips import Chip
from pallas_kernels.kv_write import page_layout, write_kv
from pallas_kernels.tpu_pages import PageBlock
from pallas_kernels.types import AttentionSpec, KVSpec
from tests.pallas_kernels.batches import Batch, error, make_batch, oracle

WIDE = Backend(name="tpu", chip=Chip(platform="tpu", kind="TPU v6 lite"), interpret=True)
NARROW = Backend(name="tpu", chip=Chip(platform="tpu", kind="TPU v5 lite"), interpret=True)
SMALL = DecodeTiles(block=256, unit=128, edge=128, rows=4)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def _interpreter_starts_clean() -> Iterator[None]:
    pltpu.reset_tpu_interpret_mode_state()
    yield
    pltpu.reset_tpu_interpret_mode_state()


def layer_of(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    **features: Any,
) -> AttentionSpec:
    kv = KVSpec(
        num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=jnp.dtype(dtype)
    )
    scale = features.pop("scale", head_dim**-0.5)
    return AttentionSpec(kv=kv, num_heads=num_heads, scale=scale, **features)


def batch_of(
    spec: AttentionSpec,
    kv_lens: list[int],
    *,
    max_rows: int = 8,
    backend: Backend = WIDE,
    **more: Any,
) -> Batch:
    """Rows that decode, in a cache that holds NaN (an integer cache: 100) wherever nobody wrote."""
    return make_batch(
        spec,
        [(1, kv_len) for kv_len in kv_lens],
        num_decode_rows=more.pop("num_decode_rows", len(kv_lens)),
        num_tokens=max_rows,
        max_rows=max_rows,
        backend=backend,
        **more,
    )


def decode(
    spec: AttentionSpec, batch: Batch, *, backend: Backend = WIDE, tiles: DecodeTiles = SMALL
) -> Array:
    @jax.jit
    def step(batch: Batch, layer: Array) -> Array:
        cache = write_kv(
            batch.kv_pages, batch.k, batch.v, batch.pages, layer, spec=spec.kv, backend=backend
        )
        return attend_decode(
            batch.q,
            cache,
            batch.pages,
            layer,
            spec=spec,
            backend=backend,
            sinks=batch.sinks,
            tiles=tiles,
        )

    return step(batch, jnp.int32(batch.layer))


def races_found() -> bool:
    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


def check(
    spec: AttentionSpec, batch: Batch, *, backend: Backend = WIDE, tiles: DecodeTiles = SMALL
) -> None:
    out = decode(spec, batch, backend=backend, tiles=tiles)
    count = int(batch.pages.num_decode_rows)
    assert out.shape == (batch.pages.kv_lens.shape[0], *batch.q.shape[1:])
    assert out.dtype == batch.q.dtype
    wrong_by = error(out[:count], oracle(spec, batch)[:count])
    assert wrong_by <= TOLERANCE[batch.q.dtype.name]
    assert not races_found()


# One token, page borders, full pages, a whole block, one token more, several blocks.
LENGTHS = [1, 32, 33, 256, 550, 257]


@pytest.mark.parametrize(
    "spec",
    [
        layer_of(8, 2, 128, 32, "bfloat16"),
        layer_of(6, 3, 64, 32, "bfloat16", sinks=True),
        layer_of(3, 3, 80, 32, "float32", window=40, soft_cap=5.0),
        pytest.param(layer_of(8, 2, 96, 32, "float8_e4m3fn"), marks=pytest.mark.slow),
        pytest.param(layer_of(5, 1, 256, 64, "float32", scale=0.2), marks=pytest.mark.slow),
        pytest.param(layer_of(4, 2, 128, 8, "float8_e5m2", window=300), marks=pytest.mark.slow),
        pytest.param(layer_of(4, 1, 128, 128, "int8", soft_cap=3.0), marks=pytest.mark.slow),
        pytest.param(layer_of(32, 1, 64, 64, "float32", sinks=True), marks=pytest.mark.slow),
        pytest.param(layer_of(9, 9, 64, 32, "float8_e4m3fn", window=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_decode_rows_match_dense_attention(spec: AttentionSpec) -> None:
    check(spec, batch_of(spec, LENGTHS))


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_rows_of_random_lengths_match_dense_attention(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = layer_of(4, 2, 64, 16, "bfloat16", window=(None, 130)[seed % 2])
    lengths = [int(n) for n in rng.integers(1, 700, 7)]
    check(spec, batch_of(spec, lengths, seed=seed), backend=(WIDE, NARROW)[seed // 2])


def test_float32_queries_read_a_bfloat16_cache() -> None:
    spec = layer_of(4, 1, 128, 64, "bfloat16")
    batch = batch_of(spec, [70, 300], dtype=jnp.float32)
    out = decode(spec, batch)
    assert out.dtype == jnp.float32
    assert error(out[:2], oracle(spec, batch)[:2]) <= 1e-2  # the batch's newest k is not rounded


def test_rows_that_do_not_decode_are_left_alone() -> None:
    spec = layer_of(4, 2, 128, 64, "bfloat16")
    batch = batch_of(spec, [100, 200, 300], max_rows=16, num_decode_rows=2)
    check(spec, batch)
    batch = batch_of(spec, [100, 200], num_decode_rows=0)
    decode(spec, batch)
    assert not races_found()


@pytest.mark.slow
def test_a_row_of_nan_keeps_it_to_itself() -> None:
    spec = layer_of(4, 2, 128, 64, "bfloat16")
    batch = batch_of(spec, [600, 300, 5])
    ids = np.asarray(batch.pages.page_table[0])
    ids = batch.pages.num_pages * int(batch.layer) + ids[ids > 0]
    poisoned = dataclasses.replace(batch, kv_pages=batch.kv_pages.at[ids].set(np.nan))
    out = decode(spec, poisoned)
    assert np.isnan(np.asarray(out[0], np.float32)).any()
    assert error(out[1:3], oracle(spec, batch)[1:3]) <= 1e-2


def test_a_page_of_another_row_is_noticed() -> None:
    spec = layer_of(4, 2, 128, 64, "bfloat16")
    batch = batch_of(spec, [300, 200])
    table = batch.pages.page_table.at[0, 2].set(batch.pages.page_table[1, 1])

    wrong = dataclasses.replace(batch, pages=dataclasses.replace(batch.pages, page_table=table))
    assert error(decode(spec, wrong)[:2], oracle(spec, batch)[:2]) > 0.05


def test_a_missing_wait_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    monkeypatch.setattr(attention_tpu_decode, "interpreter", lambda _: eager)
    spec = layer_of(4, 2, 128, 64, "bfloat16")
    batch = batch_of(spec, [300, 200])
    decode(spec, batch)
    assert not races_found()
    monkeypatch.setattr(PageBlock, "wait", lambda *_: None)
    decode(spec, batch)
    assert races_found()


@pytest.mark.parametrize(
    "name", [name for name in CASES if "deepseek" not in name and name != "tiny-latent"]
)
@pytest.mark.parametrize("page_size", [8, 16, 32, 128])
def test_default_tiles_fit_every_model(name: str, page_size: int) -> None:
    spec = attention_case(name, page_size=page_size, dtype=jnp.bfloat16)
    tiles = default_tiles(spec, WIDE)
    layout = page_layout(spec.kv, WIDE)
    block = PageBlock(layout=layout, dtype=jnp.bfloat16, num_pages=tiles.block // page_size)
    assert tiles.block % tiles.edge == tiles.edge % tiles.unit == tiles.unit % 128 == 0
    assert page_size <= tiles.unit
    assert block.num_bytes < attention_tpu_decode._VMEM_BYTES // 2


def test_tiles_that_do_not_fit_are_refused() -> None:
    spec = layer_of(4, 2, 128, 64, "bfloat16")
    tiles = DecodeTiles(block=256, unit=128, edge=192)
    with pytest.raises(ValueError, match="do not fit"):
        decode(spec, batch_of(spec, [3]), tiles=tiles)

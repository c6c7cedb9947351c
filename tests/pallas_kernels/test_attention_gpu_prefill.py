"""Prefill attention for Hopper: its plan, its numbers in the interpreter, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import attention_gpu_prefill
from pallas_kernels.attention_gpu_prefill import attend_prefill, prefill_tiles, why_not_prefill
from pallas_kernels.backend import Backend
from pallas_kernels.chips import Chip
from pallas_kernels.gpu_tiles import PrefillTiles, packing_of, plan_prefill
from pallas_kernels.kv_write import write_kv
from pallas_kernels.types import AttentionSpec, KVSpec, PageMetadata
from tests.pallas_kernels.batches import Batch, error, make_batch, oracle

H100 = Chip(platform="gpu", kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
HOPPER = Backend(name="gpu", chip=H100, interpret=True)
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}  # half of the last place, and P rounded once
DECODED = 7.0  # what the tokens of decode rows hold beforehand, and must hold afterwards


def make_spec(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    **more: Any,
) -> AttentionSpec:
    kv = KVSpec(num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    return AttentionSpec(kv=kv, num_heads=num_heads, scale=head_dim**-0.5, **more)


def make_rows(
    spec: AttentionSpec, rows: list[tuple[int, int]], *, num_decode_rows: int = 0, spare: int = 3
) -> Batch:
    """Rows and some tokens to spare, its tokens written; NaN wherever nobody's is."""
    num_tokens = sum(num_queries for num_queries, _ in rows) + spare
    batch = make_batch(
        spec,
        rows,
        num_decode_rows=num_decode_rows,
        num_tokens=-(-num_tokens // 8) * 8,
        max_rows=len(rows) + 1,
        backend=HOPPER,
    )
    kv_pages = write_kv(
        batch.kv_pages, batch.k, batch.v, batch.pages, batch.layer, spec=spec.kv, backend=HOPPER
    )
    return dataclasses.replace(batch, kv_pages=kv_pages)


def prefill(
    batch: Batch,
    spec: AttentionSpec,
    *,
    num_workers: int = 2,
    detect_races: bool = False,
    **tiles: int,
) -> Array:
    guess = prefill_tiles(spec, num_workers=num_workers)
    return attend_prefill(
        batch.q,
        jnp.full_like(batch.q, DECODED),
        batch.kv_pages,
        batch.pages,
        jnp.int32(batch.layer),
        spec=spec,
        backend=HOPPER,
        sinks=batch.sinks,
        tiles=dataclasses.replace(guess, **tiles),
        interpret=plgpu.InterpretGPUParams(detect_races=detect_races),
    )


def check(batch: Batch, spec: AttentionSpec, out: Array) -> None:
    assert out.dtype == batch.q.dtype
    num_decode_rows = int(batch.pages.num_decode_rows)
    ours, expected = out[num_decode_rows:], oracle(spec, batch)[num_decode_rows:]
    assert error(ours, expected) < TOLERANCE[out.dtype.name]
    assert np.all(np.asarray(out[:num_decode_rows], np.float32) == DECODED)
    num_used = int(batch.pages.query_starts[-1])
    assert not np.any(np.asarray(out[num_used:], np.float32))


@pytest.fixture
def products_are_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter does not check what a wgmma reads, so products are made of plain loads.

    They are committed: a wgmma's reads need no fence before TMA writes there again.
    """

    def multiply(a: Any, b: Any) -> Array:
        left, right = a[...], b[...]
        plgpu.commit_smem()
        return jnp.dot(left, right, preferred_element_type=jnp.float32)

    monkeypatch.setattr(attention_gpu_prefill, "_multiply", multiply)


def races_found(out: Array) -> bool:
    out.block_until_ready()
    return gpu_callbacks.get_races().races_found


# The numbers, in the interpreter. Unused slots and pages hold NaN throughout.


@pytest.mark.parametrize("window", [None, 20])
def test_ragged_rows_are_right_and_nothing_leaks(window: int | None) -> None:
    spec = make_spec(2, 1, 64, 16, window=window)
    rows = [(1, 5), (1, 40), (0, 3), (19, 150), (1, 17), (0, 0), (16, 16), (7, 135)]
    batch = make_rows(spec, rows, num_decode_rows=2)
    check(batch, spec, prefill(batch, spec))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int8])
def test_a_cache_of_8_bits_is_widened_and_nothing_leaks(dtype: jax.typing.DTypeLike) -> None:
    spec = make_spec(2, 1, 64, 16, dtype, window=70, soft_cap=5.0, sinks=True)
    rows = [(1, 5), (1, 40), (0, 3), (19, 150), (1, 17), (0, 0), (16, 16), (7, 135)]
    batch = make_rows(spec, rows, num_decode_rows=2)
    check(batch, spec, prefill(batch, spec, block_kv=64))


@pytest.mark.usefixtures("products_are_loads")
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float8_e4m3fn, marks=pytest.mark.slow)]
)
def test_there_are_no_races(dtype: jax.typing.DTypeLike) -> None:
    spec = make_spec(2, 1, 64, 16, dtype)
    batch = make_rows(spec, [(9, 200), (12, 330)])
    out = prefill(batch, spec, num_workers=1, num_stages=2, block_kv=64, detect_races=True)
    check(batch, spec, out)
    assert not races_found(out)


def test_a_window_sinks_and_a_block_within_a_page() -> None:
    spec = make_spec(4, 1, 64, 128, window=70, sinks=True)
    batch = make_rows(spec, [(3, 300), (20, 90)])
    check(batch, spec, prefill(batch, spec, block_kv=64))


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 2, 4])
def test_batches_smaller_than_a_swizzle(num_tokens: int) -> None:
    spec = make_spec(2, 1, 64, 16)
    rows = [(num_tokens, 20)]
    batch = make_batch(
        spec, rows, num_decode_rows=0, num_tokens=num_tokens, max_rows=1, backend=HOPPER
    )
    kv_pages = write_kv(
        batch.kv_pages, batch.k, batch.v, batch.pages, batch.layer, spec=spec.kv, backend=HOPPER
    )
    batch = dataclasses.replace(batch, kv_pages=kv_pages)
    check(batch, spec, prefill(batch, spec))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3, 9])
def test_shares_of_any_size_give_the_same(num_workers: int) -> None:
    spec = make_spec(4, 2, 64, 8)
    batch = make_rows(spec, [(1, 4), (70, 190), (40, 40), (3, 130)], num_decode_rows=1)
    check(batch, spec, prefill(batch, spec, num_workers=num_workers, num_stages=3, block_kv=64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        make_spec(4, 1, 128, 128, soft_cap=20.0),
        make_spec(3, 3, 80, 8),
        make_spec(2, 2, 96, 24, window=40),
        make_spec(2, 1, 256, 16, soft_cap=50.0, window=30),
        make_spec(16, 1, 128, 16, jnp.float16),
        make_spec(7, 1, 64, 32),
        make_spec(3, 1, 64, 72, sinks=True),
        make_spec(32, 1, 64, 32),
        make_spec(4, 1, 128, 16, jnp.float8_e4m3fn),
        make_spec(2, 1, 96, 8, jnp.float8_e5m2, window=40),
        make_spec(8, 1, 128, 128, jnp.int8),
    ],
    ids=["128", "80", "96", "256", "f16", "group-7", "group-3", "group-32", "e4m3", "e5m2", "int8"],
)
def test_head_dims_groups_and_types(spec: AttentionSpec) -> None:
    batch = make_rows(spec, [(1, 9), (21, 100), (33, 161), (1, 64)], num_decode_rows=1)
    check(batch, spec, prefill(batch, spec))


@pytest.mark.slow
def test_queries_of_another_type_than_the_cache() -> None:
    spec = make_spec(2, 1, 64, 16)
    batch = make_rows(spec, [(1, 9), (5, 70)], num_decode_rows=1)
    wide = dataclasses.replace(batch, q=batch.q.astype(jnp.float32))
    out = prefill(wide, spec)
    assert out.dtype == jnp.float32
    check(batch, spec, out.astype(batch.q.dtype))


@pytest.mark.slow
def test_every_layer_reads_its_own_pages() -> None:
    spec = make_spec(2, 1, 64, 16)
    batch = make_rows(spec, [(9, 40)])
    out = prefill(dataclasses.replace(batch, layer=0), spec)  # which holds NaN
    assert np.isnan(np.asarray(out[:9], np.float32)).all()


@pytest.mark.slow
def test_a_tile_of_one_head_that_both_warpgroups_share() -> None:
    spec = make_spec(1, 1, 64, 16)
    batch = make_rows(spec, [(140, 150), (130, 130)])
    check(batch, spec, prefill(batch, spec, block_kv=64))


@pytest.mark.slow
def test_no_rows_but_decode_rows_leave_only_zeros() -> None:
    spec = make_spec(2, 1, 64, 16)
    batch = make_rows(spec, [(1, 20), (1, 3)], num_decode_rows=2)
    check(batch, spec, prefill(batch, spec))


# What must be caught: that these fail shows that the checks above can.


def test_a_wrong_page_is_caught() -> None:
    spec = make_spec(2, 1, 64, 16)
    batch = make_rows(spec, [(20, 60)])
    table = batch.pages.page_table
    wrong = dataclasses.replace(batch.pages, page_table=table.at[0, 2].set(table[0, 1]))
    out = prefill(dataclasses.replace(batch, pages=wrong), spec)
    assert error(out, oracle(spec, batch)) > 0.1


@pytest.mark.usefixtures("products_are_loads")
def test_reading_keys_before_they_are_there_is_caught_as_a_race(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wait, arrive, late = plgpu.barrier_wait, plgpu.barrier_arrive, []

    def wait_late(barrier: Any) -> None:
        one_of_many = getattr(barrier, "ref", None)
        if one_of_many is not None and one_of_many.dtype.num_arrivals == 4:  # of four pages
            late.append(barrier)
        else:
            wait(barrier)

    def arrive_after_the_wait(barrier: Any) -> None:
        while late:
            wait(late.pop())
        arrive(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait_late)
    monkeypatch.setattr(plgpu, "barrier_arrive", arrive_after_the_wait)
    spec = make_spec(2, 1, 64, 16)
    batch = make_rows(spec, [(9, 200)])
    out = prefill(batch, spec, num_workers=1, num_stages=2, block_kv=64, detect_races=True)
    assert races_found(out)


@pytest.mark.slow
def test_filling_a_stage_that_is_not_free_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = plgpu.barrier_wait

    def wait_but_for_a_stage(barrier: Any) -> None:
        one_of_many = getattr(barrier, "ref", barrier)
        if one_of_many.shape != (3,) or one_of_many.dtype.num_arrivals != 2:
            wait(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait_but_for_a_stage)
    spec = make_spec(2, 1, 64, 16)
    batch = make_rows(spec, [(9, 320)])
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="no threads observed phase"):
            prefill(batch, spec, num_workers=1, num_stages=3, block_kv=64)
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.mark.usefixtures("products_are_loads")
def test_values_that_are_not_zeroed_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gpu_prefill, "_forget", lambda *_: None)
    spec = make_spec(2, 1, 64, 16)
    batch = make_rows(spec, [(9, 27)])
    assert np.isnan(np.asarray(prefill(batch, spec), np.float32)).any()


# The plan, and what is refused.


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    "rows",
    [[(1, 1)], [(8, 8)] * 5, [(0, 5), (3, 700), (130, 1000), (0, 0), (1, 64)], [(5, 9)] * 30],
    ids=["one", "even", "ragged", "many"],
)
def test_every_token_and_what_it_sees_is_in_one_tile(
    rows: list[tuple[int, int]], group: int, window: int | None
) -> None:
    spec = make_spec(group, 1, 64, 16, window=window)
    num_decode_rows, decode_rows = 2, [(1, 9), (1, 77)]
    every = decode_rows + rows
    starts = np.cumsum([0, *(num_queries for num_queries, _ in every)])
    num_tokens = -(-int(starts[-1]) // 8) * 8 + 16
    max_rows = len(every) + 1
    pages = PageMetadata(
        page_table=jnp.zeros((max_rows, 8), jnp.int32),
        slots=jnp.zeros(num_tokens, jnp.int32),
        kv_lens=jnp.asarray([kv_len for _, kv_len in every] + [0], jnp.int32),
        query_starts=jnp.asarray([*starts, starts[-1]], jnp.int32),
        num_rows=jnp.int32(len(every)),
        num_decode_rows=jnp.int32(num_decode_rows),
        num_pages=64,
    )
    tiles = PrefillTiles(block_kv=64, num_stages=2, num_slots=1, num_workers=1)
    plan = plan_prefill(pages, spec=spec, tiles=tiles, num_tokens=num_tokens)
    (num_tiles,) = np.asarray(plan.num_tiles).tolist()
    used = np.asarray(plan.tiles)[:num_tiles]
    size = packing_of(group).tokens
    owner = {}
    for row, base, first, last, position, start, kv_len, blocks in used.tolist():
        assert base % 8 == 0
        assert base <= first < last <= base + size
        for token in range(first, last):
            assert token not in owner
            owner[token] = row
        if first >= starts[-1]:
            assert blocks == 0
            continue
        assert starts[row] <= first
        assert last <= starts[row + 1]
        assert kv_len == every[row][1]
        assert position + (last - base) == kv_len - (starts[row + 1] - last)
        assert start + blocks * 64 >= position + (last - base)
        lowest = max(0, position + first - base - window + 1) if window else 0
        assert lowest - 16 < start <= lowest
    assert sorted(owner) == list(range(num_decode_rows, num_tokens))
    assert list(used[:, 7]) == sorted(used[:, 7], reverse=True)
    assert not np.any(np.asarray(plan.tiles)[num_tiles:, 7])


def test_a_group_of_any_size_fills_most_of_a_tile() -> None:
    for group in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32, 64, 71):
        packing = packing_of(group)
        assert group % packing.heads == 0
        assert 0.75 * 128 <= packing.heads * packing.tokens <= 128, group


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (make_spec(4, 1, 64, 16, jnp.float32), "float32"),
        (make_spec(4, 1, 64, 16, jnp.float8_e4m3fnuz), "float8_e4m3fnuz"),
        (make_spec(4, 1, 80, 16, jnp.int8), "head_dim=80"),
        (make_spec(4, 1, 256, 16, jnp.float8_e4m3fn), "head_dim=256"),
        (make_spec(4, 1, 72, 16), "head_dim=72"),
        (make_spec(4, 1, 64, 20), "page_size=20"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_reason(spec: AttentionSpec, says: str) -> None:
    assert says in (why_not_prefill(spec) or "")


def test_what_it_can_do_is_not_refused() -> None:
    for head_dim in (64, 80, 96, 128, 256):
        for page_size in (8, 16, 24, 32, 64, 128):
            assert why_not_prefill(make_spec(8, 2, head_dim, page_size)) is None
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8):
        for head_dim in (64, 96, 128):
            assert why_not_prefill(make_spec(8, 2, head_dim, 16, dtype)) is None

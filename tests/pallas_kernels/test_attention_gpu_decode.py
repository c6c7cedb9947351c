"""Decode attention for Hopper: its plan, its numbers in the interpreter, and what it refuses."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import attention_gpu, attention_gpu_decode, attention_gpu_latent
from pallas_kernels.attention_gpu_decode import (
    DecodeTiles,
    attend_decode,
    decode_tiles,
    why_not_decode,
)
from pallas_kernels.backend import Backend
from pallas_kernels.cases import CASES, attention_case
from pallas_kernels.chips import Chip
from pallas_kernels.gpu_split import num_multiprocessors, plan_split
from pallas_kernels.kv_write import write_kv
from pallas_kernels.types import AttentionSpec, KVSpec, PageMetadata
from tests.pallas_kernels.batches import Batch, error, make_batch, oracle, run

H100 = Chip(platform="gpu", kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
HOPPER = Backend(name="gpu", chip=H100, interpret=True)
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}  # half of the last place, and P rounded once


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


def make_latent(
    num_heads: int, width: int, value_dim: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> AttentionSpec:
    kv = KVSpec(
        num_kv_heads=1,
        head_dim=width,
        page_size=16,
        dtype=dtype,
        kind="latent",
        value_dim=value_dim,
    )
    return AttentionSpec(kv=kv, num_heads=num_heads, scale=width**-0.5)


def make_rows(spec: AttentionSpec, kv_lens: list[int]) -> Batch:
    """Decode rows of these lengths and two rows and tokens to spare; NaN wherever nobody's is."""
    batch = make_batch(
        spec,
        [(1, kv_len) for kv_len in kv_lens],
        num_decode_rows=len(kv_lens),
        num_tokens=len(kv_lens) + 2,
        max_rows=len(kv_lens) + 2,
        backend=HOPPER,
    )
    kv_pages = write_kv(
        batch.kv_pages, batch.k, batch.v, batch.pages, batch.layer, spec=spec.kv, backend=HOPPER
    )
    object.__setattr__(batch, "kv_pages", kv_pages)
    return batch


def decode(
    batch: Batch,
    spec: AttentionSpec,
    *,
    num_workers: int = 3,
    num_stages: int = 2,
    block_kv: int | None = None,
    detect_races: bool = False,
) -> Array:
    tiles = DecodeTiles(
        block_kv=block_kv or decode_tiles(spec).block_kv,
        num_stages=num_stages,
        blocks_per_sm=1,
        num_workers=num_workers,
    )
    return attend_decode(
        batch.q,
        batch.kv_pages,
        batch.pages,
        jnp.int32(batch.layer),
        spec=spec,
        backend=HOPPER,
        sinks=batch.sinks,
        tiles=tiles,
        interpret=plgpu.InterpretGPUParams(detect_races=detect_races),
    )


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """By kernel, whether the last run with detect_races had one. A run forgets the one before.

    The interpreter does not check what a wgmma reads, so products are made of plain loads here, and
    committed: a wgmma's reads need no fence before TMA writes there again.
    """
    found = {}
    merge = attention_gpu_decode._merge

    def look_and_merge(piece: Array, *args: Any, **options: Any) -> Array:
        piece.block_until_ready()
        found["decode"] = gpu_callbacks.get_races().races_found
        out = merge(piece, *args, **options).block_until_ready()
        found["merge"] = gpu_callbacks.get_races().races_found
        return out

    def multiply(a: Any, b: Any) -> Array:
        left, right = a[...], b[...]
        plgpu.commit_smem()
        return jnp.dot(left, right, preferred_element_type=jnp.float32)

    monkeypatch.setattr(attention_gpu_decode, "_merge", look_and_merge)
    monkeypatch.setattr(attention_gpu_decode, "_multiply", multiply)
    return found


def check(batch: Batch, spec: AttentionSpec, out: Array) -> None:
    expected = oracle(spec, batch)
    assert error(out, expected) < TOLERANCE[out.dtype.name]
    assert not np.any(np.asarray(out[len(batch.histories) :], np.float32))


# The numbers, in the interpreter. Unused slots and pages hold NaN throughout.


def test_ragged_rows_are_right_and_nothing_leaks() -> None:
    spec = make_spec(8, 2, 64, 16)
    batch = make_rows(spec, [1, 63, 64, 65, 200])
    check(batch, spec, decode(batch, spec, block_kv=64))


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float8_e4m3fn, marks=pytest.mark.slow)]
)
def test_there_are_no_races(races: dict[str, bool], dtype: jax.typing.DTypeLike) -> None:
    spec = make_spec(4, 1, 64, 16, dtype)
    batch = make_rows(spec, [310, 200])
    check(batch, spec, decode(batch, spec, num_workers=2, block_kv=64, detect_races=True))
    assert races == {"decode": False, "merge": False}


def test_a_window_sinks_and_a_block_within_a_page() -> None:
    spec = make_spec(4, 1, 64, 128, window=70, sinks=True)
    batch = make_rows(spec, [130, 77, 69, 128])
    check(batch, spec, decode(batch, spec, num_workers=5, block_kv=64))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_shares_of_any_size_give_the_same(num_workers: int) -> None:
    spec = make_spec(3, 1, 64, 8)
    batch = make_rows(spec, [300, 5, 129])
    check(batch, spec, decode(batch, spec, num_workers=num_workers, num_stages=3, block_kv=64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        make_spec(4, 1, 128, 128, soft_cap=20.0),
        make_spec(3, 3, 80, 8),
        make_spec(2, 2, 96, 24, window=40),
        make_spec(2, 1, 256, 16, soft_cap=50.0),
        make_spec(16, 1, 128, 16, jnp.float16),
        make_spec(71, 1, 64, 32),
        make_spec(66, 1, 128, 32),
        make_spec(8, 2, 64, 32, jnp.float8_e4m3fn, sinks=True),
        make_spec(4, 1, 64, 16, jnp.float8_e5m2),
        make_spec(4, 1, 128, 16, jnp.int8),
    ],
    ids=["128", "80", "96", "256", "f16", "group-71", "two-parts", "e4m3", "e5m2", "int8"],
)
def test_head_dims_groups_and_types(spec: AttentionSpec) -> None:
    batch = make_rows(spec, [100, 1, 150])
    check(batch, spec, decode(batch, spec))


@pytest.mark.slow
def test_no_decode_row_gives_zeros() -> None:
    spec = make_spec(4, 1, 64, 16)
    batch = make_rows(spec, [20])
    pages = dict(vars(batch.pages), num_decode_rows=jnp.int32(0))
    object.__setattr__(batch, "pages", PageMetadata(**pages))
    assert not np.any(np.asarray(decode(batch, spec), np.float32))


@pytest.mark.slow
def test_a_mixed_batch_through_the_entry() -> None:
    spec = make_spec(4, 2, 64, 16, sinks=True)
    rows = [(1, 1), (1, 70), (5, 21), (0, 3), (9, 9)]
    batch = make_batch(
        spec, rows, num_decode_rows=2, num_tokens=32, max_rows=8, num_layers=2, backend=HOPPER
    )
    out, _ = run(batch, spec=spec, backend=HOPPER)
    assert error(out, oracle(spec, batch)) < TOLERANCE["bfloat16"]
    assert not np.any(np.asarray(out[16:], np.float32))


# A latent cache, all of whose rows it serves.


@pytest.mark.parametrize(
    ("num_heads", "width", "value_dim", "dtype"),
    [
        (5, 192, 128, jnp.bfloat16),
        (6, 96, 80, jnp.float16),
        pytest.param(16, 576, 512, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(40, 576, 512, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(20, 576, 512, jnp.float8_e4m3fn, marks=pytest.mark.slow),
        pytest.param(4, 192, 128, jnp.int8, marks=pytest.mark.slow),
    ],
)
def test_a_mixed_batch_over_a_latent_cache(
    num_heads: int, width: int, value_dim: int, dtype: jax.typing.DTypeLike
) -> None:
    spec = make_latent(num_heads, width, value_dim, dtype)
    rows = [(1, 1), (1, 70), (5, 21), (0, 3), (9, 70)]
    batch = make_batch(
        spec, rows, num_decode_rows=2, num_tokens=18, max_rows=8, num_layers=2, backend=HOPPER
    )
    out, _ = run(batch, spec=spec, backend=HOPPER)
    assert error(out, oracle(spec, batch)) < TOLERANCE["bfloat16"]
    assert not np.any(np.asarray(out[16:], np.float32))


def test_a_long_batch_over_a_latent_cache_goes_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gpu_latent, "_MOST_TOKENS", 8)
    spec = make_latent(4, 96, 64)
    rows = [(1, 30), (11, 75), (7, 7)]
    batch = make_batch(
        spec, rows, num_decode_rows=1, num_tokens=21, max_rows=4, num_layers=2, backend=HOPPER
    )
    out, _ = run(batch, spec=spec, backend=HOPPER)
    assert error(out, oracle(spec, batch)) < TOLERANCE["bfloat16"]
    assert not np.any(np.asarray(out[19:], np.float32))


def test_there_are_no_races_over_a_latent_cache(races: dict[str, bool]) -> None:
    spec = make_latent(4, 96, 64)
    batch = make_rows(spec, [310, 200])
    check(batch, spec, decode(batch, spec, num_workers=2, block_kv=64, detect_races=True))
    assert races == {"decode": False, "merge": False}


def test_each_token_of_a_batch_is_a_row() -> None:
    pages = PageMetadata(
        page_table=jnp.asarray([[3, 0], [4, 5], [6, 7], [0, 0]], jnp.int32),
        slots=jnp.zeros(8, jnp.int32),
        kv_lens=jnp.asarray([7, 9, 12, 0], jnp.int32),
        query_starts=jnp.asarray([0, 1, 4, 6, 6], jnp.int32),
        num_rows=jnp.int32(3),
        num_decode_rows=jnp.int32(1),
        num_pages=8,
    )
    rows = attention_gpu_latent.token_rows(pages, 0, 8)
    assert rows.kv_lens.tolist() == [7, 7, 8, 9, 11, 12, 0, 0]
    assert rows.page_table[:6, 0].tolist() == [3, 4, 4, 4, 6, 6]
    assert rows.num_decode_rows == 6
    last = attention_gpu_latent.token_rows(pages, 5, 3)
    assert last.kv_lens.tolist() == [12, 0, 0]
    assert last.num_decode_rows == 1


# What must be caught: that these fail shows that the checks above can.


def test_a_wrong_page_is_caught() -> None:
    spec = make_spec(4, 1, 64, 16)
    batch = make_rows(spec, [64])
    table = batch.pages.page_table
    pages = dict(vars(batch.pages), page_table=table.at[0, :2].set(table[0, 1::-1]))
    object.__setattr__(batch, "pages", PageMetadata(**pages))
    # Two pages in the wrong order hold the same tokens: right for full attention ...
    check(batch, spec, decode(batch, spec))
    # ... and wrong for one whose window starts in the second.
    spec = make_spec(4, 1, 64, 16, window=40)
    assert error(decode(batch, spec), oracle(spec, batch)) > 0.1


def test_reading_a_stage_before_it_is_full_is_caught_as_a_race(
    monkeypatch: pytest.MonkeyPatch, races: dict[str, bool]
) -> None:
    wait, arrive, late = plgpu.barrier_wait, plgpu.barrier_arrive, []

    def wait_late(barrier: Any) -> None:
        if barrier.ref.dtype.num_arrivals == 4:  # of a stage's four pages
            late.append(barrier)
        else:
            wait(barrier)

    def arrive_after_the_wait(barrier: Any) -> None:
        while late:
            wait(late.pop())
        arrive(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait_late)
    monkeypatch.setattr(plgpu, "barrier_arrive", arrive_after_the_wait)
    spec = make_spec(4, 1, 64, 16)
    decode(make_rows(spec, [320]), spec, num_workers=1, block_kv=64, detect_races=True)
    assert races["decode"]


def test_filling_a_stage_that_is_not_free_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = plgpu.barrier_wait

    def wait_but_for_a_stage(barrier: Any) -> None:
        if barrier.ref.dtype.num_arrivals != 1 or barrier.ref.shape != (3,):
            wait(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait_but_for_a_stage)
    spec = make_spec(4, 1, 64, 16)
    batch = make_rows(spec, [320])
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="no threads observed phase"):
            decode(batch, spec, num_workers=1, num_stages=3, block_kv=64)
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


# The plan.


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("num_workers", [1, 7, 64])
@pytest.mark.parametrize(
    "kv_lens", [[1], [32768], [5, 0, 700, 64, 65], [300] * 40], ids=["1", "32k", "empty", "40"]
)
def test_every_block_is_given_out_once_in_equal_shares(
    kv_lens: list[int], num_workers: int, window: int | None
) -> None:
    num_heads, block_kv = 3, 64
    unused = [900, 900]  # rows that prefill: not of the plan
    pages = PageMetadata(
        page_table=jnp.zeros((len(kv_lens) + 2, 8), jnp.int32),
        slots=jnp.zeros(8, jnp.int32),
        kv_lens=jnp.asarray(kv_lens + unused, jnp.int32),
        query_starts=jnp.zeros(len(kv_lens) + 3, jnp.int32),
        num_rows=jnp.int32(len(kv_lens) + 2),
        num_decode_rows=jnp.int32(len(kv_lens)),
        num_pages=64,
    )
    plan = plan_split(
        pages,
        num_rows=len(kv_lens) + 2,
        num_heads=num_heads,
        block_kv=block_kv,
        window=window,
        num_workers=num_workers,
    )
    first = [0 if window is None else max(n - window, 0) // block_kv for n in kv_lens]
    counts = [-(-n // block_kv) - start for n, start in zip(kv_lens, first, strict=True)]
    given: dict[tuple[int, int], int] = {}  # (item, block): piece
    shares = []
    for worker, (item, start, num_own, num_items) in enumerate(np.asarray(plan.work).tolist()):
        left = num_own
        for index in range(num_items):
            skipped = start if index == 0 else 0
            take = min(counts[(item + index) // num_heads] - skipped, left)
            for block in range(skipped, skipped + take):
                assert (item + index, block) not in given
                given[item + index, block] = item + index + worker
            left -= take
        assert left == 0
        shares.append(num_own)
    assert len(given) == num_heads * sum(counts)
    used = [share for share in shares if share]
    assert max(used) - min(used) <= 1
    assert len(used) == max(1, min(num_workers, num_heads * sum(counts) // 2))
    for item, (first_piece, num) in enumerate(np.asarray(plan.pieces).tolist()):
        pieces = {piece for (each, _), piece in given.items() if each == item}
        assert pieces == set(range(first_piece, first_piece + num))
        assert all(piece < plan.num_pieces for piece in pieces)


def test_multiprocessors_by_name_else_by_generation() -> None:
    assert num_multiprocessors(H100) == 132
    pcie = Chip(platform="gpu", kind="NVIDIA H100 PCIe", compute_capability="9.0")
    assert num_multiprocessors(pcie) == 114
    l40s = Chip(platform="gpu", kind="NVIDIA L40S", compute_capability="8.9")
    assert num_multiprocessors(l40s) == 142
    other = Chip(platform="gpu", kind="NVIDIA Something", compute_capability="9.0")
    assert num_multiprocessors(other) == 132


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("tiny")])
def test_the_ring_keeps_enough_bytes_in_flight(name: str, dtype: str) -> None:
    spec = attention_case(name, dtype=dtype)
    if why_not_decode(spec) is not None:  # 8 bits and a head_dim of 80
        assert spec.kv.head_dim == 80
        return
    tiles = decode_tiles(spec)
    assert tiles.num_stages >= 2
    width = spec.kv.head_dim * (1 if spec.kv.kind == "latent" else 2)
    stage = tiles.block_kv * width * jnp.dtype(dtype).itemsize
    assert tiles.blocks_per_sm * (tiles.num_stages - 1) * stage >= 64 * 1024


# What is refused.


@pytest.mark.parametrize(
    ("kind", "capability"), [("Tesla T4", "7.5"), ("Tesla V100-SXM2-16GB", "7.0")]
)
def test_chips_before_ampere_are_refused_by_name(kind: str, capability: str) -> None:
    chip = Chip(platform="gpu", kind=kind, compute_capability=capability)
    reason = attention_gpu.why_not(make_spec(4, 1, 64, 16), chip)
    assert reason is not None
    assert kind in reason
    assert "8.0" in reason


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (make_spec(4, 1, 64, 4), "page_size=4 is not a multiple of 8"),
        (make_spec(4, 1, 64, 16, jnp.float32), "not float32"),
        (make_spec(4, 1, 32, 16), "head_dim=32"),
        (make_spec(4, 1, 72, 16), "head_dim=72"),
        (make_spec(4, 1, 80, 16, jnp.int8), "head_dim=80 is not a multiple of 32"),
        (attention_case("deepseek-v3", dtype=jnp.float32), "not float32"),
        (attention_case("tiny-latent", dtype=jnp.bfloat16), "head_dim=24"),
        (make_latent(4, 640, 512), "head_dim=640 is not a multiple of 16 from 64 to 576"),
        (make_latent(4, 576, 520), "value_dim=520 is not a multiple of 16 from 64 to 512"),
    ],
)
def test_a_layer_it_cannot_serve_is_refused_with_the_reason(
    spec: AttentionSpec, reason: str
) -> None:
    assert reason in (attention_gpu.why_not(spec, H100) or "")

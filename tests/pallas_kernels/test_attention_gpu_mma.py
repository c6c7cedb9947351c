"""attend_mma: interpreted with race detection, and its compiled kernels emulated from their PTX."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from benchmarks import compiling
from pallas_kernels import attention_gpu_mma
from pallas_kernels.attention_gpu_mma import attend_mma, plan_tiles, why_not_mma
from pallas_kernels.backend import Backend
from pallas_kernels.cases import attention_case
from pallas_kernels.chips import Chip
from pallas_kernels.kv_write import write_kv
from pallas_kernels.types import AttentionSpec, KVSpec
from tests.pallas_kernels.batches import Batch, error, make_batch, oracle

ROOT = Path(__file__).parents[2]
TOLERANCE = 5e-3  # weights and the output are bfloat16: 2 ** -9 each, measured 0.002
B200 = Chip(platform="gpu", kind="NVIDIA B200", compute_capability="10.0")
A100 = Chip(platform="gpu", kind="NVIDIA A100-SXM4-40GB", compute_capability="8.0")
L4 = Chip(platform="gpu", kind="NVIDIA L4", compute_capability="8.9")
T4 = Chip(platform="gpu", kind="Tesla T4", compute_capability="7.5")
MIXED = [(1, 5), (1, 90), (0, 7), (30, 100), (40, 40), (1, 65)]


def layer_of(
    num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, **more: Any
) -> AttentionSpec:
    dtype = more.pop("dtype", jnp.bfloat16)
    kv = KVSpec(num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    return AttentionSpec(kv=kv, num_heads=num_heads, scale=head_dim**-0.5, **more)


def interpret(spec: AttentionSpec, batch: Batch, chip: Chip = B200) -> tuple[Array, bool]:
    """The output, and whether the interpreter saw a race."""
    backend = Backend(name="gpu", chip=chip, interpret=True)

    @jax.jit
    def attend(q: Array, kv_pages: Array, layer: Array) -> Array:
        return attend_mma(
            q, kv_pages, batch.pages, layer, spec=spec, backend=backend, sinks=batch.sinks
        )

    pages = write_kv(
        batch.kv_pages, batch.k, batch.v, batch.pages, batch.layer, spec=spec.kv, backend=backend
    )
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            out = jax.block_until_ready(attend(batch.q, pages, jnp.int32(batch.layer)))
        return out, gpu_callbacks.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def check(spec: AttentionSpec, batch: Batch, chip: Chip = B200) -> None:
    out, raced = interpret(spec, batch, chip)
    assert error(out, oracle(spec, batch)) <= TOLERANCE
    assert not np.any(np.asarray(out[int(batch.pages.query_starts[-1]) :], np.float32))
    assert not raced


def test_decode_and_verify_rows_are_one_call_of_small_tiles() -> None:
    spec = layer_of(4, 2, 64, 16)
    rows = [(1, 1), (1, 16), (1, 63), (1, 150), (3, 70)]
    check(spec, make_batch(spec, rows, num_decode_rows=4, num_tokens=8, max_rows=8))


def test_a_window_a_cap_and_sinks_are_counted_in() -> None:
    spec = layer_of(2, 1, 64, 8, window=20, soft_cap=5.0, sinks=True)
    rows = [(1, 5), (1, 91), (3, 70)]
    check(spec, make_batch(spec, rows, num_decode_rows=2, num_tokens=8, max_rows=4))


@pytest.mark.parametrize(
    ("dtype", "chip"),
    [
        (jnp.float8_e4m3fn, B200),
        pytest.param(jnp.float8_e4m3fn, A100, marks=pytest.mark.slow),
        pytest.param(jnp.float8_e5m2, B200, marks=pytest.mark.slow),
        (jnp.int8, B200),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "kind", None)),
)
def test_a_cache_of_8_bits(dtype: jax.typing.DTypeLike, chip: Chip) -> None:
    spec = layer_of(4, 2, 64, 16, dtype=dtype, window=70, soft_cap=5.0, sinks=True)
    rows = [(1, 1), (1, 16), (1, 150), (3, 70)]
    check(spec, make_batch(spec, rows, num_decode_rows=3, num_tokens=8, max_rows=4), chip)


def test_prefill_rows_beside_decode_rows_are_two_calls() -> None:
    spec = layer_of(8, 1, 64, 16)
    check(spec, make_batch(spec, MIXED, num_decode_rows=2, num_tokens=96, max_rows=8))


def test_a_long_context_is_cut_into_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = layer_of(2, 1, 64, 64, sinks=True)
    rows = [(1, 700), (1, 40), (1, 257)]
    batch = make_batch(spec, rows, num_decode_rows=3, num_tokens=4, max_rows=4)
    shares = []
    launch = attention_gpu_mma._launch

    def spy(*operands: Array, num_shares: int, **static: Any) -> tuple[Array, Array]:
        shares.append(num_shares)
        return launch(*operands, num_shares=num_shares, **static)

    monkeypatch.setattr(attention_gpu_mma, "_launch", spy)
    check(spec, batch)
    assert shares == [4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "chip"),
    [
        (layer_of(4, 2, 128, 16), B200),
        (layer_of(2, 2, 80, 16), B200),
        (layer_of(4, 1, 96, 128, dtype=jnp.float16), B200),
        (layer_of(2, 1, 256, 32, window=33), A100),
        (layer_of(20, 1, 64, 64), A100),
        (layer_of(8, 1, 128, 8, soft_cap=30.0, window=70), A100),
        (layer_of(3, 1, 32, 16, sinks=True), B200),
        (layer_of(4, 1, 128, 16, dtype=jnp.float8_e4m3fn), A100),
        (layer_of(2, 1, 80, 32, dtype=jnp.int8), A100),
        (layer_of(2, 1, 256, 8, dtype=jnp.float8_e4m3fn, window=33), L4),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
@pytest.mark.parametrize("num_tokens", [8, 96])
def test_ragged_batches_match_dense_attention(
    spec: AttentionSpec, chip: Chip, num_tokens: int
) -> None:
    rows = MIXED if num_tokens == 96 else [(1, 1), (1, 128), (1, 75), (3, 70)]
    num_decode_rows = 2 if num_tokens == 96 else 3
    batch = make_batch(
        spec, rows, num_decode_rows=num_decode_rows, num_tokens=num_tokens, max_rows=8
    )
    check(spec, batch, chip)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_batches_match_dense_attention(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = layer_of(4, 1, 64, 16, window=[None, 30][seed % 2])
    decode = [(1, int(n)) for n in rng.integers(1, 200, 3)]
    others = [(int(n), int(n + rng.integers(0, 90))) for n in rng.integers(0, 40, 3)]
    batch = make_batch(
        spec, decode + others, num_decode_rows=3, num_tokens=128, max_rows=8, seed=seed
    )
    check(spec, batch)


def test_a_wrong_page_is_noticed() -> None:
    spec = layer_of(2, 1, 64, 16)
    batch = make_batch(
        spec, [(1, 40), (2, 60)], num_decode_rows=1, num_tokens=4, max_rows=2, poison=0.5
    )
    table = batch.pages.page_table.at[0, 1].set(batch.pages.page_table[1, 0])
    wrong = dataclasses.replace(batch, pages=dataclasses.replace(batch.pages, page_table=table))
    out, _ = interpret(spec, wrong)
    assert error(out, oracle(spec, batch)) > 10 * TOLERANCE


def test_batches_without_rows_are_zeros() -> None:
    spec = layer_of(2, 1, 64, 16)
    batch = make_batch(spec, [], num_decode_rows=0, num_tokens=4, max_rows=2)
    out, _ = interpret(spec, batch)
    assert not np.any(np.asarray(out, np.float32))


@pytest.mark.parametrize("tile_tokens", [1, 4, 21])
@pytest.mark.parametrize("seed", range(3))
def test_tiles_hold_every_token_of_the_rows_once(seed: int, tile_tokens: int) -> None:
    rng = np.random.default_rng(seed)
    spec = layer_of(2, 1, 64, 16)
    decode = [(1, int(n)) for n in rng.integers(1, 60, 4)]
    others = [(int(n), int(n + rng.integers(0, 50))) for n in rng.integers(0, 30, 5)]
    batch = make_batch(spec, decode + others, num_decode_rows=4, num_tokens=128, max_rows=16)
    pages, starts = batch.pages, np.asarray(batch.pages.query_starts)
    in_rows = np.arange(16) >= 4
    plan = jax.jit(functools.partial(plan_tiles, num_tokens=128, tile_tokens=tile_tokens))(
        pages, jnp.int32(64), jnp.asarray(in_rows)
    )
    items, tile_of, offset_of = (
        np.asarray(each) for each in (plan.items, plan.tile_of, plan.offset_of)
    )
    assert (items[:, 3] == 64).all()
    used = np.asarray(plan.in_use)
    assert used.tolist() == [starts[4] <= token < starts[9] for token in range(128)]
    places = set()
    for token in np.flatnonzero(used):
        row = int(np.searchsorted(starts, token, side="right")) - 1
        tile, offset = tile_of[token], offset_of[token]
        position = pages.kv_lens[row] - (starts[row + 1] - token)
        assert items[tile, 0] == row
        assert items[tile, 1] + offset == position < items[tile, 2]
        assert items[tile, 2] <= items[tile, 1] + tile_tokens
        assert plan.first_tokens[tile] + offset == token
        places.add((tile, offset))
    assert len(places) == used.sum()
    assert not items[len({tile for tile, _ in places}) :, 2].any(), "the rest have no context"


@pytest.mark.parametrize(
    ("spec", "chip", "says"),
    [
        (attention_case("llama-3.1-8b", dtype="bfloat16"), T4, "Ampere"),
        (attention_case("llama-3.1-8b", dtype="float32"), A100, "float32"),
        (attention_case("llama-3.1-8b", dtype="float8_e4m3fnuz"), A100, "float8_e4m3fnuz"),
        *(
            (attention_case("llama-3.1-8b", dtype=dtype), chip, None)
            for dtype in ("float8_e4m3fn", "float8_e5m2", "int8")
            for chip in (A100, B200)
        ),
        (attention_case("deepseek-v3", dtype="bfloat16"), B200, "latent"),
        (attention_case("tiny", dtype="bfloat16"), A100, "head_dim=8"),
        (attention_case("llama-3.1-8b", dtype="bfloat16", page_size=24), A100, "page_size=24"),
        (attention_case("stablelm-3b", dtype="bfloat16", page_size=8), A100, "page_size=8"),
        (attention_case("stablelm-3b", dtype="bfloat16", page_size=8), B200, None),
        (attention_case("stablelm-3b", dtype="int8", page_size=16), A100, "page_size=16"),
        (attention_case("stablelm-3b", dtype="int8", page_size=32), A100, None),
        (attention_case("llama-3.1-8b", dtype="bfloat16", page_size=128), A100, None),
        (attention_case("gpt-oss-20b/window", dtype="float16"), B200, None),
    ],
)
def test_what_the_kernels_cannot_do_is_told(
    spec: AttentionSpec, chip: Chip, says: str | None
) -> None:
    reason = why_not_mma(spec, chip=chip)
    assert reason is None if says is None else says in (reason or "")


def emulate(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What `emulate_mma` says; a compile that hangs, as some did under load, is tried again."""
    missing = compiling.why_not(arguments[0])
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    command = [sys.executable, "-m", "tests.pallas_kernels.emulate_mma", *arguments]
    start = functools.partial(
        subprocess.run,
        command,
        cwd=ROOT,
        env=compiling.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=180,
    )
    try:
        run = start()
    except subprocess.TimeoutExpired:
        run = start()
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "decode-128",
        "decode-80",
        "decode-long",
        "decode-256-window",
        "decode-group-64",
        "decode-fp8",
        "decode-e5m2",
        "decode-int8",
        "prefill-fp8",
        "prefill-int8",
        "prefill-128",
        "prefill-96-window",
        "prefill-256-cap",
    ],
)
def test_what_is_compiled_for_an_a100_is_right_when_emulated(tmp_path: Path, case: str) -> None:
    result = emulate(tmp_path, "a100", case)
    assert result["error"] <= TOLERANCE
    assert result["padding"] == 0.0
    assert result["races"] == []


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["a100", "l4"])
def test_every_value_of_8_bits_stays_what_it_is_when_widened(tmp_path: Path, chip: str) -> None:
    wrong = emulate(tmp_path, chip, "widen")
    assert wrong == {"float8_e4m3fn": [], "float8_e5m2": [], "int8": []}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cut", "says"),
    [
        ("cp.async.wait_group", "before the copy was waited for"),
        ("cp.async.wait_group > bar.sync", "another thread wrote since the last barrier"),
        ("st.shared", None),
    ],
)
def test_what_is_taken_out_of_a_compiled_kernel_is_noticed(
    tmp_path: Path, cut: str, says: str | None
) -> None:
    result = emulate(tmp_path, "a100", "decode-128", cut)
    if says is None:
        assert not result["error"] <= 10 * TOLERANCE
    else:
        assert any(says in report for report in result["races"])

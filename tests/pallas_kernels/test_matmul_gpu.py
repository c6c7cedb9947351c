"""The Hopper kernel of quantized and grouped matmul, in Mosaic GPU's interpreter."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import grouped_matmul, quantized_matmul_gpu
from pallas_kernels.backend import REFERENCE, Backend, BackendRefused
from pallas_kernels.chips import Chip
from pallas_kernels.grouped_matmul_gpu import plan_row_visits
from pallas_kernels.quantized import Format, QuantizedArray, quantize
from pallas_kernels.quantized_matmul import choose_matmul_backend, quantized_matmul
from pallas_kernels.quantized_matmul_gpu import Tile, make_tile, why_not
from tests.pallas_kernels.test_quantized_matmul import error, inputs, random_weight

H100 = Chip(platform="gpu", kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
A100 = Chip(platform="gpu", kind="NVIDIA A100-SXM4-40GB", compute_capability="8.0")
GPU = Backend(name="gpu", chip=H100, interpret=True)
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4}  # the output is rounded to x's type
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_matmul_gpu, "_NUM_MULTIPROCESSORS", 1)  # each is interpreted


def with_tile(monkeypatch: pytest.MonkeyPatch, **changed: int) -> None:
    def make(*args: Any, **options: Any) -> Tile:
        return dataclasses.replace(make_tile(*args, **options), **changed)

    monkeypatch.setattr(quantized_matmul_gpu, "make_tile", make)


@pytest.mark.parametrize(
    ("format", "block", "zeros", "T", "D", "F", "dtype"),
    [
        ("int8", (None, 1), False, 5, 2048, 64, "bfloat16"),  # in shares of the inputs
        ("int8", (32, 1), False, 3, 128, 64, "bfloat16"),  # four scales a step
        ("float8_e4m3fn", (128, 128), False, 9, 256, 192, "bfloat16"),
        ("int4", (128, 1), True, 3, 256, 128, "bfloat16"),
        ("int4", (64, 1), False, 33, 128, 256, "bfloat16"),  # two warpgroups, two visits
        pytest.param("int8", (None, 1), False, 40, 256, 256, "bfloat16", marks=slow),
        pytest.param("float8_e5m2", (64, 1), False, 8, 128, 64, "bfloat16", marks=slow),
        pytest.param("int8", (None, 1), False, 8, 128, 64, "float16", marks=slow),
        pytest.param("float8_e4m3fn", (None, 1), False, 8, 128, 64, "float16", marks=slow),
        pytest.param("int4", (None, 1), False, 70, 128, 64, "float16", marks=slow),
        pytest.param("int8", (64, 64), False, 8, 256, 256, "bfloat16", marks=slow),
        pytest.param("float8_e4m3fn", (128, 128), False, 16, 128, 576, "bfloat16", marks=slow),
    ],
)
def test_the_kernel_matches_the_reference(
    format: Format,
    block: tuple[int | None, int],
    zeros: bool,
    T: int,
    D: int,
    F: int,
    dtype: str,
) -> None:
    weight = quantize(random_weight((D, F)) + 0.5 * zeros, format, block=block, zeros=zeros)
    x = inputs(T, D, dtype)
    expected = quantized_matmul(x.astype(jnp.float32), weight, backend=REFERENCE)
    out = quantized_matmul(x, weight, backend=GPU)
    assert out.dtype == x.dtype
    assert error(out, np.asarray(expected, np.float64)) < TOLERANCE[dtype]


def test_a_swapped_scale_block_is_seen() -> None:
    weight = quantize(random_weight((256, 64)), "int8", block=(128, 1))
    wrong = dataclasses.replace(weight, scales=weight.scales[::-1])
    x = inputs(4, 256, "bfloat16")
    expected = quantized_matmul(x.astype(jnp.float32), weight, backend=REFERENCE)
    assert error(quantized_matmul(x, wrong, backend=GPU), np.asarray(expected, np.float64)) > 0.1


def test_a_huge_activation_does_not_overflow_float16_and_nan_stays_in_its_row() -> None:
    weight = quantize(random_weight((128, 64)), "float8_e4m3fn")
    x = inputs(4, 128, "bfloat16").at[1, 5].set(3e5).at[3, 0].set(jnp.nan)
    expected = quantized_matmul(x.astype(jnp.float32), weight, backend=REFERENCE)
    out = quantized_matmul(x, weight, backend=GPU)
    for row in range(3):
        assert error(out[row], np.asarray(expected[row], np.float64)) < TOLERANCE["bfloat16"]
    assert np.all(np.isnan(np.asarray(out[3], np.float32)))


# Races. The interpreter does not check what a wgmma reads, so products are made of plain loads.


@pytest.fixture
def races_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Runs 4 steps in 2 stages, checks the sums if there was no race, and says if there was."""

    def multiply(pairs: list[tuple[Any, Any]]) -> Any:
        operands = [(a[...], b[...]) for a, b in pairs]
        plgpu.commit_smem()
        return sum(jnp.dot(a, b, preferred_element_type=jnp.float32) for a, b in operands)

    monkeypatch.setattr(quantized_matmul_gpu, "_multiply", multiply)
    monkeypatch.setattr(
        quantized_matmul_gpu, "interpreter", lambda: plgpu.InterpretGPUParams(detect_races=True)
    )
    with_tile(monkeypatch, num_stages=2)

    def run() -> bool:
        weight = quantize(random_weight((256, 64)), "int8", block=(64, 1))
        x = inputs(3, 256, "bfloat16")
        expected = quantized_matmul(x.astype(jnp.float32), weight, backend=REFERENCE)
        out = jax.block_until_ready(quantized_matmul(x, weight, backend=GPU))
        found = gpu_callbacks.get_races().races_found
        if not found:
            assert error(out, np.asarray(expected, np.float64)) < TOLERANCE["bfloat16"]
        return found

    return run


def test_there_are_no_races(races_of: Callable[[], bool]) -> None:
    assert not races_of()


def test_reading_a_stage_before_it_is_full_is_caught_as_a_race(
    monkeypatch: pytest.MonkeyPatch, races_of: Callable[[], bool]
) -> None:
    wait, arrive, late = plgpu.barrier_wait, plgpu.barrier_arrive, []

    def wait_late(barrier: Any) -> None:
        if barrier.ref.dtype.num_arrivals == 2:  # the weights' copy and the rows'
            late.append(barrier)
        else:
            wait(barrier)

    def arrive_after_the_wait(barrier: Any) -> None:
        while late:
            wait(late.pop())
        arrive(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait_late)
    monkeypatch.setattr(plgpu, "barrier_arrive", arrive_after_the_wait)
    assert races_of()


# Groups.


@pytest.mark.parametrize(
    ("sizes", "padding", "format", "block"),
    [
        ([3, 0, 9], 4, "int8", (None, 1)),
        ([0, 2, 9], 0, "int4", (64, 1)),
        pytest.param([3, 0, 14, 1], 5, None, (None, 1), marks=slow),
        pytest.param([0, 20, 0], 0, "int8", (None, 1), marks=slow),
        pytest.param([0, 0], 9, "int8", (None, 1), marks=slow),
        pytest.param([2, 0, 11], 3, "float8_e4m3fn", (128, 64), marks=slow),
        pytest.param([70, 0, 50], 0, "int8", (None, 1), marks=slow),
    ],
)
def test_ragged_groups_match_the_reference_and_padding_is_zero(
    sizes: list[int], padding: int, format: Format | None, block: tuple[int | None, int]
) -> None:
    weights: Array | QuantizedArray = random_weight((len(sizes), 128, 64)).astype(jnp.bfloat16)
    exact: Array | QuantizedArray = weights.astype(jnp.float32)
    if format is not None:
        exact = weights = quantize(weights, format, block=block)
    x = inputs(sum(sizes) + padding, 128, "bfloat16").at[sum(sizes) :].set(jnp.nan)
    group_sizes = jnp.array(sizes, jnp.int32)
    expected = grouped_matmul.grouped_matmul(
        x.astype(jnp.float32), exact, group_sizes, backend=REFERENCE
    )
    out = grouped_matmul.grouped_matmul(x, weights, group_sizes, backend=GPU)
    assert not np.any(np.asarray(out[sum(sizes) :], np.float32)), "padding is not zero"
    if any(sizes):
        assert error(out, np.asarray(expected, np.float64)) < TOLERANCE["bfloat16"]


def test_another_experts_weights_are_seen() -> None:
    weights = quantize(random_weight((2, 128, 64)), "int8")
    x, right, wrong = inputs(6, 128, "bfloat16"), jnp.array([2, 4]), jnp.array([4, 2])
    expected = grouped_matmul.grouped_matmul(
        x.astype(jnp.float32), weights, right, backend=REFERENCE
    )
    out = grouped_matmul.grouped_matmul(x, weights, wrong, backend=GPU)
    same = np.array([0, 1, 4, 5])
    assert error(out[same], np.asarray(expected[same], np.float64)) < TOLERANCE["bfloat16"]
    assert error(out[2:4], np.asarray(expected[2:4], np.float64)) > 0.1


@pytest.mark.parametrize(
    ("sizes", "padding"),
    [
        ([3, 0, 14, 1], 5),
        ([0, 0, 0], 9),
        ([0, 64, 0], 0),
        ([1] * 20, 0),
        ([17], 40),
        ([0, 8, 8], 0),
    ],
)
def test_every_row_is_found_where_its_visit_left_it(sizes: list[int], padding: int) -> None:
    T, columns = sum(sizes) + padding, 8
    x = jnp.arange(T, dtype=jnp.float32)[:, None]
    plan = jax.jit(plan_row_visits, static_argnames="columns")
    visits, visit_of_row, place = plan(x, jnp.array(sizes, jnp.int32), columns=columns)
    used = slice(0, sum(sizes))
    np.testing.assert_array_equal(visits.x[visit_of_row, place][used], x[used])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(visits.experts[visit_of_row][used], owner)
    assert int(visits.num_visits[0]) == sum(-(-size // columns) for size in sizes)
    assert int(visits.num_visits[0]) <= visits.experts.shape[0]


# What is refused, and tiles.


def test_a_step_stays_inside_a_block_of_scales_and_shared_memory() -> None:
    for format in ("int8", "int4", "float8_e4m3fn"):
        for block in [(None, 1), (32, 1), (64, 1), (128, 64), (128, 128), (256, 1)]:
            for num_rows in (1, 16, 32, 64, 256):
                make = functools.partial(quantize, format=format, block=block)
                shape = jax.ShapeDtypeStruct((1, 4096, 14336), jnp.float32)
                weights = jax.eval_shape(make, shape)
                if why_not(weights, chip=H100) is not None:
                    continue
                tile = make_tile(weights, num_rows=num_rows)
                assert (block[0] or 4096) % tile.product == 0
                assert tile.inputs % tile.product == 0
                assert block[1] == 1 or block[1] % tile.channels == 0
                assert 4096 // tile.inputs % tile.num_splits == 0
                assert smem_bytes(tile, format) <= 232_448 // (2 if tile.warpgroups == 1 else 1)


def smem_bytes(tile: Tile, format: Format) -> int:
    weights = tile.inputs * tile.channels * tile.warpgroups
    stored = weights // 2 if format == "int4" else weights
    stage = stored + 2 * tile.inputs * tile.columns
    return tile.num_stages * stage + 2 * weights + 1024


def test_many_rows_float32_and_dynamic_activations_are_refused_and_go_to_xla() -> None:
    weight = quantize(random_weight((128, 64)), "int8")
    for x, reason in [
        (inputs(257, 128, "bfloat16"), "257 rows"),
        (inputs(4, 128), "x of float32"),
    ]:
        with pytest.raises(BackendRefused, match=reason):
            quantized_matmul(x, weight, backend=GPU)
        chosen, reasons = choose_matmul_backend("auto", weight, chip=H100, x=x)
        assert chosen.name == "xla"
        assert reason in reasons["gpu"]
    x = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)
    assert choose_matmul_backend("auto", weight, chip=H100, x=x)[0].name == "gpu"
    with pytest.raises(BackendRefused, match="8 bits by 8 bits"):
        choose_matmul_backend("gpu", weight, chip=H100, x=x, activations="dynamic")


def test_groups_of_float32_are_refused_and_many_rows_are_not() -> None:
    weights = quantize(random_weight((2, 128, 64)), "int8")
    many = jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16)
    choose = grouped_matmul.choose_grouped_backend
    assert choose("auto", weights, chip=H100, x=many)[0].name == "gpu"
    chosen, reasons = choose("auto", weights, chip=H100, x=inputs(4, 128))
    assert chosen.name == "xla"
    assert "float32" in reasons["gpu"]


@pytest.mark.parametrize(
    ("format", "block", "shape", "reason"),
    [
        ("int8", (None, 1), (96, 64), "96 inputs are not a multiple of 128"),
        ("int8", (None, 1), (128, 80), "80 outputs of 64"),
        ("int8", (16, 1), (128, 64), "blocks of 16 inputs"),
        ("int4", (32, 1), (128, 64), "no multiple of 64"),
        ("int8", (128, 32), (128, 64), "blocks of 32 outputs"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_with_a_reason(
    format: Format, block: tuple[int | None, int], shape: tuple[int, int], reason: str
) -> None:
    weight = quantize(random_weight(shape), format, block=block)
    assert reason in str(why_not(weight, chip=H100))


def test_other_chips_and_experts_with_zero_points_are_refused() -> None:
    assert "9.0" in str(why_not(quantize(random_weight((128, 64)), "int8"), chip=A100))
    experts = quantize(random_weight((2, 128, 64)), "int4", block=(64, 1), zeros=True)
    assert "zero points" in str(why_not(experts, chip=H100))

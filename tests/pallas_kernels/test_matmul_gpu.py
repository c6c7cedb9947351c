"""The Hopper kernel of quantized and grouped matmul, in Mosaic GPU's interpreter."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels import quantized_matmul_gpu
from pallas_kernels.backend import REFERENCE, XLA, Backend
from pallas_kernels.chips import Chip
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul_gpu import plan_row_visits
from pallas_kernels.quantized import Format, QuantizedArray, quantize
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.quantized_matmul_gpu import Tile, make_tile, why_not
from tests.pallas_kernels.test_quantized_matmul import error, inputs, random_weight

H100 = Chip(platform="gpu", kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
A100 = Chip(platform="gpu", kind="NVIDIA A100-SXM4-40GB", compute_capability="8.0")
GPU = Backend(name="gpu", chip=H100, interpret=True)
TOLERANCE = 4e-3


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_matmul_gpu, "_BLOCKS_WANTED", 2)  # each is interpreted


@pytest.mark.parametrize(
    ("format", "block", "zeros", "T", "D", "F"),
    [
        ("int8", (None, 1), False, 5, 2048, 64),  # in shares of the inputs
        ("float8_e4m3fn", (128, 128), False, 9, 256, 256),
        ("float8_e5m2", (64, 1), False, 8, 128, 64),
        ("int4", (128, 1), True, 3, 256, 128),
        ("int4", (None, 1), False, 70, 128, 64),  # two visits
    ],
)
def test_the_kernel_matches_the_reference(
    format: Format, block: tuple[int | None, int], zeros: bool, T: int, D: int, F: int
) -> None:
    weight = quantize(random_weight((D, F)) + 0.5 * zeros, format, block=block, zeros=zeros)
    x = inputs(T, D, "bfloat16")
    expected = quantized_matmul(x.astype(jnp.float32), weight, backend=REFERENCE)
    out = quantized_matmul(x, weight, backend=GPU)
    assert out.dtype == x.dtype
    assert error(out, np.asarray(expected, np.float64)) < TOLERANCE


def test_a_huge_activation_does_not_overflow_float16() -> None:
    weight = quantize(random_weight((128, 64)), "float8_e4m3fn")
    x = inputs(4, 128, "bfloat16").at[1, 5].set(3e5)
    expected = quantized_matmul(x.astype(jnp.float32), weight, backend=REFERENCE)
    out = quantized_matmul(x, weight, backend=GPU)
    for row in range(4):
        assert error(out[row], np.asarray(expected[row], np.float64)) < TOLERANCE


@pytest.mark.parametrize(
    ("sizes", "padding", "format", "block"),
    [
        ([3, 0, 14, 1], 5, None, (None, 1)),
        ([0, 20, 0], 0, "int8", (None, 1)),
        ([0, 3, 9, 2], 4, "int4", (64, 1)),
        ([2, 0, 11], 3, "float8_e4m3fn", (128, 64)),
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
    expected = grouped_matmul(x.astype(jnp.float32), exact, group_sizes, backend=REFERENCE)
    out = grouped_matmul(x, weights, group_sizes, backend=GPU)
    assert not np.any(np.asarray(out[sum(sizes) :], np.float32)), "padding is not zero"
    assert error(out, np.asarray(expected, np.float64)) < TOLERANCE


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
    visits, visit_of_row, place = plan_row_visits(x, jnp.array(sizes, jnp.int32), columns=columns)
    used = slice(0, sum(sizes))
    np.testing.assert_array_equal(visits.x[visit_of_row, place][used], x[used])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(visits.experts[visit_of_row][used], owner)
    assert int(visits.num_visits[0]) == sum(-(-size // columns) for size in sizes)
    assert int(visits.num_visits[0]) <= visits.experts.shape[0]


def test_many_rows_and_float32_are_left_to_cublas() -> None:
    weight = quantize(random_weight((128, 64)), "int8")
    for x in (inputs(300, 128, "bfloat16"), inputs(4, 128)):
        out = quantized_matmul(x, weight, backend=GPU)
        np.testing.assert_array_equal(out, quantized_matmul(x, weight, backend=XLA))


def test_a_step_stays_inside_a_block_of_scales() -> None:
    for block in [(32, 1), (64, 1), (128, 64), (128, 128)]:
        weights = quantize(random_weight((1, 512, 256)), "int8", block=block)
        tile: Tile = make_tile(weights, num_rows=8, max_visits=1)
        assert block[0] % tile.inputs == 0
        assert block[1] == 1 or block[1] % tile.channels == 0
        assert 512 // tile.inputs % tile.num_splits == 0


def test_what_the_kernel_cannot_take_is_refused_with_a_reason() -> None:
    weight = quantize(random_weight((128, 64)), "int8")
    assert "9.0" in str(why_not(weight, chip=A100))
    assert why_not(weight, chip=H100) is None
    assert "multiple" in str(why_not(quantize(random_weight((96, 64)), "int8"), chip=H100))
    experts = quantize(random_weight((2, 128, 64)), "int4", block=(64, 1), zeros=True)
    assert "zero points" in str(why_not(experts, chip=H100))

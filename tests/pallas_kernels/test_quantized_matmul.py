"""quantized_matmul: each backend against float64 numpy, and what quantization itself promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array

from pallas_kernels.backend import REFERENCE, XLA, Backend, BackendRefused
from pallas_kernels.chips import Chip
from pallas_kernels.matmul_cases import MATMUL_CASES
from pallas_kernels.quantized import (
    FORMATS,
    Format,
    QuantizedArray,
    dequantize,
    pack_int4,
    quantize,
    unpack_int4,
)
from pallas_kernels.quantized_matmul import (
    choose_matmul_backend,
    quantized_matmul,
    why_not,
)

V5E = Chip(platform="tpu", kind="TPU v5 lite")
H100 = Chip(platform="gpu", kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
TOLERANCE = {"float32": 2e-6, "bfloat16": 5e-3}
# The largest relative error of a rounded value: half a step of the coarsest one.
STEP = {"int8": 1 / 254, "float8_e4m3fn": 1 / 16, "float8_e5m2": 1 / 8, "int4": 1 / 14}


def random_weight(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Gaussian, with channels and blocks of very different size: a wrong scale cannot hide."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:-2], 1, shape[-1])))
    return jnp.asarray(weight * np.exp(rng.standard_normal((*shape[:-1], 1))), jnp.float32)


def numpy_dequantize(weight: QuantizedArray) -> np.ndarray:
    """Element by element, by the definition; float64."""
    values = np.asarray(weight.values)
    if weight.format == "int4":
        nibbles = np.zeros((2 * values.shape[0], values.shape[1]), np.int32)
        nibbles[0::2], nibbles[1::2] = values & 15, values >> 4
        values = np.where(nibbles > 7, nibbles - 16, nibbles)
    row = np.arange(weight.in_dim)[:, None] // weight.block_rows
    column = np.arange(weight.out_dim)[None, :] // weight.block[1]
    scales = np.asarray(weight.scales, np.float64)[row, column]
    zeros = 0.0 if weight.zeros is None else np.asarray(weight.zeros, np.float64)[row, column]
    return (values.astype(np.float64) - zeros) * scales


def error(out: Array, expected: np.ndarray) -> float:
    out64 = np.asarray(out, np.float64)
    return float(np.linalg.norm(out64 - expected) / np.linalg.norm(expected))


def inputs(T: int, D: int, dtype: str = "float32", seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((T, D)) * 3.0, dtype)


BLOCKS: list[tuple[int | None, int]] = [(None, 1), (32, 1), (64, 1), (128, 1), (128, 128)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_format_and_block_matches_numpy(
    format: Format, block: tuple[int | None, int]
) -> None:
    weight = quantize(random_weight((256, 200)), format, block=block)
    for backend, dtype in [(REFERENCE, "float32"), (XLA, "float32"), (XLA, "bfloat16")]:
        x = inputs(5, 256, dtype)
        out = quantized_matmul(x, weight, backend=backend)
        assert out.dtype == x.dtype
        expected = np.asarray(x, np.float64) @ numpy_dequantize(weight)
        assert error(out, expected) < TOLERANCE[dtype], backend


@pytest.mark.parametrize("backend", [REFERENCE, XLA], ids=lambda backend: backend.name)
@pytest.mark.parametrize("block", [(None, 1), (32, 1)])
def test_zero_points_match_numpy(backend: Backend, block: tuple[int | None, int]) -> None:
    weight = quantize(random_weight((128, 96)) + 0.7, "int4", block=block, zeros=True)
    x = inputs(9, 128)
    expected = np.asarray(x, np.float64) @ numpy_dequantize(weight)
    assert error(quantized_matmul(x, weight, backend=backend), expected) < 2e-6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", [(None, 1), (64, 1), (128, 128)])
def test_dynamic_activations_match_the_reference_and_stay_near_the_exact_product(
    format: Format, block: tuple[int | None, int]
) -> None:
    weight = quantize(random_weight((256, 128)), format, block=block)
    x = inputs(6, 256)
    expected = quantized_matmul(x, weight, backend=REFERENCE, activations="dynamic")
    out = quantized_matmul(x, weight, backend=XLA, activations="dynamic")
    assert error(out, np.asarray(expected, np.float64)) < 1e-6
    exact = np.asarray(x, np.float64) @ numpy_dequantize(weight)
    assert 1e-4 < error(out, exact) < (0.02 if format in ("int8", "int4") else 0.04)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_value_is_off_by_at_most_half_a_step(
    format: Format, block: tuple[int | None, int]
) -> None:
    original = random_weight((256, 256), seed=3)
    restored = dequantize(quantize(original, format, block=block))
    rows, columns = block[0] or 256, block[1]
    tiles = np.asarray(original).reshape(256 // rows, rows, 256 // columns, columns)
    largest = np.abs(tiles).max((1, 3), keepdims=True)
    off = np.abs(np.asarray(restored).reshape(tiles.shape) - tiles)
    assert np.all(off <= largest * STEP[format] * (1 + 1e-5))


def test_zero_points_halve_the_step_of_a_one_sided_block() -> None:
    original = jnp.abs(random_weight((128, 64)))
    plain = error(dequantize(quantize(original, "int4", block=(32, 1))), np.asarray(original))
    shifted = quantize(original, "int4", block=(32, 1), zeros=True)
    assert error(dequantize(shifted), np.asarray(original)) < 0.6 * plain


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_int4_packing_round_trips(values: list[int], columns: int) -> None:
    array = np.resize(np.array(values, np.int8), (2 * len(values), columns))
    packed = pack_int4(jnp.asarray(array))
    assert packed.shape == (len(values), columns)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack_int4(packed), array)


def test_the_even_row_is_in_the_low_nibble() -> None:
    packed = pack_int4(jnp.array([[1], [-2]]))
    assert int(packed[0, 0]) == 0xE1


@given(
    st.sampled_from(FORMATS),
    st.integers(1, 70),
    st.integers(1, 9).map(lambda n: 32 * n),
    st.integers(1, 300),
    st.sampled_from(BLOCKS),
)
@settings(max_examples=8, deadline=None)
def test_xla_matches_the_reference_for_any_shape(
    format: Format, T: int, D: int, F: int, block: tuple[int | None, int]
) -> None:
    weight = quantize(random_weight((D, F), seed=F), format, block=block)
    x = inputs(T, D)
    expected = quantized_matmul(x, weight, backend=REFERENCE)
    assert error(quantized_matmul(x, weight, backend=XLA), np.asarray(expected)) < 2e-6


def test_a_row_that_is_not_finite_spoils_only_itself() -> None:
    weight = quantize(random_weight((64, 32)), "int8")
    x = inputs(4, 64).at[2].set(jnp.nan)
    for activations in ("keep", "dynamic"):
        clean = quantized_matmul(inputs(4, 64), weight, backend=XLA, activations=activations)
        out = quantized_matmul(x, weight, backend=XLA, activations=activations)
        keep = np.array([0, 1, 3])
        np.testing.assert_array_equal(out[keep], clean[keep])


def test_a_swapped_scale_block_is_seen() -> None:
    weight = quantize(random_weight((256, 64)), "int8", block=(128, 1))
    wrong = dataclasses.replace(weight, scales=weight.scales[::-1])
    x = inputs(4, 256)
    expected = np.asarray(x, np.float64) @ numpy_dequantize(weight)
    assert error(quantized_matmul(x, wrong, backend=XLA), expected) > 0.1


def test_a_block_of_zeros_stays_zero() -> None:
    for format in FORMATS:
        weight = quantize(jnp.zeros((64, 16)), format, block=(32, 1))
        out = quantized_matmul(inputs(3, 64), weight, backend=XLA)
        np.testing.assert_array_equal(out, 0)


def test_a_quantized_array_passes_through_jit_and_scan() -> None:
    layers = quantize(random_weight((3, 64, 64)), "int4", block=(32, 1), zeros=True)
    x = inputs(2, 64)

    @jax.jit
    def run(x: Array, layers: QuantizedArray) -> Array:
        def layer(x: Array, weight: QuantizedArray) -> tuple[Array, None]:
            return jnp.tanh(quantized_matmul(x, weight, backend=XLA)), None

        return jax.lax.scan(layer, x, layers)[0]

    expected = x
    for index in range(3):
        weight = jax.tree.map(lambda part: part[index], layers)  # noqa: B023
        expected = jnp.tanh(quantized_matmul(expected, weight, backend=REFERENCE))
    assert error(run(x, layers), np.asarray(expected)) < 1e-4


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight = quantize(random_weight((64, 32)), "int8")
    with pytest.raises(ValueError, match="expected .T, D. by .D, F."):
        quantized_matmul(inputs(2, 32), weight, backend=XLA)
    wrong = dataclasses.replace(weight, scales=weight.scales[:, :-1])
    with pytest.raises(ValueError, match="scales"):
        quantized_matmul(inputs(2, 64), wrong, backend=XLA)
    with pytest.raises(ValueError, match="zero points are for int4"):
        quantize(random_weight((64, 32)), "int8", zeros=True)
    with pytest.raises(ValueError, match="pairs of rows"):
        quantize(random_weight((63, 32)), "int4")
    with pytest.raises(ValueError, match="expected bfloat16"):
        quantized_matmul(jnp.ones((2, 64), jnp.int32), weight, backend=XLA)


def test_a_backend_refuses_the_wrong_chip_with_its_reason() -> None:
    weight = quantize(random_weight((64, 32)), "int8")
    with pytest.raises(BackendRefused, match="needs a TPU"):
        quantized_matmul(inputs(2, 64), weight, backend=Backend(name="tpu", chip=H100))
    assert "needs a GPU" in str(why_not("gpu", weight, chip=V5E))
    with pytest.raises(BackendRefused, match="no matmul backend"):
        why_not("cuda", weight, chip=V5E)
    chosen, reasons = choose_matmul_backend("auto", weight, chip=Chip(platform="cpu", kind="cpu"))
    assert chosen.name == "xla"
    assert set(reasons) == {"tpu", "gpu"}


@pytest.mark.parametrize("name", list(MATMUL_CASES))
def test_the_case_table_holds_weights_that_fit_together(name: str) -> None:
    case = MATMUL_CASES[name]
    format = case.format
    if format is not None:
        lead = () if case.num_experts is None else (case.num_experts,)
        shape = jax.ShapeDtypeStruct((*lead, case.in_dim, case.out_dim), jnp.float32)
        weight = jax.eval_shape(
            lambda w: quantize(w, format, block=case.block, zeros=case.zeros),
            shape,
        )
        weight.check()
        assert weight.shape == shape.shape

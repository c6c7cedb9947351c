"""grouped_matmul: each backend against float64 numpy, one expert at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array

from pallas_kernels.backend import REFERENCE, XLA, Backend, BackendRefused
from pallas_kernels.chips import Chip
from pallas_kernels.grouped_matmul import choose_grouped_backend, grouped_matmul
from pallas_kernels.quantized import FORMATS, Format, QuantizedArray, dequantize, quantize

H100 = Chip(platform="gpu", kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
TOLERANCE = {"float32": 3e-6, "bfloat16": 6e-3}

GROUPS = {
    "even": [8, 8, 8, 8],
    "empty groups": [0, 11, 0, 0, 5, 0],
    "crossing tiles": [3, 14, 1, 30, 9],
    "all in the first": [40, 0, 0],
    "all in the last": [0, 0, 0, 40],
    "one row each": [1] * 20,
    "none at all": [0, 0, 0],
    "large": [300, 0, 17, 260],
}


def make(
    sizes: list[int], *, padding: int, D: int = 96, F: int = 80, dtype: str = "float32"
) -> tuple[Array, Array, Array]:
    """x with NaN in its padding rows, weights of very different size, group sizes."""
    rng = np.random.default_rng(sum(sizes) + len(sizes))
    E = len(sizes)
    x = rng.standard_normal((sum(sizes) + padding, D))
    x[sum(sizes) :] = np.nan
    weights = rng.standard_normal((E, D, F)) * np.exp(rng.standard_normal((E, 1, F)))
    return jnp.asarray(x, dtype), jnp.asarray(weights, dtype), jnp.array(sizes, jnp.int32)


def oracle(x: Array, weights: Array, sizes: list[int]) -> np.ndarray:
    out = np.zeros((x.shape[0], weights.shape[-1]))
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = np.asarray(x[rows], np.float64) @ np.asarray(weights[expert], np.float64)
        start += size
    return out


def check(
    x: Array,
    weights: Array | QuantizedArray,
    sizes: list[int],
    backend: Backend,
    tolerance: float | None = None,
) -> None:
    dense = dequantize(weights) if isinstance(weights, QuantizedArray) else weights
    expected = oracle(x, dense, sizes)
    out = grouped_matmul(x, weights, jnp.array(sizes, jnp.int32), backend=backend)
    assert out.dtype == x.dtype
    out64 = np.asarray(out, np.float64)
    assert not np.any(out64[sum(sizes) :]), "padding is not zero"
    scale = max(float(np.linalg.norm(expected)), 1e-30)
    limit = TOLERANCE[x.dtype.name] if tolerance is None else tolerance
    assert float(np.linalg.norm(out64 - expected)) / scale < limit


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS.keys())
def test_ragged_groups_match_numpy(sizes: list[int]) -> None:
    for backend, dtype, padding in [
        (REFERENCE, "float32", 7),
        (XLA, "float32", 40),
        (XLA, "bfloat16", 0),
    ]:
        x, weights, _ = make(sizes, padding=padding, dtype=dtype)
        check(x, weights, sizes, backend)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", [(None, 1), (32, 1), (64, 64)])
@pytest.mark.parametrize("backend", [REFERENCE, XLA], ids=lambda backend: backend.name)
def test_quantized_experts_match_numpy(
    format: Format, block: tuple[int | None, int], backend: Backend
) -> None:
    sizes = [3, 0, 14, 1, 30, 9]
    x, weights, _ = make(sizes, padding=5)
    check(x, quantize(weights, format, block=block), sizes, backend)


def test_experts_with_zero_points_match_numpy() -> None:
    sizes = [3, 0, 14, 1]
    x, weights, _ = make(sizes, padding=5)
    for backend in (REFERENCE, XLA):
        check(x, quantize(weights + 0.4, "int4", block=(32, 1), zeros=True), sizes, backend)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(0, 20))
@settings(max_examples=8, deadline=None)
def test_xla_matches_numpy_for_any_groups(sizes: list[int], padding: int) -> None:
    x, weights, _ = make(sizes, padding=padding, D=16, F=24)
    check(x, weights, sizes, XLA)


def test_xla_makes_nothing_as_large_as_every_token_by_every_expert() -> None:
    T, E, D, F = 256, 64, 128, 256
    shapes = (
        jax.ShapeDtypeStruct((T, D), jnp.float32),
        jax.ShapeDtypeStruct((E, D, F), jnp.float32),
        jax.ShapeDtypeStruct((E,), jnp.int32),
    )
    run = jax.jit(lambda x, w, sizes: grouped_matmul(x, w, sizes, backend=XLA))
    memory = run.lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * T * F * 4  # [E, T, F] would be 64 * T * F * 4


def test_swapped_experts_are_seen() -> None:
    sizes = [5, 6]
    x, weights, group_sizes = make(sizes, padding=0)
    out = grouped_matmul(x, weights[::-1], group_sizes, backend=XLA)
    expected = oracle(x, weights, sizes)
    assert np.linalg.norm(out - expected) / np.linalg.norm(expected) > 0.5


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weights, sizes = make([4, 4], padding=0)
    with pytest.raises(ValueError, match="expected int32"):
        grouped_matmul(x, weights, sizes[:1], backend=XLA)
    with pytest.raises(ValueError, match="expected .T, D. by"):
        grouped_matmul(x[:, 1:], weights, sizes, backend=XLA)
    with pytest.raises(ValueError, match="expected the same"):
        grouped_matmul(x.astype(jnp.bfloat16), weights, sizes, backend=XLA)
    with pytest.raises(BackendRefused, match="needs a TPU"):
        grouped_matmul(x, weights, sizes, backend=Backend(name="tpu", chip=H100))
    chosen, reasons = choose_grouped_backend("auto", weights, chip=Chip(platform="cpu", kind="cpu"))
    assert chosen.name == "xla"
    assert set(reasons) == {"tpu", "gpu"}

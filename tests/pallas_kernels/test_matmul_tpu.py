"""The TPU kernels of quantized and grouped matmul, in the interpreter with races looked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels import grouped_matmul_tpu
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.chips import Chip
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul_tpu import Visits, plan_visits
from pallas_kernels.matmul_cases import MATMUL_CASES
from pallas_kernels.quantized import Format, quantize
from pallas_kernels.quantized_matmul import Activations, quantized_matmul
from pallas_kernels.quantized_matmul_tpu import activation_terms, make_plan, why_not
from tests.pallas_kernels.test_quantized_matmul import error, inputs, random_weight

CHIPS = {
    "v5e": Chip(platform="tpu", kind="TPU v5 lite"),
    "v5p": Chip(platform="tpu", kind="TPU v5"),
    "v6e": Chip(platform="tpu", kind="TPU v6 lite"),
    "tpu7x": Chip(platform="tpu", kind="TPU7x"),
}
TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-3}


def tpu(generation: str) -> Backend:
    return Backend(name="tpu", chip=CHIPS[generation], interpret=True)


@pytest.mark.parametrize(
    ("generation", "format", "block", "zeros", "T", "D", "F", "dtype"),
    [
        ("v5e", "int8", (None, 1), False, 5, 256, 384, "bfloat16"),
        ("v5e", "int8", (None, 1), False, 1, 1152, 640, "float32"),
        ("v5e", "int8", (32, 1), False, 5, 256, 256, "bfloat16"),
        ("v5e", "int4", (None, 1), True, 5, 512, 256, "bfloat16"),
        ("v5e", "int4", (128, 1), True, 5, 512, 384, "float32"),
        ("v5e", "float8_e4m3fn", (64, 128), False, 40, 256, 256, "bfloat16"),
        ("v5p", "int8", (None, 1), False, 9, 512, 300, "bfloat16"),
        ("v6e", "int4", (128, 1), True, 5, 512, 384, "bfloat16"),
        ("v6e", "int4", (32, 1), False, 5, 512, 128, "bfloat16"),
        ("v6e", "float8_e4m3fn", (128, 128), False, 5, 512, 576, "bfloat16"),
        ("tpu7x", "float8_e5m2", (128, 1), False, 40, 512, 300, "bfloat16"),
        ("tpu7x", "int4", (None, 1), False, 300, 512, 80, "bfloat16"),
        ("tpu7x", "int4", (256, 1), False, 7, 512, 256, "bfloat16"),
    ],
)
def test_the_kernel_matches_the_reference(
    generation: str,
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
    out = quantized_matmul(x, weight, backend=tpu(generation))
    assert out.dtype == x.dtype
    assert error(out, np.asarray(expected, np.float64)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("generation", "format", "block"),
    [
        ("v5e", "int8", (None, 1)),
        ("v6e", "int4", (128, 1)),
        ("tpu7x", "float8_e4m3fn", (128, 128)),
    ],
)
def test_dynamic_activations_match_the_reference(
    generation: str, format: Format, block: tuple[int | None, int]
) -> None:
    weight = quantize(random_weight((256, 256)), format, block=block)
    x = inputs(6, 256)
    activations: Activations = "dynamic"
    expected = quantized_matmul(x, weight, backend=REFERENCE, activations=activations)
    out = quantized_matmul(x, weight, backend=tpu(generation), activations=activations)
    assert error(out, np.asarray(expected, np.float64)) < 1e-6


@pytest.mark.parametrize(
    ("generation", "format", "limit"),
    [("tpu7x", "float8_e4m3fn", 2**-8), ("v6e", "int4", 2**-20)],
)
def test_terms_hold_as_much_of_x_as_bfloat16_even_beside_a_huge_value(
    generation: str, format: Format, limit: float
) -> None:
    x = inputs(8, 256).at[:, 3].set(3000.0).astype(jnp.bfloat16)
    weight = quantize(random_weight((256, 256)), format)
    plan = make_plan(weight, num_rows=8, chip=CHIPS[generation], dtype=x.dtype)
    assert plan.terms > 1
    values, scales = activation_terms(x, plan)
    restored = (values.astype(jnp.float32) * scales).reshape(plan.terms, 8, 256).sum(0)
    off = np.abs(restored - x.astype(jnp.float32))
    if plan.operand == "int8":
        assert np.all(off <= 3000.0 * limit)
    else:
        assert np.all(off <= limit * np.abs(x.astype(jnp.float32)) + 3000.0 * 2**-20)


GROUPS = [
    ([8, 8, 8, 8], 0),
    ([0, 11, 0, 0, 5, 0], 50),
    ([3, 34, 1, 30, 9], 3),
    ([70, 0, 0], 0),
    ([0, 0, 70], 26),
    ([0, 0, 0], 40),
    ([32, 0, 64], 32),
]


@pytest.mark.parametrize(("sizes", "padding"), GROUPS)
def test_ragged_groups_match_the_reference_and_padding_is_zero(
    sizes: list[int], padding: int
) -> None:
    x = inputs(sum(sizes) + padding, 128).at[sum(sizes) :].set(jnp.nan)
    check_groups(x, random_weight((len(sizes), 128, 160)), sizes, tpu("v5e"))


@pytest.mark.parametrize(
    ("generation", "format", "block", "zeros"),
    [
        ("v5e", "int8", (None, 1), False),
        ("v5e", "int4", (32, 1), False),
        ("v6e", "float8_e4m3fn", (128, 128), False),
        ("v6e", "int4", (128, 1), True),
        ("tpu7x", "int4", (None, 1), False),
        ("v5p", "float8_e4m3fn", (None, 1), False),
    ],
)
def test_quantized_experts_match_the_reference(
    generation: str, format: Format, block: tuple[int | None, int], zeros: bool
) -> None:
    sizes = [3, 14, 0, 1, 30, 9]
    weights = quantize(random_weight((6, 256, 256)), format, block=block, zeros=zeros)
    x = inputs(sum(sizes) + 60, 256, "bfloat16").at[sum(sizes) :].set(jnp.nan)
    check_groups(x, weights, sizes, tpu(generation))


def check_groups(x: Array, weights: object, sizes: list[int], backend: Backend) -> None:
    group_sizes = jnp.array(sizes, jnp.int32)
    exact = grouped_matmul(
        x.astype(jnp.float32),
        weights,  # pyright: ignore[reportArgumentType]
        group_sizes,
        backend=REFERENCE,
    )
    out = grouped_matmul(x, weights, group_sizes, backend=backend)  # pyright: ignore[reportArgumentType]
    assert not np.any(np.asarray(out[sum(sizes) :], np.float32)), "padding is not zero"
    if sum(sizes):
        assert error(out, np.asarray(exact, np.float64)) < TOLERANCE[x.dtype.name]


@pytest.mark.parametrize(("sizes", "padding"), GROUPS)
def test_visits_cover_each_row_of_each_group_once(sizes: list[int], padding: int) -> None:
    rows, num_tiles = 16, -(-(sum(sizes) + padding) // 16)
    visits = plan_visits(jnp.array(sizes, jnp.int32), rows=rows, num_tiles=num_tiles)
    count = int(visits.num_visits)
    assert count <= num_tiles + len(sizes) - 1
    owner = np.full(num_tiles * rows, -1)
    for visit in range(count):
        tile = int(visits.tiles[visit])
        low = max(int(visits.starts[visit]), tile * rows)
        high = min(int(visits.ends[visit]), (tile + 1) * rows)
        assert np.all(owner[low:high] == -1)
        owner[low:high] = int(visits.experts[visit])
    expected = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(owner[: sum(sizes)], expected)
    assert np.all(owner[sum(sizes) :] == -1)
    assert set(visits.tiles[:count].tolist()) == set(range(num_tiles))
    assert np.all(np.diff(visits.tiles[:count]) >= 0), "a tile is left and come back to"


def test_a_visit_of_the_wrong_expert_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Array, **kwargs: int) -> Visits:
        visits = plan_visits(*args, **kwargs)
        return visits._replace(experts=jnp.maximum(visits.experts - 1, 0))

    monkeypatch.setattr(grouped_matmul_tpu, "plan_visits", wrong)
    sizes = [3, 34, 1]
    x = inputs(sum(sizes), 128)
    with pytest.raises(AssertionError):
        check_groups(x, random_weight((3, 128, 128)), sizes, tpu("v5e"))


def test_a_scale_of_the_wrong_block_is_seen() -> None:
    weight = quantize(random_weight((256, 128)), "float8_e4m3fn", block=(128, 128))
    wrong = dataclasses.replace(weight, scales=weight.scales[::-1])
    x = inputs(4, 256, "bfloat16")
    expected = quantized_matmul(x, weight, backend=REFERENCE)
    out = quantized_matmul(x, wrong, backend=tpu("v6e"))
    assert error(out, np.asarray(expected, np.float64)) > 0.1


@pytest.mark.parametrize("name", list(MATMUL_CASES))
@pytest.mark.parametrize("generation", list(CHIPS))
def test_every_case_has_a_plan_that_fits(name: str, generation: str) -> None:
    case = MATMUL_CASES[name]
    format = case.format
    lead = () if case.num_experts is None else (case.num_experts,)
    weight = jax.ShapeDtypeStruct((*lead, case.in_dim, case.out_dim), jnp.bfloat16)
    if format is not None:
        weight = jax.eval_shape(
            lambda w: quantize(w, format, block=case.block, zeros=case.zeros), weight
        )
    assert why_not(weight, chip=CHIPS[generation]) is None  # pyright: ignore[reportArgumentType]
    plan = make_plan(
        weight,  # pyright: ignore[reportArgumentType]
        num_rows=8,
        chip=CHIPS[generation],
        dtype=jnp.bfloat16,
    )
    width = {None: 2.0, "int4": 0.5}.get(format, 1.0)
    assert plan.columns % 128 == 0
    assert case.in_dim * plan.columns * width <= 4 << 20


def test_shapes_no_strip_can_be_cut_from_are_refused() -> None:
    assert "multiple of 128" in str(why_not(jnp.ones((100, 128)), chip=CHIPS["v5e"]))
    odd = quantize(random_weight((384, 128)), "int4")
    assert "multiple of 256" in str(why_not(odd, chip=CHIPS["v5e"]))
    small = quantize(random_weight((256, 128)), "int8", block=(16, 1))
    assert "blocks of 16" in str(why_not(small, chip=CHIPS["v5e"]))

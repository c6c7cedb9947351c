"""Angles of each kind of rope equal plain formulas in float64; rotations, complex products."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.rope import RopeSpec, angles, rotate, yarn_mscale


def plain_frequencies(dim: int, theta: float) -> list[float]:
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def yarn_frequencies(spec: RopeSpec) -> list[float]:
    """Pair by pair, as the paper's section 3.2 has it, with transformers' rounding of the range."""
    found = []
    context = spec.original_max_position_embeddings
    turns = [
        spec.head_dim * math.log(context / (beta * 2 * math.pi)) / (2 * math.log(spec.theta))
        for beta in (spec.beta_fast, spec.beta_slow)
    ]
    if spec.truncate:
        turns = [math.floor(turns[0]), math.ceil(turns[1])]
    low, high = max(turns[0], 0), min(turns[1], spec.head_dim - 1)
    for i, base in enumerate(plain_frequencies(spec.head_dim, spec.theta)):
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        found.append(base * (1 - interpolated) + base / spec.factor * interpolated)
    return found


YARN = RopeSpec(
    head_dim=64,
    theta=10000.0,
    kind="yarn",
    factor=40.0,
    original_max_position_embeddings=4096,
    mscale=0.707,
    mscale_all_dim=0.5,
)
GPT_OSS = RopeSpec(
    head_dim=64,
    theta=150000.0,
    kind="yarn",
    factor=32.0,
    original_max_position_embeddings=4096,
    truncate=False,
)


@pytest.mark.parametrize("spec", [YARN, GPT_OSS], ids=["truncated", "exact"])
def test_yarn_interpolates_between_two_dimensions(spec: RopeSpec) -> None:
    np.testing.assert_allclose(spec.frequencies(), yarn_frequencies(spec), rtol=2e-6)


def test_yarns_amplitude_is_the_ratio_of_two_temperatures_if_both_are_given() -> None:
    top, bottom = 0.1 * 0.707 * math.log(40) + 1, 0.1 * 0.5 * math.log(40) + 1
    assert YARN.amplitude() == pytest.approx(top / bottom, rel=1e-12)
    assert GPT_OSS.amplitude() == pytest.approx(0.1 * math.log(32) + 1, rel=1e-12)
    assert yarn_mscale(40.0, 0.707) == pytest.approx(top, rel=1e-12)
    assert yarn_mscale(0.5) == 1.0


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_dynamic_is_default_within_the_trained_context(kind: str) -> None:
    spec = RopeSpec(head_dim=8, theta=500.0, kind=kind, factor=4.0)
    np.testing.assert_allclose(spec.frequencies(), plain_frequencies(8, 500.0), rtol=1e-6)
    assert spec.amplitude() == 1.0


LONGROPE = RopeSpec(
    head_dim=8,
    theta=10000.0,
    kind="longrope",
    factor=32.0,
    original_max_position_embeddings=4096,
    short_factor=(1.0, 1.1, 1.2, 1.3),
    long_factor=(1.0, 2.0, 16.0, 32.0),
)


@pytest.mark.parametrize(
    ("max_len", "factors"), [(4096, LONGROPE.short_factor), (4097, LONGROPE.long_factor)]
)
def test_longrope_divides_by_the_factors_of_the_longest_sequence(
    max_len: int, factors: tuple[float, ...]
) -> None:
    spec = LONGROPE.for_context(max_len)
    want = [f / by for f, by in zip(plain_frequencies(8, 10000.0), factors, strict=True)]
    np.testing.assert_allclose(spec.frequencies(), want, rtol=1e-6)
    assert spec.amplitude() == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_longropes_amplitude_may_be_given_for_short_and_for_long_contexts() -> None:
    spec = RopeSpec(
        head_dim=8,
        theta=10000.0,
        kind="longrope",
        attention_factor=1.25,
        long_attention_factor=1.5,
        original_max_position_embeddings=16,
    )
    assert spec.for_context(16).amplitude() == 1.25
    assert spec.for_context(17).amplitude() == 1.5
    assert YARN.for_context(1 << 20) == YARN


def test_a_kind_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="ntk"):
        RopeSpec(head_dim=8, theta=1.0, kind="ntk").frequencies()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("width", [8, 12])
def test_pairs_turn_as_complex_numbers_and_columns_beyond_them_stay(
    width: int, interleaved: bool
) -> None:
    spec = RopeSpec(head_dim=8, theta=100.0)
    positions = np.array([0, 1, 5, 17])
    x = np.random.default_rng(0).normal(size=(4, 3, width)).astype(np.float32)
    got = np.asarray(rotate(jnp.asarray(x), *angles(spec, jnp.asarray(positions)), interleaved))

    want = x.astype(np.float64)
    for i, frequency in enumerate(plain_frequencies(8, 100.0)):
        real, imaginary = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
        turn = np.exp(1j * positions * frequency)[:, None]
        product = (want[..., real] + 1j * want[..., imaginary]) * turn
        want[..., real], want[..., imaginary] = product.real, product.imag
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])

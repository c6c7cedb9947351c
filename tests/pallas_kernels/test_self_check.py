"""The check that a kernel must pass where it is first used."""

import jax.numpy as jnp
import pytest
from jax import Array

from pallas_kernels import attention
from pallas_kernels.attention_reference import attend_reference
from pallas_kernels.backend import INTERPRETED, REFERENCE, BackendRefused
from pallas_kernels.cases import attention_case
from pallas_kernels.self_check import self_check, tolerance, verify


@pytest.mark.parametrize(
    ("name", "dtype", "stored"),
    [
        ("tiny-sinks", "float32", "float32"),
        ("tiny-latent", "bfloat16", "int8"),
    ],
)
def test_a_right_implementation_passes(name: str, dtype: str, stored: str) -> None:
    spec = attention_case(name, dtype=stored)
    found = self_check(spec, REFERENCE, dtype=dtype)
    assert found < tolerance(dtype)
    assert verify(spec, REFERENCE, dtype=dtype) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("llama-3.1-8b/tp8", "float8_e4m3fn"),  # decode and prefill kernels
        ("gemma-3-270m", "float8_e4m3fn"),  # decode and mma.sync
        ("llama-3.2-1b/tp8", "int8"),
    ],
)
def test_hopper_s_kernels_pass_with_a_cache_of_8_bits(name: str, stored: str) -> None:
    spec = attention_case(name, dtype=stored)
    backend = INTERPRETED["gpu-interpret"]
    assert self_check(spec, backend, dtype="bfloat16") < tolerance("bfloat16")


def _next_page(q, kv_pages, pages, layer, **named) -> Array:
    return attend_reference(q, jnp.roll(kv_pages, 1, axis=0), pages, layer, **named)


def _padding_not_zero(*args, **named) -> Array:
    return jnp.where(attend_reference(*args, **named) == 0, 1.0, 0.5)


def _not_finite(*args, **named) -> Array:
    return attend_reference(*args, **named).at[0, 0, 0].set(jnp.nan)


@pytest.mark.parametrize("wrong", [_next_page, _padding_not_zero, _not_finite])
def test_a_wrong_one_does_not(wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._ATTEND, "reference", wrong)
    spec = attention_case("tiny-sinks")
    with pytest.raises(BackendRefused, match="'reference' is wrong on this cpu"):
        verify(spec, REFERENCE, dtype="float32")

"""Choosing an attention backend."""

import pytest

from pallas_kernels.backend import BackendRefused, choose_backend, why_not
from pallas_kernels.cases import CASES, attention_case

CPU = {"platform": "cpu", "device_kind": "cpu"}


@pytest.mark.parametrize("name", CASES)
def test_auto_takes_xla_on_a_cpu_and_says_why_not_the_others(name: str) -> None:
    backend, reasons = choose_backend("auto", attention_case(name), **CPU)
    assert backend == "xla"
    assert list(reasons) == ["tpu", "gpu"]
    assert "needs a TPU" in reasons["tpu"]


def test_a_chip_without_a_kernel_gets_an_honest_reason() -> None:
    reason = why_not("gpu", attention_case("tiny"), platform="gpu", device_kind="NVIDIA H200")
    assert reason == "no kernel in this version"


def test_a_named_backend_that_refuses_is_an_error_with_its_reason() -> None:
    with pytest.raises(BackendRefused, match="'gpu': it needs a GPU, this is cpu"):
        choose_backend("gpu", attention_case("tiny"), **CPU)
    with pytest.raises(BackendRefused, match="no attention backend 'cuda'"):
        choose_backend("cuda", attention_case("tiny"), **CPU)


def test_reference_runs_only_when_it_is_named() -> None:
    assert choose_backend("reference", attention_case("tiny"), **CPU) == ("reference", {})

"""Choosing an attention backend."""

import dataclasses

import pytest

from pallas_kernels.backend import Backend, BackendRefused, choose_backend, why_not
from pallas_kernels.cases import CASES, attention_case
from pallas_kernels.chips import CPU, Chip
from pallas_kernels.types import AttentionSpec, KVSpec


@pytest.mark.parametrize("name", CASES)
def test_auto_takes_xla_on_a_cpu_and_says_why_not_the_others(name: str) -> None:
    backend, reasons = choose_backend("auto", attention_case(name), chip=CPU)
    assert backend == Backend(name="xla", chip=CPU)
    assert list(reasons) == ["tpu", "gpu"]
    assert "needs a TPU" in reasons["tpu"]


def test_a_chip_without_a_kernel_gets_an_honest_reason() -> None:
    chip = Chip(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
    assert "not float32" in (why_not("gpu", attention_case("tiny"), chip=chip) or "")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize(
    "chip",
    [
        Chip(platform="gpu", kind="NVIDIA H100 80GB HBM3", compute_capability="9.0"),
        Chip(platform="gpu", kind="NVIDIA L4", compute_capability="8.9"),
        Chip(platform="gpu", kind="NVIDIA A100-SXM4-40GB", compute_capability="8.0"),
        Chip(platform="gpu", kind="NVIDIA B200", compute_capability="10.0"),
    ],
    ids=lambda chip: chip.kind,
)
def test_a_gpu_with_kernels_serves_caches_of_8_bits(chip: Chip, dtype: str) -> None:
    for case in ("llama-3.1-8b", "llama-3.2-1b", "gemma-2-9b", "gpt-oss-20b/window"):
        backend, reasons = choose_backend("auto", attention_case(case, dtype=dtype), chip=chip)
        assert backend == Backend(name="gpu", chip=chip)
        assert list(reasons) == ["tpu"]


def test_no_kernel_attends_within_chunks_yet() -> None:
    chip = Chip(platform="tpu", kind="TPU v6e")
    spec = attention_case("llama-3.1-8b", dtype="bfloat16", window=8192)
    assert why_not("tpu", spec, chip=chip) is None
    chunked = dataclasses.replace(spec, chunked=True)
    assert "chunks" in (why_not("tpu", chunked, chip=chip) or "")
    assert choose_backend("auto", chunked, chip=chip)[0].name == "xla"


def test_no_kernel_knows_biases_by_distance() -> None:
    spec = attention_case("llama-3.1-8b", dtype="bfloat16")
    spec = dataclasses.replace(spec, alibi=(0.5,) * spec.num_heads)
    for chip in (
        Chip(platform="tpu", kind="TPU v6e"),
        Chip(platform="gpu", kind="NVIDIA H100", compute_capability="9.0"),
    ):
        assert "ALiBi" in (why_not(chip.platform, spec, chip=chip) or "")
        assert choose_backend("auto", spec, chip=chip)[0].name == "xla"


def test_a_named_backend_that_refuses_is_an_error_with_its_reason() -> None:
    with pytest.raises(BackendRefused, match="'gpu': it needs a GPU, this is cpu"):
        choose_backend("gpu", attention_case("tiny"), chip=CPU)
    with pytest.raises(BackendRefused, match="no attention backend 'cuda'"):
        choose_backend("cuda", attention_case("tiny"), chip=CPU)


def test_reference_runs_only_when_it_is_named() -> None:
    backend, reasons = choose_backend("reference", attention_case("tiny"), chip=CPU)
    assert (backend.name, reasons) == ("reference", {})


def test_the_interpreter_is_refused_where_it_would_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = attention_case("llama-3.1-8b", dtype="bfloat16")
    assert choose_backend("gpu-interpret", spec, chip=CPU)[0].interpret
    monkeypatch.setenv("NPROC", "2")
    with pytest.raises(BackendRefused, match="set NPROC=4"):
        choose_backend("gpu-interpret", spec, chip=CPU)
    assert choose_backend("tpu-interpret", spec, chip=CPU)[0].interpret


def test_a_latent_cache_must_be_one_row_a_token() -> None:
    kv = KVSpec(
        num_kv_heads=2, head_dim=64, page_size=16, dtype="float32", kind="latent", value_dim=32
    )
    reason = why_not("xla", AttentionSpec(kv=kv, num_heads=4, scale=1.0), chip=CPU)
    assert reason is not None
    assert "one kv head" in reason


@pytest.mark.parametrize(
    ("kind", "generation"), [("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")]
)
def test_a_tpu_is_known_by_jax_s_name(kind: str, generation: str) -> None:
    chip = Chip(platform="tpu", kind=kind)
    assert (chip.tpu_generation, chip.sm) == (generation, None)


def test_a_gpu_is_known_by_its_compute_capability() -> None:
    assert Chip(platform="gpu", kind="NVIDIA L4", compute_capability="8.9").sm == 89
    assert Chip(platform="gpu", kind="NVIDIA B200", compute_capability="10.0").sm == 100

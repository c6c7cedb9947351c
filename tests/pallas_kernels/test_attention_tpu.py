"""paged_attention on TPUs, in Pallas' interpreter: whole ragged batches, and what is refused."""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compiling
from pallas_kernels.attention_tpu import why_not
from pallas_kernels.backend import Backend
from pallas_kernels.cases import CASES, attention_case
from pallas_kernels.chips import Chip
from pallas_kernels.types import AttentionSpec, KVSpec
from tests.pallas_kernels.batches import error, make_batch, oracle, run

V6E = Chip(platform="tpu", kind="TPU v6 lite")
TPU = Backend(name="tpu", chip=V6E, interpret=True)


def layer_of(num_heads: int, num_kv_heads: int, head_dim: int, **features: Any) -> AttentionSpec:
    kv = KVSpec(
        num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=32, dtype=jnp.dtype("bfloat16")
    )
    return AttentionSpec(kv=kv, num_heads=num_heads, scale=head_dim**-0.5, **features)


@pytest.mark.parametrize(
    "spec",
    [
        layer_of(4, 2, 64),
        pytest.param(layer_of(4, 1, 128, window=40), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_ragged_batch_matches_dense_attention(spec: AttentionSpec) -> None:
    rows = [(1, 1), (1, 33), (1, 300), (0, 0), (5, 70), (1, 32), (9, 9)]
    batch = make_batch(spec, rows, num_decode_rows=3, num_tokens=20, max_rows=8, backend=TPU)
    out, _ = run(dataclasses.replace(batch, histories=[]), spec=spec, backend=TPU)
    num_used = int(batch.pages.query_starts[-1])
    assert error(out, oracle(spec, batch)) <= 1e-2
    assert not np.any(np.asarray(out[num_used:], np.float32)), "padding is not zero"


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [
        ("gemma-3-4b", "bfloat16"),
        pytest.param("gemma-2b", "float32", marks=pytest.mark.slow),
        pytest.param("gemma-2b", "float8_e4m3fn", marks=pytest.mark.slow),
        pytest.param("stablelm-3b", "bfloat16", marks=pytest.mark.slow),
        pytest.param("llama-3.2-1b/tp8", "bfloat16", marks=pytest.mark.slow),
        pytest.param("llama-3.2-1b/tp8", "int8", marks=pytest.mark.slow),
        pytest.param("llama-3.1-8b/tp8", "bfloat16", marks=pytest.mark.slow),
        pytest.param("llama-3.1-8b/tp8", "float8_e4m3fn", marks=pytest.mark.slow),
    ],
)
def test_no_layout_of_a_page_makes_the_compiler_copy_the_cache(name: str, kv_dtype: str) -> None:
    missing = compiling.why_not("v5e")
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    rows = {"num_rows": 64, "context": 2048}
    job = compiling.Job.of(
        "v5e", "benchmarks.programs:attention", case=name, kv_dtype=kv_dtype, **rows
    )
    with compiling.compiled(job, retries=1) as result:
        assert result.memory["temporaries"] < rows["num_rows"] * rows["context"] * 128


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("tiny")])
def test_no_model_is_refused(name: str) -> None:
    assert why_not(attention_case(name, page_size=32, dtype=jnp.bfloat16), V6E) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"page_size": 12}, "page_size=12"),
        ({"page_size": 512}, "page_size=512"),
        ({"dtype": jnp.dtype("float16")}, "float16"),
        ({"head_dim": 512}, "head_dim=512"),
    ],
)
def test_what_no_kernel_can_do_is_refused(changes: dict[str, object], reason: str) -> None:
    spec = layer_of(8, 2, 128)
    kv = dataclasses.replace(spec.kv, **changes)  # pyright: ignore[reportArgumentType]
    assert reason in (why_not(dataclasses.replace(spec, kv=kv), V6E) or "")


def test_a_tpu_of_an_unknown_generation_is_refused() -> None:
    assert "TPU v9" in (why_not(layer_of(8, 2, 128), Chip(platform="tpu", kind="TPU v9")) or "")

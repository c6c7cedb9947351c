"""Pages that a window has passed are another row's by now: whatever they hold is unseen."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import REFERENCE, XLA, Backend
from pallas_kernels.cases import attention_case
from pallas_kernels.chips import Chip
from pallas_kernels.types import AttentionSpec, KVSpec
from tests.pallas_kernels.batches import Batch, error, make_batch, oracle, run

# (query tokens, kv tokens), decode rows first. Most rows have outgrown the window of 20 tokens.
ROWS = [(1, 20), (1, 21), (1, 36), (1, 37), (1, 150), (7, 90), (1, 70), (40, 133), (33, 33)]
WINDOW = 20


def pages_passed(batch: Batch, window: int, page_size: int) -> np.ndarray:
    """Pages of the rows of which no query of the step sees a token."""
    table, starts = (np.asarray(x) for x in (batch.pages.page_table, batch.pages.query_starts))
    passed = []
    for row, kv_len in enumerate(np.asarray(batch.pages.kv_lens)[: len(batch.histories)]):
        first_query = kv_len - (starts[row + 1] - starts[row])
        passed.extend(table[row, : max(0, first_query - (window - 1)) // page_size])
    return np.array(passed)


def forget_passed(batch: Batch, spec: AttentionSpec, value: float) -> Batch:
    assert spec.window is not None
    passed = pages_passed(batch, spec.window, spec.kv.page_size)
    assert len(passed) > 10
    first = int(batch.layer) * batch.pages.num_pages
    return dataclasses.replace(batch, kv_pages=batch.kv_pages.at[first + passed].set(value))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e4])
@pytest.mark.parametrize("backend", [REFERENCE, XLA], ids=lambda backend: backend.name)
@pytest.mark.parametrize("num_decode_rows", [5, 0])
def test_a_page_that_the_window_has_passed_may_hold_anything(
    backend: Backend, value: float, num_decode_rows: int
) -> None:
    spec = attention_case("tiny", page_size=8, window=WINDOW)
    batch = make_batch(
        spec, ROWS, num_decode_rows=num_decode_rows, num_tokens=96, max_rows=len(ROWS) + 1
    )
    expected = oracle(spec, batch)
    batch = dataclasses.replace(forget_passed(batch, spec, value), histories=[])
    out, _ = run(batch, spec=spec, backend=backend)
    assert jnp.isfinite(out).all()
    assert error(out, expected) <= 1e-5


def kernel(platform: Literal["tpu", "gpu"], kind: str, capability: str | None = None) -> Backend:
    chip = Chip(platform=platform, kind=kind, compute_capability=capability)
    return Backend(name=platform, chip=chip, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        kernel("tpu", "TPU v6 lite"),
        kernel("gpu", "NVIDIA H100 80GB HBM3", "9.0"),
        kernel("gpu", "NVIDIA A100-SXM4-40GB", "8.0"),
    ],
    ids=lambda backend: backend.chip.kind.split()[1],
)
def test_kernels_do_not_let_such_a_page_through(backend: Backend) -> None:
    kv = KVSpec(num_kv_heads=1, head_dim=64, page_size=16, dtype=jnp.dtype("bfloat16"))
    spec = AttentionSpec(kv=kv, num_heads=2, scale=0.125, window=WINDOW)
    rows = [(1, 37), (1, 150), (7, 90), (20, 130)]
    batch = make_batch(spec, rows, num_decode_rows=2, num_tokens=32, max_rows=5, backend=backend)
    expected = oracle(spec, batch)
    batch = dataclasses.replace(forget_passed(batch, spec, np.nan), histories=[])
    out, _ = run(batch, spec=spec, backend=backend)
    assert jnp.isfinite(out.astype(jnp.float32)).all()
    assert error(out, expected) <= 1e-2

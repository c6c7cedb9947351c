"""The cache's shape and the writing of new tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels.cases import attention_case
from pallas_kernels.kv_write import kv_pages_shape, split_kv, write_kv
from pallas_kernels.types import PageMetadata


def metadata(slots: list[int], num_pages: int) -> PageMetadata:
    return PageMetadata(
        page_table=jnp.zeros((1, 1), jnp.int32),
        slots=jnp.asarray(slots, jnp.int32),
        kv_lens=jnp.zeros(1, jnp.int32),
        query_starts=jnp.zeros(2, jnp.int32),
        num_rows=jnp.int32(0),
        num_decode_rows=jnp.int32(0),
        num_pages=num_pages,
    )


def test_pages_interleave_keys_and_values_on_the_head_axis() -> None:
    spec = attention_case("smollm2-135m", dtype="bfloat16").kv
    shape = kv_pages_shape(spec, num_layers=30, num_pages=7)
    assert shape.shape == (210, 16, 6, 64)
    assert shape.dtype == jnp.bfloat16
    k, v = split_kv(jnp.arange(6)[:, None])
    assert k[:, 0].tolist() == [0, 2, 4]
    assert v[:, 0].tolist() == [1, 3, 5]


@pytest.mark.parametrize("slots", [[21], [21, 4, 0, 0], [12, 13, 14, 15]])
def test_tokens_go_to_their_slots_and_nowhere_else(slots: list[int]) -> None:
    spec = attention_case("tiny", page_size=4).kv
    num_pages, layer = 6, 2
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, len(slots), 2, 8)).astype(np.float32)
    before = rng.standard_normal(kv_pages_shape(spec, 3, num_pages).shape).astype(np.float32)
    after = np.asarray(
        write_kv(
            jnp.asarray(before),
            jnp.asarray(k),
            jnp.asarray(v),
            metadata(slots, num_pages),
            layer,
            spec=spec,
        )
    )
    touched = np.zeros(before.shape[:2], bool)
    for token, slot in enumerate(slots):
        page, offset = layer * num_pages + slot // 4, slot % 4
        touched[page, offset] = True
        if slot:  # padding tokens share a slot of the null page: any may win
            assert np.array_equal(after[page, offset, 0::2], k[token])
            assert np.array_equal(after[page, offset, 1::2], v[token])
    assert np.array_equal(after[~touched], before[~touched])


@pytest.mark.parametrize("num_tokens", [1, 2, 256])
def test_a_donated_cache_is_written_in_place(num_tokens: int) -> None:
    spec = attention_case("smollm2-135m").kv
    num_pages = 400
    pages = metadata([slot + 16 for slot in range(num_tokens)], num_pages)
    new = jax.ShapeDtypeStruct((num_tokens, 3, 64), jnp.float32)

    def step(kv_pages: Array, k: Array, v: Array) -> Array:
        return jax.lax.fori_loop(
            0, 4, lambda layer, pages_: write_kv(pages_, k, v, pages, layer, spec=spec), kv_pages
        )

    cache = kv_pages_shape(spec, 4, num_pages)
    compiled = jax.jit(step, donate_argnums=0).lower(cache, new, new).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2e6 < 0.1 * memory.argument_size_in_bytes

"""The cache's shape and the writing of new tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels.backend import XLA, Backend
from pallas_kernels.cases import attention_case
from pallas_kernels.kv_write import (
    kv_pages_shape,
    page_layout,
    saturate,
    split_kv,
    token_rows,
    write_kv,
)
from pallas_kernels.types import PageMetadata

TPU, GPU = Backend(name="tpu"), Backend(name="gpu")


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


@pytest.mark.parametrize(
    ("name", "dtype", "backend", "page", "kind"),
    [
        ("smollm2-135m", "bfloat16", XLA, (16, 6, 64), "pairs"),
        ("smollm2-135m", "bfloat16", TPU, (16, 4, 128), "packed"),
        ("llama-3.2-1b", "bfloat16", TPU, (16, 8, 128), "packed"),
        ("llama-3.1-8b", "bfloat16", TPU, (16, 16, 128), "pairs"),
        ("llama-3.1-8b", "bfloat16", GPU, (16, 16, 128), "pairs"),
        ("llama-3.1-8b/tp8", "float8_e4m3fn", TPU, (16, 4, 128), "pairs"),
        ("phi-3-mini", "bfloat16", TPU, (16, 64, 128), "pairs"),
        ("gemma-2b", "float32", TPU, (16, 4, 128), "pairs"),
        ("deepseek-v3", "bfloat16", XLA, (16, 1, 576), "latent"),
        ("deepseek-v3", "bfloat16", TPU, (1, 16, 640), "latent"),
        ("deepseek-v3", "float8_e4m3fn", TPU, (1, 16, 640), "latent"),
    ],
)
def test_a_page_is_padded_to_whole_tiles_on_tpu_alone(
    name: str, dtype: str, backend: Backend, page: tuple[int, int, int], kind: str
) -> None:
    spec = attention_case(name, dtype=dtype).kv
    layout = page_layout(spec, backend)
    assert (layout.page, layout.kind) == (page, kind)
    shape = kv_pages_shape(spec, num_layers=30, num_pages=7, backend=backend)
    assert shape.shape == (210, *page)
    assert shape.dtype == jnp.dtype(dtype)


def test_keys_and_values_alternate_on_the_head_axis() -> None:
    spec = attention_case("smollm2-135m").kv
    k, v = split_kv(jnp.zeros((6, 64)) + jnp.arange(6)[:, None], spec, page_layout(spec, XLA))
    assert k[:, 0].tolist() == [0, 2, 4]
    assert v[:, 0].tolist() == [1, 3, 5]


@pytest.mark.parametrize("slots", [[37], [37, 4, 0, 0], [12, 13, 14, 15]])
@pytest.mark.parametrize(
    ("name", "dtype", "backend"),
    [
        ("tiny", "float32", XLA),
        ("tiny", "bfloat16", TPU),
        ("smollm2-135m", "bfloat16", TPU),
        ("tiny-mqa", "int8", TPU),
        ("tiny-latent", "float32", XLA),
        ("tiny-latent", "bfloat16", TPU),
        ("tiny-latent", "int8", TPU),
    ],
)
def test_tokens_go_to_their_slots_and_nowhere_else(
    slots: list[int], name: str, dtype: str, backend: Backend
) -> None:
    size, num_pages, layer = 8, 6, 2
    spec = attention_case(name, page_size=size, dtype=dtype).kv
    layout = page_layout(spec, backend)
    rng = np.random.default_rng(0)
    shape = (2, len(slots), spec.num_kv_heads, spec.head_dim)
    k, v = jnp.asarray(rng.integers(-9, 9, shape), jnp.float32)
    cache = kv_pages_shape(spec, 3, num_pages, backend=backend)
    before = jnp.asarray(rng.integers(-9, 9, cache.shape), dtype)
    v_or_none = None if spec.kind == "latent" else v
    after = write_kv(
        before, k, v_or_none, metadata(slots, num_pages), layer, spec=spec, backend=backend
    )
    old, new = (np.asarray(token_rows(each, layout), np.float32) for each in (before, after))
    touched = np.zeros(old.shape[:2], bool)
    for token, slot in enumerate(slots):
        page, offset = layer * num_pages + slot // size, slot % size
        touched[page, offset] = True
        if slot:  # padding tokens share a slot of the null page: any may win
            keys, values = split_kv(new[page, offset], spec, layout)
            assert np.array_equal(keys, np.asarray(k[token]))
            if v_or_none is not None:
                assert np.array_equal(values, np.asarray(v[token]))
    assert np.array_equal(new[~touched], old[~touched])


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("int8", [127, -128, 3, 0]),
        ("float8_e4m3fn", [448, -448, 2.5, 0.40625]),
        ("float8_e5m2", [1024, -1024, 2.5, 0.4375]),
    ],
)
def test_eight_bit_types_saturate_and_round(dtype: str, stored: list[float]) -> None:
    kept = saturate(jnp.array([1000.0, -1000.0, 2.6, 0.41]), dtype)
    assert kept.dtype == dtype
    assert kept.astype(jnp.float32).tolist() == stored


@pytest.mark.parametrize("num_tokens", [1, 2, 256])
def test_a_donated_cache_is_written_in_place(num_tokens: int) -> None:
    spec = attention_case("smollm2-135m").kv
    num_pages = 400
    pages = metadata([slot + 16 for slot in range(num_tokens)], num_pages)
    new = jax.ShapeDtypeStruct((num_tokens, 3, 64), jnp.float32)

    def step(kv_pages: Array, k: Array, v: Array) -> Array:
        return jax.lax.fori_loop(
            0,
            4,
            lambda layer, pages_: write_kv(pages_, k, v, pages, layer, spec=spec, backend=XLA),
            kv_pages,
        )

    cache = kv_pages_shape(spec, 4, num_pages, backend=XLA)
    compiled = jax.jit(step, donate_argnums=0).lower(cache, new, new).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2e6 < 0.1 * memory.argument_size_in_bytes

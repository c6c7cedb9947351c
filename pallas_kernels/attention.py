"""The one entry to attention: check what came, write the new tokens, attend."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_reference import attend_reference
from pallas_kernels.attention_xla import attend_xla
from pallas_kernels.backend import BACKENDS, BackendRefused
from pallas_kernels.kv_write import write_kv
from pallas_kernels.types import AttentionSpec, PageMetadata

_ATTEND = {"reference": attend_reference, "xla": attend_xla}


def paged_attention(
    q: Array,  # [T, N, H]
    k: Array,  # [T, K, H]
    v: Array,  # [T, K, H]
    kv_pages: Array,  # [L * num_pages, page_size, 2K, H]
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: str,
) -> tuple[Array, Array]:
    """Write this step's keys and values to the cache of `layer`, then attend to it.

    Returns `out [T, N, H]` in q's dtype, with zeros for padding tokens, and the cache, updated in
    place when it is donated or carried. Prefill, decode and mixed batches are one call. `layer` is
    an int or a traced int32.

    Raises ValueError for arrays that do not fit `spec` or each other, and BackendRefused for a
    backend that has no implementation. Choose it with `choose_backend`.
    """
    if backend not in _ATTEND:
        why = "no kernel in this version" if backend in BACKENDS else "there is none of this name"
        raise BackendRefused(f"attention backend {backend!r} refused: {why}")
    _check(q, k, v, kv_pages, pages, layer, spec)
    kv_pages = write_kv(kv_pages, k, v, pages, layer, spec=spec.kv)
    return _ATTEND[backend](q, kv_pages, pages, layer, spec=spec), kv_pages


def _check(
    q: Array,
    k: Array,
    v: Array,
    kv_pages: Array,
    pages: PageMetadata,
    layer: int | Array,
    spec: AttentionSpec,
) -> None:
    """Raise one ValueError that names every array that does not fit."""
    kv = spec.kv
    num_tokens = q.shape[0]
    num_rows = pages.kv_lens.shape[0]
    expected = {
        "q": (q, (num_tokens, spec.num_heads, kv.head_dim)),
        "k": (k, (num_tokens, kv.num_kv_heads, kv.head_dim)),
        "v": (v, (num_tokens, kv.num_kv_heads, kv.head_dim)),
        "kv_pages": (kv_pages, (None, kv.page_size, 2 * kv.num_kv_heads, kv.head_dim)),
        "pages.page_table": (pages.page_table, (num_rows, None)),
        "pages.slots": (pages.slots, (num_tokens,)),
        "pages.kv_lens": (pages.kv_lens, (num_rows,)),
        "pages.query_starts": (pages.query_starts, (num_rows + 1,)),
        "pages.num_rows": (pages.num_rows, ()),
        "pages.num_decode_rows": (pages.num_decode_rows, ()),
    }
    faults = []
    for name, (array, shape) in expected.items():
        fits = len(array.shape) == len(shape) and all(
            want in (None, have) for have, want in zip(array.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            faults.append(f"{name} has shape {tuple(array.shape)}, expected ({wanted})")
        if name.startswith("pages.") and array.dtype != jnp.int32:
            faults.append(f"{name} is {array.dtype}, expected int32")
    if kv_pages.dtype != jnp.dtype(kv.dtype):
        faults.append(f"kv_pages is {kv_pages.dtype}, expected {jnp.dtype(kv.dtype)}")
    if kv_pages.shape[0] % pages.num_pages:
        faults.append(f"kv_pages has {kv_pages.shape[0]} pages, not layers of {pages.num_pages}")
    elif isinstance(layer, int) and not 0 <= layer < kv_pages.shape[0] // pages.num_pages:
        faults.append(f"layer is {layer}, expected one of {kv_pages.shape[0] // pages.num_pages}")
    if spec.num_heads % kv.num_kv_heads:
        faults.append(f"{spec.num_heads} query heads for {kv.num_kv_heads} kv heads: not whole")
    if faults:
        raise ValueError("paged_attention: " + "; ".join(faults))

"""The one entry to attention: check what came, write the new tokens, attend."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_reference import attend_reference
from pallas_kernels.attention_xla import attend_xla
from pallas_kernels.backend import Backend
from pallas_kernels.kv_write import page_layout, write_kv
from pallas_kernels.types import AttentionSpec, PageMetadata

_ATTEND = {"reference": attend_reference, "xla": attend_xla}


def paged_attention(
    q: Array,  # [T, N, H]
    k: Array,  # [T, K, H]
    v: Array | None,  # [T, K, H]; None for a latent cache
    kv_pages: Array,  # as `kv_pages_shape` says: [L * num_pages, page_size, 2K, H], or padded
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N] float32, if spec.sinks
    kv_scales: Array | None = None,  # [2K] float32: of head j's keys 2j, of its values 2j + 1
) -> tuple[Array, Array]:
    """Write this step's keys and values to the cache of `layer`, then attend to it.

    Returns `out [T, N, out_dim]` in q's dtype, with zeros for padding tokens, and the cache,
    updated in place when it is donated or carried. Prefill, decode and mixed batches are one call.
    `layer` is an int or a traced int32. What the cache stands for is what it stores times
    `kv_scales` (a latent cache has one scale), so that 8-bit types can cover the values' range.

    Raises ValueError for arrays that do not fit `spec` or each other. Whether a backend can run a
    layer is for `choose_backend` to say.

    PagedAttention is arXiv 2309.06180.
    """
    _check(q, k, v, kv_pages, pages, layer, spec, backend, sinks, kv_scales)
    value_scale = None
    if kv_scales is not None:
        key_scale, value_scale = _per_head(kv_scales, spec)
        q = (q * jnp.repeat(key_scale, spec.group, axis=0)).astype(q.dtype)
        k = k / key_scale
        v = v if v is None else v / value_scale
    kv_pages = write_kv(kv_pages, k, v, pages, layer, spec=spec.kv, backend=backend)
    attend = _implementation(backend)
    out = attend(q, kv_pages, pages, layer, spec=spec, backend=backend, sinks=sinks)
    if value_scale is not None:
        out = (out * jnp.repeat(value_scale, spec.group, axis=0)).astype(out.dtype)
    return out, kv_pages


def _implementation(backend: Backend) -> Callable[..., Array]:
    """A kernel is imported by those who use it: Pallas for TPU and GPU takes most of a second."""
    if backend.name == "tpu":
        from pallas_kernels.attention_tpu import attend_tpu

        return attend_tpu
    if backend.name == "gpu":
        from pallas_kernels.attention_gpu import attend_gpu

        return attend_gpu
    return _ATTEND[backend.name]


def _per_head(kv_scales: Array, spec: AttentionSpec) -> tuple[Array, Array]:
    """The scales of keys and of values, [K, 1] each."""
    if spec.kv.kind == "latent":
        return kv_scales[:, None], kv_scales[:, None]
    return kv_scales[0::2, None], kv_scales[1::2, None]


def _check(
    q: Array,
    k: Array,
    v: Array | None,
    kv_pages: Array,
    pages: PageMetadata,
    layer: int | Array,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None,
    kv_scales: Array | None,
) -> None:
    """Raise one ValueError that names every array that does not fit."""
    kv = spec.kv
    num_tokens = q.shape[0]
    num_rows = pages.kv_lens.shape[0]
    expected = {
        "q": (q, (num_tokens, spec.num_heads, kv.head_dim)),
        "k": (k, (num_tokens, kv.num_kv_heads, kv.head_dim)),
        "kv_pages": (kv_pages, (None, *page_layout(kv, backend).page)),
        "pages.page_table": (pages.page_table, (num_rows, None)),
        "pages.slots": (pages.slots, (num_tokens,)),
        "pages.kv_lens": (pages.kv_lens, (num_rows,)),
        "pages.query_starts": (pages.query_starts, (num_rows + 1,)),
        "pages.num_rows": (pages.num_rows, ()),
        "pages.num_decode_rows": (pages.num_decode_rows, ()),
    }
    faults = []
    optional = {
        "v": (v, (num_tokens, kv.num_kv_heads, kv.head_dim), kv.kind != "latent"),
        "sinks": (sinks, (spec.num_heads,), spec.sinks),
        "kv_scales": (kv_scales, (kv.num_scales,), kv_scales is not None),
    }
    for name, (array, shape, is_wanted) in optional.items():
        if array is not None and is_wanted:
            expected[name] = (array, shape)
        elif (array is not None) != is_wanted:
            faults.append(f"{name} is {'missing' if is_wanted else 'given, but spec has none'}")
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
    if spec.alibi is not None and len(spec.alibi) != spec.num_heads:
        faults.append(f"{len(spec.alibi)} slopes for {spec.num_heads} query heads")
    if faults:
        raise ValueError("paged_attention: " + "; ".join(faults))

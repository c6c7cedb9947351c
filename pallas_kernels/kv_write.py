"""The cache's pages: their shape, and the writing of new keys and values into them.

This file owns the layout: `[num_layers * num_pages, page_size, 2 * num_kv_heads, head_dim]`, where
head 2j of a page holds the keys of kv head j and head 2j + 1 its values. A slice of the head axis
therefore holds whole (key, value) pairs, and that axis is the one to shard.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.types import KVSpec, PageMetadata


def kv_pages_shape(spec: KVSpec, num_layers: int, num_pages: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the cache of `num_layers` layers of `num_pages` pages each."""
    shape = (num_layers * num_pages, spec.page_size, 2 * spec.num_kv_heads, spec.head_dim)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(spec.dtype))


def write_kv(
    kv_pages: Array,  # [L * num_pages, page_size, 2K, H]
    k: Array,  # [T, K, H]
    v: Array,  # [T, K, H]
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: KVSpec,
) -> Array:
    """Write T tokens' keys and values to their slots of one layer; returns the cache.

    Padding tokens write to the layer's null page. A cache that is donated, or carried through a
    loop, is updated in place.
    """
    num_tokens = k.shape[0]
    pairs = jnp.stack([k, v], axis=2).astype(spec.dtype)  # [T, K, 2, H]
    pairs = pairs.reshape(num_tokens, 2 * spec.num_kv_heads, spec.head_dim)
    first = jnp.asarray(layer, jnp.int32) * (pages.num_pages * spec.page_size)
    slots = first + pages.slots
    if num_tokens == 1:  # XLA:CPU rewrites a scatter of one row into one that copies the cache
        page, offset = slots[0] // spec.page_size, slots[0] % spec.page_size
        return lax.dynamic_update_slice(kv_pages, pairs[None], (page, offset, 0, 0))
    rows = kv_pages.reshape(-1, *kv_pages.shape[2:])  # [L * num_pages * page_size, 2K, H], a view
    rows = rows.at[slots].set(pairs, mode="promise_in_bounds", wrap_negative_indices=False)
    return rows.reshape(kv_pages.shape)


def split_kv(pairs: Array) -> tuple[Array, Array]:
    """Keys and values `[..., K, H]` out of the interleaved heads `[..., 2K, H]` of a page."""
    return pairs[..., 0::2, :], pairs[..., 1::2, :]

"""The cache's pages: their layout, and the writing of new keys and values into them.

Nobody else indexes into a page. In the *plain* layout a page is `[page_size, 2 * num_kv_heads,
head_dim]`: head 2j holds the keys of kv head j and head 2j + 1 its values, so a slice of the head
axis holds whole (key, value) pairs, and that axis is the one to shard. TPUs tile the last two axes
of an array by (32 / bits, 128) and copy the whole cache where a view would break a tile, so there
`PageLayout` pads them.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.backend import Backend
from pallas_kernels.types import KVSpec, PageMetadata

LANES = 128  # of a TPU's vector register


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """How a page lies in memory: the shape `page` of its three axes, and what a row of it is.

    pairs: `[page_size, C, W]`, key and value alternate along C >= 2K, W >= head_dim. For TPUs, one
    that is wider than 128 is `folds` rows of 128 one after the other, and C >= 2K * folds: in rows
    of 256 a tile of the array would not be a contiguous part of it.
    packed: `[page_size, C, W]`, a head's key and value side by side in one row of W = 2 * head_dim,
    C >= K.
    latent: `[page_size / S, S, W]`, one row a token, S tokens side by side, W >= head_dim. For
    TPUs S = page_size, so that a page is a matrix of whole tiles.
    What is padding holds zeros, or nothing yet: a reader must not let it through.
    """

    kind: Literal["pairs", "packed", "latent"]
    page: tuple[int, int, int]
    folds: int = 1  # rows that a key, or a value, takes

    @property
    def width(self) -> int:
        """Columns of a key with its padding."""
        return self.folds * self.page[2]


def page_layout(spec: KVSpec, backend: Backend) -> PageLayout:
    """The layout that a backend's kernels read; the plain one for all but "tpu"."""
    size, num_heads, width = spec.page_size, spec.num_kv_heads, spec.head_dim
    if backend.name != "tpu":
        if spec.kind == "latent":
            return PageLayout(kind="latent", page=(size, 1, width))
        return PageLayout(kind="pairs", page=(size, 2 * num_heads, width))
    sublanes = max(1, 4 // jnp.dtype(spec.dtype).itemsize)  # rows that share a 32-bit register
    if spec.kind == "latent":
        return PageLayout(kind="latent", page=(1, size, _up(width, LANES)))
    if 2 * width == LANES:
        return PageLayout(kind="packed", page=(size, _up(num_heads, sublanes), LANES))
    folds = -(-width // LANES)
    height = _up(2 * num_heads * folds, sublanes)
    return PageLayout(kind="pairs", page=(size, height, LANES), folds=folds)


def kv_pages_shape(
    spec: KVSpec, num_layers: int, num_pages: int, *, backend: Backend
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the cache of `num_layers` layers of `num_pages` pages each."""
    page = page_layout(spec, backend).page
    return jax.ShapeDtypeStruct((num_layers * num_pages, *page), jnp.dtype(spec.dtype))


def write_kv(
    kv_pages: Array,  # [L * num_pages, *page]
    k: Array,  # [T, K, H]
    v: Array | None,  # [T, K, H]; None for a latent cache
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: KVSpec,
    backend: Backend,
) -> Array:
    """Write T tokens' keys and values to their slots of one layer; returns the cache.

    Padding tokens write to the layer's null page. Values beyond an 8-bit type's range saturate. A
    cache that is donated, or carried through a loop, is updated in place.
    """
    layout = page_layout(spec, backend)
    rows = saturate(_rows(k, v, layout), spec.dtype)  # [T, C, W]
    first = jnp.asarray(layer, jnp.int32) * (pages.num_pages * spec.page_size)
    slots = first + pages.slots
    side = layout.page[1] if layout.kind == "latent" else 1  # tokens side by side
    if k.shape[0] == 1 and backend.name == "tpu":
        # XLA:TPU makes a scatter of one row a dynamic update slice, and one into the tiles of
        # several rows that 8-bit latents have copies the cache: write the row twice.
        rows, slots = jnp.repeat(rows, 2, axis=0), jnp.repeat(slots, 2)
    elif k.shape[0] == 1:  # XLA:CPU rewrites a scatter of one row into one that copies the cache
        page, offset = slots[0] // spec.page_size, slots[0] % spec.page_size
        at = (page, offset // side, offset % side, 0)
        return lax.dynamic_update_slice(kv_pages, rows[None], at)
    flat = kv_pages.reshape(-1, *kv_pages.shape[2:])  # [L * num_pages * page[0], *page[1:]], a view
    if side > 1:
        where, rows = (slots // side, slots % side), rows[:, 0]
    else:
        where = (slots,)
    flat = flat.at[where].set(rows, mode="promise_in_bounds", wrap_negative_indices=False)
    return flat.reshape(kv_pages.shape)


def saturate(values: Array, dtype: jax.typing.DTypeLike) -> Array:
    """values as `dtype`; the nearest one it has, for an 8-bit type."""
    dtype = jnp.dtype(dtype)
    if dtype.itemsize > 1:
        return values.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        values = jnp.round(values.astype(jnp.float32))
    else:
        info = jnp.finfo(dtype)
    return jnp.clip(values, float(info.min), float(info.max)).astype(dtype)


def split_kv(rows: Array, spec: KVSpec, layout: PageLayout) -> tuple[Array, Array]:
    """Keys `[..., K, H]` and values `[..., K, out_dim]` of tokens' rows `[..., C, W]`."""
    num_heads, width = spec.num_kv_heads, spec.head_dim
    if layout.kind == "latent":
        return rows[..., :width], rows[..., : spec.out_dim]
    if layout.kind == "packed":
        rows = rows[..., :num_heads, :]
        return rows[..., :width], rows[..., width : 2 * width]
    num_rows = 2 * num_heads
    rows = rows[..., : num_rows * layout.folds, :]
    rows = rows.reshape(*rows.shape[:-2], num_rows, layout.width)[..., :width]
    return rows[..., 0::2, :], rows[..., 1::2, :]


def token_rows(kv_pages: Array, layout: PageLayout) -> Array:
    """Pages `[..., *page]` as the rows of their tokens, in order: [..., page_size, C, W]."""
    if layout.kind != "latent":
        return kv_pages
    return kv_pages.reshape(*kv_pages.shape[:-3], -1, 1, kv_pages.shape[-1])


def _rows(k: Array, v: Array | None, layout: PageLayout) -> Array:
    """Each token's row of a page: [T, C, W] (of a latent page [T, 1, W])."""
    num_tokens = k.shape[0]
    rows = k
    if v is not None:
        pairs = jnp.stack([k, v], axis=2)  # [T, K, 2, H]
        width = k.shape[2] * (2 if layout.kind == "packed" else 1)
        rows = pairs.reshape(num_tokens, -1, width)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, layout.width - rows.shape[2])))
    rows = rows.reshape(num_tokens, -1, layout.page[2])
    height = 1 if layout.kind == "latent" else layout.page[1]
    return jnp.pad(rows, ((0, 0), (0, height - rows.shape[1]), (0, 0)))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

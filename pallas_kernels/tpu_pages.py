"""Blocks of KV pages in a TPU's VMEM: copied in ahead of their use, and loaded head by head.

A block is a number of pages of one row of the batch, one after the other. It is copied page by page
from HBM to one of two buffers while the other one is worked on.

A 32-bit register holds `packing` neighbouring rows of a token (of the page's C axis): bfloat16's
key and value of a head, for one. So in VMEM a token is `words` rows of 32 bits, and a head of many
tokens is a strided load of such rows, eight tokens at a time, taken apart with shifts. Loading it
by its index in C instead makes the compiler shuffle sublanes (18,991 cycles against 5,296 for a
block of 1024 tokens on v5e, by its schedule).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_write import LANES, PageLayout

_BANKS = 32  # of VMEM, a row of 128 words each
_ROWS_IN_FLIGHT = 24  # of strided loads, that should lie in different banks


@dataclass(frozen=True, slots=True, kw_only=True)
class PageBlock:
    """The geometry of a block of pages. Static."""

    layout: PageLayout  # "pairs" or "packed"
    dtype: jax.typing.DTypeLike  # of the cache
    num_pages: int  # a block

    @property
    def page_size(self) -> int:
        return self.layout.page[0]

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def width(self) -> int:
        return self.layout.page[2]

    @property
    def packing(self) -> int:
        """Rows of the C axis in a 32-bit word."""
        return 4 // jnp.dtype(self.dtype).itemsize

    @property
    def words(self) -> int:
        """32-bit rows of a token."""
        return self.layout.page[1] // self.packing

    @property
    def stride(self) -> int:
        """32-bit rows from a token to the next in VMEM: `words`, or one more, which stays unused.

        The rows of one strided load would else lie in few banks of VMEM.
        """
        words, folds = self.words, self.width // LANES
        banks = {index * words * folds % _BANKS for index in range(_ROWS_IN_FLIGHT)}
        return words if words == 1 or len(banks) == _ROWS_IN_FLIGHT else words + 1

    @property
    def buffers(self) -> pltpu.VMEM:
        """Two blocks: the scratch memory that the functions here take as `buffers`."""
        shape = (2, self.num_tokens, self.stride, self.packing, self.width)
        return pltpu.VMEM(shape, jnp.dtype(self.dtype))

    @property
    def num_bytes(self) -> int:
        """VMEM that `buffers` takes."""
        return 2 * self.num_tokens * self.stride * self.width * 4

    def view(self, kv_pages: Array) -> Array:
        """The cache as the kernel wants it, [L * num_pages, page_size, words, packing, W].

        It is the same bytes in the same order, so no copy.
        """
        shape = (-1, self.page_size, self.words, self.packing, self.width)
        return kv_pages.reshape(shape)

    def start(
        self,
        kv_hbm: Any,  # what `view` made
        buffers: Any,
        semaphores: Any,  # DMA, [2]
        slot: Array,
        page_of: Any,  # index of a page in the block -> row of kv_hbm
        count: Array,  # of pages to copy, 1 ... num_pages
    ) -> None:
        """Start to copy the first `count` pages of a block; the rest of the buffer is left."""
        self._each(
            count,
            lambda index: self._copy(
                kv_hbm.at[page_of(index)], buffers, semaphores, slot, index
            ).start(),
        )

    def wait(self, kv_hbm: Any, buffers: Any, semaphores: Any, slot: Array, count: Array) -> None:
        """Wait for the pages that `start` began to copy to `slot`."""

        @pl.when(count == self.num_pages)
        def _() -> None:
            whole = buffers.at[slot, :, pl.ds(0, self.words)]
            pltpu.make_async_copy(whole, whole, semaphores.at[slot]).wait()

        @pl.when(count < self.num_pages)
        def _() -> None:
            @pl.loop(0, count)
            def _(index: Array) -> None:
                self._copy(kv_hbm.at[0], buffers, semaphores, slot, index).wait()

    def _each(self, count: Array, do: Any) -> None:
        """do(index) for each index below `count`, unrolled if the block is full."""

        @pl.when(count == self.num_pages)
        def _() -> None:
            for index in range(self.num_pages):
                do(index)

        @pl.when(count < self.num_pages)
        def _() -> None:
            @pl.loop(0, count)
            def _(index: Array) -> None:
                do(index)

    def _copy(self, page: Any, buffers: Any, semaphores: Any, slot: Any, index: Any) -> Any:
        first = index * self.page_size
        to = buffers.at[slot, pl.ds(first, self.page_size), pl.ds(0, self.words)]
        return pltpu.make_async_copy(page, to, semaphores.at[slot])

    def load(
        self,
        buffers: Any,
        slot: Any,
        word: int,
        first: Any,  # token of the block
        count: int,
        dtype: jax.typing.DTypeLike,
        *,
        interpret: bool,
    ) -> list[Array]:
        """Rows `word * packing ...` of the C axis of `count` tokens: packing arrays [count, W].

        `interpret` takes plain loads, as Pallas' interpreter has no reshaped references: the same
        values by another instruction.
        """
        if interpret:
            tokens = pl.ds(first, count)
            return [
                buffers[slot, tokens, word, index, :].astype(dtype) for index in range(self.packing)
            ]
        folds = self.width // LANES
        rows = buffers.bitcast(jnp.uint32).at[slot].reshape(-1, LANES)
        parts = []
        for fold in range(folds):
            at = (first * self.stride + word) * folds + fold
            parts.append(rows[pl.ds(at, count, stride=self.stride * folds), :])
        words = parts[0] if folds == 1 else jnp.concatenate(parts, axis=1)  # [count, W]
        return [_element(words, index, self.dtype).astype(dtype) for index in range(self.packing)]


def _element(words: Array, index: int, dtype: jax.typing.DTypeLike) -> Array:
    """Element `index` of 32-bit words, from the lowest bits on."""
    bits = 8 * jnp.dtype(dtype).itemsize
    if bits == 32:
        return pltpu.bitcast(words, jnp.dtype(dtype))
    narrow = (words >> (bits * index)).astype(f"uint{bits}")
    return pltpu.bitcast(narrow, jnp.dtype(dtype))

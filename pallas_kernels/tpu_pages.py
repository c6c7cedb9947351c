"""Blocks of KV pages in a TPU's VMEM: copied in ahead of their use, and loaded head by head.

A block is a number of pages of one row of the batch, one after the other. It is copied page by page
from HBM to one of two buffers while the other one is worked on.

In VMEM a 32-bit word holds `packing` neighbouring rows of a token (of a page's C axis): a bfloat16
key and its value, say. So a token is `words` rows of words, and one head of many tokens is a
strided load of such rows, eight tokens at a time, taken apart with shifts. Loading a head by its
index in C instead makes the compiler shuffle sublanes: 18,991 cycles for 1024 tokens of 8 heads
against 5,296 in an early version of the decode kernel, by the compiler's schedule for v5e.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import Backend
from pallas_kernels.kv_write import LANES, PageLayout

_BANKS = 32  # of VMEM, for rows of 128 words
_ROWS_AT_ONCE = 24  # three strided loads of eight rows a cycle: each in a bank of its own
_COPIES_UNROLLED = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PageBlock:
    """The geometry of a block of pages. Static.

    Methods that start, await and load take `buffers`, two blocks of VMEM that `scratch` asks for,
    and the number of one of them, `slot`.
    """

    layout: PageLayout  # "pairs" or "packed"
    dtype: jax.typing.DTypeLike  # of the cache
    num_pages: int  # a block
    halves_first: bool = False  # take words apart in two steps: less work from v6e on, more before

    @property
    def page_size(self) -> int:
        return self.layout.page[0]

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def width(self) -> int:
        """Columns of a row: a multiple of 128."""
        return self.layout.page[2]

    @property
    def packing(self) -> int:
        """Rows of the C axis in a word."""
        return 4 // jnp.dtype(self.dtype).itemsize

    @property
    def words(self) -> int:
        """Rows of words in a token."""
        return self.layout.page[1] // self.packing

    @property
    def stride(self) -> int:
        """Rows of words from a token to the next in VMEM: one more than `words` where the rows of
        a strided load would otherwise lie in the same few banks.
        """
        banks = {index * self.words % _BANKS for index in range(_ROWS_AT_ONCE)}
        return self.words + (self.words > 1 and len(banks) < _ROWS_AT_ONCE)

    @property
    def scratch(self) -> Any:
        """The scratch shape of `buffers`."""
        shape = (2, self.num_tokens, self.stride, self.packing, self.width)
        return pltpu.VMEM(shape, jnp.dtype(self.dtype))

    @property
    def num_bytes(self) -> int:
        """VMEM that `buffers` take."""
        return 2 * self.num_tokens * self.stride * self.width * 4

    def view(self, kv_pages: Array) -> Array:
        """The cache `[L * num_pages, page_size, C, W]` as a kernel takes it, in words:
        [L * num_pages, page_size, words, packing, W]. The bytes are the same, so it is no copy.
        """
        return kv_pages.reshape(-1, self.page_size, self.words, self.packing, self.width)

    def start(
        self,
        kv_hbm: Any,  # what `view` made
        buffers: Any,
        semaphores: Any,  # DMA, [2]
        slot: Array,
        page_of: Callable[[Any], Any],  # the page of kv_hbm that is the block's index-th
        count: Array,
    ) -> None:
        """Start to copy a block's first `count` pages, of 1 ... num_pages, to a buffer.

        What lies behind them in the buffer stays: what was there before, or never written.
        """

        def start_page(index: Any) -> None:
            page = kv_hbm.at[page_of(index)]
            self._copy(page, buffers, semaphores, slot, index).start()

        step = min(self.num_pages, _COPIES_UNROLLED)
        num_steps = divide(count, step)

        @pl.loop(0, num_steps)
        def _(number: Array) -> None:
            for index in range(step):
                start_page(number * step + index)

        @pl.loop(num_steps * step, count)
        def _(index: Array) -> None:
            start_page(index)

    def wait(self, kv_hbm: Any, buffers: Any, semaphores: Any, slot: Array, count: Array) -> None:
        """Wait for the `count` pages that `start` began to copy to a buffer."""

        @pl.when(count == self.num_pages)
        def _() -> None:  # a semaphore counts bytes: one wait for all the pages
            block = buffers.at[slot, :, pl.ds(0, self.words)]
            pltpu.make_async_copy(block, block, semaphores.at[slot]).wait()

        @pl.when(count < self.num_pages)
        def _() -> None:
            @pl.loop(0, count)
            def _(index: Array) -> None:
                self._copy(kv_hbm.at[0], buffers, semaphores, slot, index).wait()

    def _copy(self, page: Any, buffers: Any, semaphores: Any, slot: Array, index: Any) -> Any:
        tokens = pl.ds(index * self.page_size, self.page_size)
        to = buffers.at[slot, tokens, pl.ds(0, self.words)]
        return pltpu.make_async_copy(page, to, semaphores.at[slot])

    def load(
        self, buffers: Any, slot: Any, word: int, first: Any, count: int, *, interpret: bool
    ) -> list[Array]:
        """Rows `word * packing` ... of C of `count` tokens from `first`.

        That is `packing` arrays [count, W] of the cache's dtype. With `interpret` they are plain
        loads, as Pallas' interpreter has no reshaped references: the same values by other
        instructions.
        """
        if interpret:
            tokens = pl.ds(first, count)
            return [buffers[slot, tokens, word, index, :] for index in range(self.packing)]
        folds = self.width // LANES
        rows = buffers.bitcast(jnp.uint32).at[slot].reshape(-1, LANES)
        step = self.stride * folds
        parts = [
            rows[pl.ds(first * step + word * folds + fold, count, stride=step), :]
            for fold in range(folds)
        ]
        words = parts[0] if folds == 1 else jnp.concatenate(parts, axis=1)  # [count, W]
        elements = _elements(words, self.packing, halves_first=self.halves_first)
        return [pltpu.bitcast(x, jnp.dtype(self.dtype)) for x in elements]


def _elements(words: Array, packing: int, *, halves_first: bool) -> list[Array]:
    """The elements of uint32 words, from the lowest bits on: `packing` arrays of their shape."""
    if packing == 4 and halves_first:
        elements = []
        for shift in (0, 16):
            half = (words >> shift).astype(jnp.uint16)
            upper = pltpu.bitcast(pltpu.bitcast(half, jnp.uint32) >> 8, jnp.uint16)
            elements += [half.astype(jnp.uint8), upper.astype(jnp.uint8)]
        return elements
    if packing == 1:
        return [words]
    bits = 32 // packing
    return [(words >> (bits * index)).astype(f"uint{bits}") for index in range(packing)]


class BlockRows:
    """Keys and values of the heads of some tokens of a block, each word loaded once."""

    def __init__(
        self,
        block: PageBlock,
        buffers: Any,
        slot: Any,
        first: Any,  # token of the block
        count: int,
        dtype: jax.typing.DTypeLike,
        *,
        interpret: bool,
    ) -> None:
        self._block, self._dtype, self._interpret = block, jnp.dtype(dtype), interpret
        self._where = (buffers, slot)
        self._tokens = (first, count)
        self._words: dict[int, list[Array]] = {}

    def key(self, head: int) -> Array:
        """[count, layout.width]; a packed layout has the value in the right half of it."""
        return self._rows(head if self._is_packed else 2 * head)

    def value(self, head: int) -> Array:
        """[count, layout.width]; a packed layout has the key in the left half of it."""
        return self._rows(head if self._is_packed else 2 * head + 1)

    @property
    def _is_packed(self) -> bool:
        return self._block.layout.kind == "packed"

    def _rows(self, number: int) -> Array:
        """The number-th key or value: its rows side by side."""
        folds = self._block.layout.folds
        rows = [self._row(row) for row in range(number * folds, (number + 1) * folds)]
        return rows[0] if folds == 1 else jnp.concatenate(rows, axis=1)

    def _row(self, row: int) -> Array:
        word, index = divmod(row, self._block.packing)
        if word not in self._words:
            self._words[word] = self._block.load(
                *self._where, word, *self._tokens, interpret=self._interpret
            )
        return operand(self._words[word][index], self._dtype, interpret=self._interpret)


def operand(x: Array, dtype: jnp.dtype, *, interpret: bool) -> Array:
    """Keys or values in the form in which they multiply arrays of `dtype`.

    The matrix unit takes 8-bit floats beside bfloat16. To convert them on the vector units first
    costs v6e 4,900 cycles for 1024 tokens of 8 heads, instead of 1,390 in all.
    """
    is_float8 = x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.floating)
    if is_float8 and dtype == jnp.bfloat16 and not interpret:
        return x
    return x.astype(dtype)


class PageLists:
    """The page tables of a few rows in SMEM, copied in ahead of their use.

    The whole table may not fit: SMEM has 1 MiB, which 256 rows of 32k tokens in pages of 32 fill.
    Lists are taken in turns, one after the other; `RING` of them can be there at a time.
    """

    RING = 4  # a power of two

    def __init__(self, table_hbm: Any, lists: Any, semaphores: Any) -> None:
        """References: to what `padded` made, in HBM, and to what `scratch` made."""
        self._table, self._lists, self._semaphores = table_hbm, lists, semaphores
        self._width = table_hbm.shape[1]

    @staticmethod
    def padded(page_table: Array) -> Array:
        """A page table [B, P] with P a multiple of 128, of which copies can be made."""
        return jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % LANES)))

    @classmethod
    def scratch(cls, page_table: Array) -> list[Any]:
        """Scratch shapes of `lists` and `semaphores`, for what `padded` made."""
        lists = pltpu.SMEM((cls.RING * page_table.shape[1],), jnp.int32)
        return [lists, pltpu.SemaphoreType.DMA((cls.RING,))]

    def start(self, row: Any, turn: Any) -> None:
        """Start to copy a row's list, as the `turn`-th. That of turn - RING is lost."""
        self._copy(row, turn).start()

    def wait(self, turn: Any) -> None:
        """Wait for it."""
        self._copy(0, turn).wait()

    def page(self, turn: Any, index: Any) -> Any:
        """The id of its index-th page within a layer."""
        return self._lists[(turn & (self.RING - 1)) * self._width + index]

    def _copy(self, row: Any, turn: Any) -> Any:
        slot = turn & (self.RING - 1)
        to = self._lists.at[pl.ds(slot * self._width, self._width)]
        return pltpu.make_async_copy(self._table.at[row], to, self._semaphores.at[slot])


def interpreter(backend: Backend) -> Any:
    """What `pallas_call` takes as `interpret`."""
    return pltpu.InterpretParams(detect_races=True) if backend.interpret else False


def divide(x: Any, by: int) -> Any:
    """x // by for x >= 0; a shift for a power of two."""
    if by & (by - 1) == 0:
        return x >> (by.bit_length() - 1)
    return lax.div(x, by)

"""Ragged batches over scattered pages, for checks and benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.types import PageMetadata


@dataclass(frozen=True, kw_only=True)
class RaggedShape:
    """A ragged batch: each row's (query tokens, kv tokens those included), decode rows first."""

    rows: Sequence[tuple[int, int]]
    num_tokens: int  # T, padding included
    max_rows: int  # B
    table_pages: int = 64  # P
    shared_tokens: int = 0  # a prefix that all rows share

    @property
    def num_decode_rows(self) -> int:
        """Leading rows of one token."""
        single = [num_queries == 1 for num_queries, _ in self.rows]
        return single.index(False) if False in single else len(single)


def scatter_pages(
    shape: RaggedShape, *, page_size: int, seed: int = 1
) -> tuple[PageMetadata, np.ndarray]:
    """Shuffled pages for the rows of a shape, the shared prefix on the same ones.

    Returns also the slots of all the rows' older tokens, each once. There are as many pages as the
    rows need, besides the null page.
    """
    rng = np.random.default_rng(seed)
    shared = shape.shared_tokens // page_size
    own = [-(-kv_len // page_size) - shared for _, kv_len in shape.rows]
    num_pages = 1 + shared + sum(own)
    free = list(rng.permutation(np.arange(1, num_pages)).astype(np.int32))
    prefix = [free.pop() for _ in range(shared)]
    table = np.zeros((shape.max_rows, shape.table_pages), np.int32)
    slots = np.zeros(shape.num_tokens, np.int32)
    kv_lens = np.zeros(shape.max_rows, np.int32)
    num_queries = np.zeros(shape.max_rows, np.int32)
    older, token = [], 0
    for row, (queries, kv_len) in enumerate(shape.rows):
        ids = np.array(prefix + [free.pop() for _ in range(own[row])], np.int32)
        table[row, : len(ids)] = ids
        positions = np.arange(kv_len)
        where = ids[positions // page_size] * page_size + positions % page_size
        slots[token : token + queries] = where[kv_len - queries :]
        older.append(where[: kv_len - queries])
        kv_lens[row], num_queries[row] = kv_len, queries
        token += queries
    starts = np.zeros(shape.max_rows + 1, np.int32)
    np.cumsum(num_queries, out=starts[1:])
    pages = PageMetadata(
        page_table=jnp.asarray(table),
        slots=jnp.asarray(slots),
        kv_lens=jnp.asarray(kv_lens),
        query_starts=jnp.asarray(starts),
        num_rows=jnp.int32(len(shape.rows)),
        num_decode_rows=jnp.int32(shape.num_decode_rows),
        num_pages=num_pages,
    )
    return pages, np.unique(np.concatenate([*older, np.zeros(0, np.int32)])).astype(np.int32)

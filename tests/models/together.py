"""A model run without an engine: several sequences in one batch, over scattered pages."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.layers.kernels import PageMetadata
from jaxserve.models.spec import ModelBatch
from tests.models.alone import ModelAlone


class Together:
    """Sequences that share the caches of a model; each has pages of its own in each KV group.

    All steps are padded to `num_tokens`, and compiled once, without XLA's costly optimizations.
    Pages that a window has left behind are given back: the table says 0.
    """

    def __init__(self, model: ModelAlone, *, num_rows: int, max_len: int, num_tokens: int) -> None:
        self.model = model
        self.run = jax.jit(model._forward, compiler_options={"xla_backend_optimization_level": 0})
        self.num_rows = num_rows
        self.num_tokens = num_tokens
        self.pages_a_row = -(-max_len // model.page_size)
        model.num_pages = num_rows * self.pages_a_row + 1
        pages = np.random.default_rng(1).permutation(np.arange(1, model.num_pages))
        self.table = pages.astype(np.int32).reshape(num_rows, self.pages_a_row)
        self.empty()

    def empty(self) -> None:
        """Forgets all sequences."""
        self.caches = self.model._empty()
        self.lengths = [0] * self.num_rows

    def feed(self, tokens: Mapping[int, Sequence[int] | np.ndarray]) -> dict[int, np.ndarray]:
        """Feeds each sequence its next tokens; the logits [T, V] of each one's tokens."""
        order = sorted(
            tokens, key=lambda row: len(tokens[row]) != 1
        )  # those that decode come first
        width = self.num_tokens
        ids, positions, starts, ends = [], [], [0], []
        slots: list[int] = []
        size = self.model.page_size
        for row in order:
            first, count = self.lengths[row], len(tokens[row])
            at = np.arange(first, first + count)
            ids += list(tokens[row])
            positions += at.tolist()
            slots += (self.table[row][at // size] * size + at % size).tolist()
            starts.append(len(ids))
            ends.append(first + count)
        idle = self.num_rows - len(order)

        def padded(values: list[int], length: int) -> jnp.ndarray:
            return jnp.asarray([*values, *[0] * (length - len(values))], jnp.int32)

        def pages(window: int | None) -> PageMetadata:
            table = np.zeros_like(self.table)
            for i, row in enumerate(order):
                seen_from = 0 if window is None else max(self.lengths[row] + 1 - window, 0)
                kept = slice(seen_from // size, -(-ends[i] // size))
                table[i, kept] = self.table[row, kept]
            return PageMetadata(
                page_table=jnp.asarray(table),
                slots=padded(slots, width),
                kv_lens=padded(ends, self.num_rows),
                query_starts=jnp.asarray([*starts, *[starts[-1]] * idle], jnp.int32),
                num_rows=jnp.int32(len(order)),
                num_decode_rows=jnp.int32(sum(len(t) == 1 for t in tokens.values())),
                num_pages=self.model.num_pages,
            )

        batch = ModelBatch(
            token_ids=padded(ids, width),
            positions=padded(positions, width),
            pages=tuple(pages(group.window) for group in self.model.spec.kv_groups),
        )
        logits, self.caches = self.run(self.model.weights, self.caches, batch)
        logits = np.asarray(logits)
        for row in order:
            self.lengths[row] += len(tokens[row])
        return {row: logits[starts[i] : starts[i + 1]] for i, row in enumerate(order)}

"""A model run without an engine: one sequence, in chunks, over pages in a scattered order."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint import Checkpoint
from jaxserve.layers.kernels import XLA, Kernels, PageMetadata, kv_pages_shape
from jaxserve.models import registry
from jaxserve.models.spec import ModelBatch
from jaxserve.runner.model import split_model
from jaxserve.weights.loader import load_weights


class ModelAlone:
    """A checkpoint's model with float32 weights and caches."""

    def __init__(
        self, checkpoint: Checkpoint, *, scan: bool, max_len: int, page_size: int = 8
    ) -> None:
        self.spec = registry.spec_from_config(checkpoint.config).for_context(max_len)
        self.split = split_model(
            self.spec,
            page_size=page_size,
            kernels=Kernels(XLA),
            dtype=jnp.float32,
            scan_layers=scan,
        )
        names = registry.weight_names(checkpoint.config, self.spec)
        sources = self.split.sources(names, checkpoint.tensors)
        loaded = load_weights(checkpoint, sources, dtype=jnp.float32, ignored=names.ignored)
        self.weights = [loaded[name] for name in self.split.names]
        self.page_size = page_size
        self.num_pages = -(-max_len // page_size) + 1
        self._run = jax.jit(self._forward)

    def _forward(self, weights: list, caches: tuple, batch: ModelBatch) -> tuple:
        model = self.split.merge(weights)
        hidden, caches = model(batch, caches)
        return model.logits(hidden), caches

    def logits(self, tokens: np.ndarray, chunks: list[int] | None = None) -> np.ndarray:
        """Logits [T, V] of a sequence that is fed in chunks (None: in one)."""
        caches, rows, done = self._empty(), [], 0
        for size in chunks or [len(tokens)]:
            logits, caches = self.step(tokens[done : done + size], done, caches)
            rows.append(np.asarray(logits))
            done += size
        return np.concatenate(rows)

    def greedy(self, prompt: np.ndarray, count: int) -> list[int]:
        """The `count` likeliest tokens that follow, decoded one at a time."""
        logits, caches = self.step(prompt, 0, self._empty())
        tokens = [int(np.argmax(logits[-1]))]
        while len(tokens) < count:
            position = len(prompt) + len(tokens) - 1
            logits, caches = self.step(np.asarray(tokens[-1:]), position, caches)
            tokens.append(int(np.argmax(logits[-1])))
        return tokens

    def step(self, tokens: np.ndarray, first: int, caches: tuple) -> tuple[np.ndarray, tuple]:
        """One step of tokens whose positions begin at `first`."""
        size, count = self.page_size, len(tokens)
        order = np.random.default_rng(0).permutation(np.arange(1, self.num_pages))
        table = order.astype(np.int32)
        positions = np.arange(first, first + count)
        pages = PageMetadata(
            page_table=jnp.asarray(table[None]),
            slots=jnp.asarray(table[positions // size] * size + positions % size),
            kv_lens=jnp.asarray([first + count]),
            query_starts=jnp.asarray([0, count]),
            num_rows=jnp.asarray(1),
            num_decode_rows=jnp.asarray(int(count == 1)),
            num_pages=self.num_pages,
        )
        batch = ModelBatch(
            token_ids=jnp.asarray(tokens),
            positions=jnp.asarray(positions),
            pages=(pages,) * len(self.spec.kv_groups),
        )
        logits, caches = self._run(self.weights, caches, batch)
        return np.asarray(logits), caches

    def _empty(self) -> tuple:
        """Caches of NaN: what is not written must not be read."""
        caches = []
        for group in self.spec.kv_groups:
            kv = group.attention.attention(page_size=self.page_size, dtype=jnp.float32).kv
            shape = kv_pages_shape(kv, group.num_layers, self.num_pages, backend=XLA)
            caches.append(jnp.full(shape.shape, jnp.nan, shape.dtype))
        return tuple(caches)

"""The device's side of a step, as functions to be compiled once for each token bucket."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.runner.batch import Layout, unpack
from jaxserve.runner.model import SplitModel
from jaxserve.runner.row_state import RowState
from jaxserve.runner.sampler import Sampled, logprobs_of, sample

PROMPT_CHUNK = 32  # tokens whose prompt log-probabilities are computed at a time


class DeviceState(NamedTuple):
    """All that a step changes; donated."""

    kv_pages: tuple[Array, ...]  # per group
    rows: RowState


StepFunction = Callable[
    [list[Array], DeviceState, Array, Array], tuple[DeviceState, Sampled, Array]
]


def make_step(
    layout: Layout, split: SplitModel, *, num_pages: tuple[int, ...], max_logprobs: int
) -> StepFunction:
    """(weights, state, upload, masks) -> (state, sampled, hidden [T, D]) for a token bucket.

    The forward pass, the gather of the rows that sample, the head, sampling, and the feedback of
    the drawn tokens to the next step are one executable.
    """

    def step(
        weights: list[Array], state: DeviceState, blob: Array, masks: Array
    ) -> tuple[DeviceState, Sampled, Array]:
        model = split.merge(weights)
        inputs = unpack(layout, blob, masks, state.rows, num_pages=num_pages)
        hidden, kv_pages = model(inputs.batch, state.kv_pages)  # [T, D]
        rows = replace(
            state.rows,
            page_tables=inputs.page_tables,
            history=state.rows.history.at[inputs.owners, inputs.batch.positions].set(
                inputs.batch.token_ids
            ),
        )
        logits = model.logits(hidden[inputs.last_places])  # [B, V]
        sampled = sample(logits, inputs.sampling, rows, inputs.masks, max_logprobs=max_logprobs)
        last_tokens = rows.last_tokens.at[inputs.keep_at].set(sampled.token_ids)
        return DeviceState(kv_pages, replace(rows, last_tokens=last_tokens)), sampled, hidden

    return step


def make_prompt_logprobs(
    num_tokens: int, split: SplitModel, *, max_logprobs: int
) -> Callable[[list[Array], Array, Array], tuple[Array, Array, Array]]:
    """(weights, hidden [T, D], targets [T]) -> ids and log-probabilities [T, 1 + K], ranks [T].

    Works through the tokens in chunks: logits [T, V] never exist at once.
    """
    chunk = min(PROMPT_CHUNK, num_tokens)
    padded = -(-num_tokens // chunk) * chunk

    def score(weights: list[Array], hidden: Array, targets: Array) -> tuple[Array, Array, Array]:
        model = split.merge(weights)

        def one(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            return logprobs_of(model.logits(inputs[0]), inputs[1], max_logprobs=max_logprobs)

        hidden = jnp.pad(hidden, ((0, padded - num_tokens), (0, 0)))
        targets = jnp.pad(targets, (0, padded - num_tokens))
        chunks = (hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk))
        results = jax.lax.map(one, chunks)
        return jax.tree.map(lambda x: x.reshape(padded, *x.shape[2:])[:num_tokens], results)

    return score

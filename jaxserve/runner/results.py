"""Reading a step's results back from the device."""

from dataclasses import dataclass

import jax
import numpy as np
from jax import Array

from jaxserve.request import TokenLogprobs
from jaxserve.runner.sampler import Sampled
from jaxserve.step import SampledRow, StepPlan


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of the prompt tokens that follow a step's tokens."""

    ids: Array  # [T, 1 + K] int32: the token that follows, then the top K
    logprobs: Array  # [T, 1 + K] float32
    ranks: Array  # [T] int32
    spans: dict[int, tuple[int, int, int]]  # seq_id -> first, past the last, how many of K


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that the device works on.

    What reading it needs of the rows' parameters is kept here: by then a row may be another's.
    """

    plan: StepPlan
    sampled: Sampled
    num_logprobs: np.ndarray  # [B]; -1: none wanted
    prompt_scores: PromptScores | None
    hidden: Array | None  # [T, D], when a row pools
    launched_s: float


def read(launched: Launched) -> tuple[SampledRow, ...]:
    """Blocks until the step is done; one entry for each row of its plan."""
    sampled, scores = launched.sampled, launched.prompt_scores
    token_ids = np.asarray(sampled.token_ids).tolist()
    arrays = prompt_arrays = None
    if (launched.num_logprobs >= 0).any():  # downloaded only when somebody asks
        arrays = jax.device_get((sampled.logprob_ids, sampled.logprobs, sampled.ranks))
    if scores is not None:
        prompt_arrays = jax.device_get((scores.ids, scores.logprobs, scores.ranks))
    hidden = None if launched.hidden is None else np.asarray(launched.hidden)
    last = -1  # of the step's tokens, the row's last one
    rows = []
    for i, row in enumerate(launched.plan.rows):
        logprobs = prompt_logprobs = None
        wanted = int(launched.num_logprobs[i])
        if arrays is not None and wanted >= 0:
            logprobs = (_entry(arrays, i, wanted),)
        if scores is not None and prompt_arrays is not None and row.seq_id in scores.spans:
            start, end, count = scores.spans[row.seq_id]
            prompt_logprobs = tuple(_entry(prompt_arrays, j, count) for j in range(start, end))
        last += row.num_tokens
        pooled = None
        if hidden is not None and row.pools:
            pooled = hidden[last].astype(np.float32)
        new = (token_ids[i],) if row.samples else ()
        rows.append(SampledRow(row.seq_id, new, logprobs, prompt_logprobs, pooled))
    return tuple(rows)


def _entry(arrays: tuple[np.ndarray, ...], i: int, count: int) -> TokenLogprobs:
    ids, values, ranks = arrays
    return TokenLogprobs(
        tuple(ids[i, : 1 + count].tolist()), tuple(values[i, : 1 + count].tolist()), int(ranks[i])
    )

"""What crosses between the scheduler and the runner, once a step. Pure data: no JAX."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxserve.request import Request, TokenDelta, TokenLogprobs


class RowPlan(NamedTuple):
    """One sequence's share of a step.

    A NamedTuple because 256 of these are built each step. `num_tokens` tokens are computed at
    positions `num_computed_tokens ...`. Their ids are `token_ids`, except that an empty
    `token_ids` means the single newest token, which is still on the device.
    """

    seq_id: int  # unique for the life of the engine; results are matched by it, never by row
    row: int  # place in the device's row state, 0 <= row < max_num_seqs
    token_ids: tuple[int, ...]
    num_computed_tokens: int
    num_tokens: int
    # Per KV group; appended to the row's page table. There, pages that a window has passed stay
    # named, and others write them: whoever attends must not read what lies before the window.
    new_block_ids: tuple[tuple[int, ...], ...]
    samples: bool  # the last of the tokens yields logits and a new token
    wants_prompt_logprobs: bool = False  # score these (prompt) tokens' successors
    pools: bool = False  # with `samples`: the hidden state is wanted, too


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """A sequence that takes a row: first admission, or resumption after a preemption.

    `token_ids` are all tokens known so far (prompt, then output); `block_ids` the blocks it already
    holds before this step's `new_block_ids` (prefix-cache hits and blocks shared with a sibling),
    the null block where its group's window has passed already.
    """

    seq_id: int
    row: int
    request: Request
    choice: int  # 0 <= choice < request.sampling.n
    token_ids: tuple[int, ...]
    block_ids: tuple[tuple[int, ...], ...]  # per KV group


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """All work of one step. Rows that decode (one token, sampled) come first, then prefill rows."""

    rows: tuple[RowPlan, ...]
    new_rows: tuple[NewRow, ...]
    num_tokens: int  # sum over rows; at most max_num_batched_tokens
    # By seq_id, of the rows that sample by a grammar: uint32, bit i of word i // 32 for token i.
    token_masks: Mapping[int, np.ndarray] = field(default_factory=dict)


NO_TOKEN = -2


class SampledRow(NamedTuple):
    """What one row produced. `token_ids` is empty for a row that did not sample.

    A token id of -1 means that the logits are not numbers, NO_TOKEN that all are impossible.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None  # one per token id, when asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # for positions computed + 1 ...
    pooled: np.ndarray | None = None  # [D] float32: the hidden state that was sampled from


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step produced; `rows` has an entry for every row of the plan, in the plan's order."""

    rows: tuple[SampledRow, ...]
    finished_s: float  # time.monotonic() when the result was on the host
    device_s: float  # seconds the host waited for, or saw, the device work on this step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Figures of one step, for logs, metrics and benchmarks."""

    num_running: int
    num_waiting: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_used_blocks: int  # of the KV group of which the largest share is in use
    num_free_blocks: int  # of the same group; free or evictable
    # Token places in the blocks, of all groups, that running sequences hold; shared ones once.
    num_allocated_slots: int
    num_written_slots: int  # of those, places that hold a token
    num_preemptions: int  # since start
    num_prefix_queries: int  # tokens looked up in the prefix cache since start
    num_prefix_hits: int  # tokens found there since start
    host_s: float  # scheduling, batch building and update of this step
    device_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOutput:
    """One message from the engine to its client, at most one a step."""

    deltas: tuple[TokenDelta, ...]
    stats: StepStats | None = None
    error: str | None = None  # the engine has stopped; this is its last message

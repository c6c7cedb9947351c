"""`Draft`: a step plan in the making."""

from dataclasses import dataclass, field

import numpy as np

from jaxserve.scheduler.kv_blocks import BlockIds
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step import NewRow, RowPlan, StepPlan


@dataclass(slots=True, kw_only=True)
class Draft:
    """Collects the rows of one step, and what the scheduler must remember until they are all in."""

    number: int  # of the step, from 1
    max_num_tokens: int
    budget: int = 0  # tokens left
    decodes: list[RowPlan] = field(default_factory=list)
    chunks: list[RowPlan] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    unfinished: list[Sequence] = field(default_factory=list)  # running, lacking more than a token
    uncounted: list[tuple[Sequence, int]] = field(default_factory=list)  # tokens not yet computed
    masks: dict[int, np.ndarray] = field(default_factory=dict)  # by seq_id
    lacks_blocks: bool = False  # a running sequence sits out, or has had another preempted

    def __post_init__(self) -> None:
        self.budget = self.max_num_tokens

    def add_new_row(self, seq: Sequence, shared: BlockIds) -> None:
        """Tells the runner of a sequence that takes a row, with blocks that others computed."""
        self.new_rows.append(
            NewRow(
                seq_id=seq.seq_id,
                row=seq.row,
                request=seq.request,
                choice=seq.choice,
                token_ids=seq.token_ids(0, seq.num_tokens),
                block_ids=shared,
            )
        )

    def add(self, seq: Sequence, num_tokens: int, new_blocks: BlockIds) -> None:
        """Adds a row of one token or more.

        Its tokens stay `uncounted` until the draft is complete, because no row may read what
        another row of the same step writes.
        """
        start = seq.num_computed_tokens
        end = start + num_tokens
        samples = end == seq.num_tokens
        row = RowPlan(
            seq_id=seq.seq_id,
            row=seq.row,
            token_ids=seq.token_ids(start, end),  # empty for a token still on the device
            num_computed_tokens=start,
            num_tokens=num_tokens,
            new_block_ids=new_blocks,
            samples=samples,
            wants_prompt_logprobs=seq.wants_prompt_logprobs(start, end),
            pools=samples and seq.request.pools,
        )
        (self.decodes if samples and num_tokens == 1 else self.chunks).append(row)
        self.uncounted.append((seq, num_tokens))
        self.budget -= num_tokens
        seq.last_step = self.number
        if samples:
            seq.num_tokens += 1
            seq.num_pending_tokens += 1
            if seq.grammar is not None and seq.grammar.mask is not None:
                self.masks[seq.seq_id] = seq.grammar.mask

    def plan(self) -> StepPlan | None:
        """The finished plan: decode rows first; None if there are no rows."""
        if not self.decodes and not self.chunks:
            return None
        return StepPlan(
            rows=(*self.decodes, *self.chunks),
            new_rows=tuple(self.new_rows),
            num_tokens=self.max_num_tokens - self.budget,
            token_masks=self.masks,
        )

"""`Scheduler`: chooses, step by step, which tokens of which sequences are computed."""

import time
from bisect import insort
from operator import attrgetter
from typing import Literal

from jaxserve.errors import RequestError
from jaxserve.kv_group import HEADROOM, KVGroup
from jaxserve.request import Abort, Request, RequestTimes, TokenDelta
from jaxserve.scheduler.backlog import Backlog
from jaxserve.scheduler.block_pool import BlockPool
from jaxserve.scheduler.draft import Draft
from jaxserve.scheduler.grammar import Grammars
from jaxserve.scheduler.kv_blocks import BlockIds, KVBlocks
from jaxserve.scheduler.limits import Limits
from jaxserve.scheduler.sequence import NO_ROW, Sequence
from jaxserve.step import RowPlan, StepPlan, StepResult, StepStats


class Scheduler:
    """One loop without phases: every sequence's computed tokens catch up with its tokens.

    Each step has one token budget. It goes first to running sequences that need one token (they
    decode), then to running sequences that need more (chunks of prompts), then to waiting ones,
    each in the order of standing: priority (under that policy), then arrival. When blocks run out,
    the running sequence of the lowest standing is preempted: it gives back all of its blocks,
    waits, and is computed again. Whoever stands first can always go on, so every request finishes.

    `schedule()` may run one or more steps ahead of `update()`. Both see the plans in the same
    order, and a plan is launched before `schedule` or `accept` is called again; the device runs
    plans in order, so what was freed may be written again by the next one, and a block that a
    row's window has passed by this one already. Only `check` may be called from another thread.

    Args:
        groups: The KV groups: blocks and windows.
        block_size: Tokens in a block, in every group.
        max_num_seqs: Rows.
        max_num_batched_tokens: Token budget of a draft.
        max_model_len: Tokens of a sequence, prompt and output.
        grammars: Finds the masks of requests that have one; None: such requests are refused.

    Raises:
        ConfigError: The arguments do not go together.
    """

    def __init__(
        self,
        *,
        groups: tuple[KVGroup, ...],
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        policy: Literal["fcfs", "priority"] = "fcfs",
        grammars: Grammars | None = None,
    ) -> None:
        self._limits = Limits(
            groups=groups,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_chunked_prefill=enable_chunked_prefill,
        )
        self._blocks = KVBlocks(
            groups=groups,
            block_size=block_size,
            step_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
        )
        self._grammars = grammars
        self._backlog = Backlog(by_priority=policy == "priority", num_groups=len(groups))
        self._running: list[Sequence] = []  # by standing
        self._parked: list[Sequence] = []  # taken out of line until their masks are ready
        self._free_rows = list(reversed(range(max_num_seqs)))
        # The head that found no room, the pool that lacked blocks, and how many that had.
        self._refused: tuple[int, BlockPool, int] = (-1, self._blocks.pools[0], 0)
        self._num_planned_steps = 0
        self._num_updated_steps = 0
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self.num_finished = 0  # sequences since start
        self.num_aborted = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting or running."""
        return not self._backlog.live

    @property
    def num_held_blocks(self) -> tuple[int, ...]:
        """Blocks in use, of each KV group."""
        return tuple(pool.num_held for pool in self._blocks.pools)

    def check(self, request: Request) -> None:
        """Refuses what could never run. Thread-safe: reads nothing that changes.

        Raises:
            RequestError: The request is empty, or longer than the model's limit or the KV cache.
        """
        self._limits.check(request)

    def accept(self, command: Request | Abort) -> list[TokenDelta]:
        """Queues a request, or ends one and frees its blocks at once; unknown aborts are ignored.

        Returns:
            Nothing, or for a request that is refused one delta per choice with the error.
        """
        if isinstance(command, Abort):
            self._abort(command)
            return []
        try:
            self.check(command)
            if command.request_id in self._backlog:
                raise RequestError(
                    f"request_id {command.request_id!r} is in use; give each live request its own"
                )
            if command.grammar is not None and self._grammars is None:
                raise RequestError(
                    "structured_outputs need a tokenizer, and this engine has none; leave it out",
                    param="structured_outputs",
                )
        except RequestError as error:
            return [_refusal(command, choice, error) for choice in range(command.sampling.n)]
        choices = self._backlog.add(command)
        if command.grammar is not None and self._grammars is not None:
            states = self._grammars.open(command.grammar, [seq.seq_id for seq in choices])
            for seq, state in zip(choices, states, strict=True):
                seq.grammar = state
        return []

    def _abort(self, command: Abort) -> None:
        ended = self._backlog.named_by(command)
        for seq in ended:
            self._end(seq)
        self._running = [seq for seq in self._running if seq.row != NO_ROW]
        if command.finished:
            self.num_finished += len(ended)
        else:
            self.num_aborted += len(ended)

    def _end(self, seq: Sequence) -> None:
        """Takes a sequence out of everything but `_running`, which the caller filters once."""
        self._stop_running(seq)
        self._backlog.remove(seq)
        if seq.grammar is not None and self._grammars is not None:
            self._grammars.forget(seq.grammar)

    def _stop_running(self, seq: Sequence) -> None:
        if seq.row != NO_ROW:
            self._blocks.release(seq)
            self._free_rows.append(seq.row)
            seq.row = NO_ROW

    # -- Grammars ----------------------------------------------------------------------------------

    @property
    def awaits_masks(self) -> bool:
        """Whether threads look for masks, so that there is something to `collect_masks` later."""
        return self._grammars is not None and self._grammars.num_pending > 0

    def collect_masks(self) -> list[TokenDelta]:
        """Lets sequences go on whose masks have been found; ends those whose grammar has ended.

        Waits a little for masks that are about to be found. Call it before `schedule`.
        """
        if not self.awaits_masks or self._grammars is None:
            return []
        deltas: list[TokenDelta] = []
        for state in self._grammars.collect():
            seq = self._backlog.live.get(state.seq_id)
            if seq is None or not (state.ended or state.error):
                continue
            reason = "error" if state.error else "stop"
            deltas.append(seq.end(reason, state.error, time.monotonic()))
            self._end(seq)
        if deltas:
            self._running = [seq for seq in self._running if seq.row != NO_ROW]
            self.num_finished += len(deltas)
        parked, self._parked = self._parked, []
        for seq in parked:
            if seq.seq_id not in self._backlog.live:
                continue
            if seq.has_mask:
                self._backlog.push(seq)
            else:
                self._parked.append(seq)
        return deltas

    # -- Planning ----------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plans the next step, or returns None when there is nothing to launch now.

        None while requests are live means that they wait for the `update` of a launched step, or
        for masks.
        """
        draft = Draft(
            number=self._num_planned_steps + 1,
            max_num_tokens=self._limits.max_num_batched_tokens,
        )
        self._plan_decodes(draft)
        self._plan_chunks(draft)
        if not draft.lacks_blocks:  # else the newcomer would take what those who run wait for
            self._admit(draft)
        plan = draft.plan()
        if plan is not None:
            self._num_planned_steps = draft.number
        for seq, num_tokens in draft.uncounted:
            seq.num_computed_tokens += num_tokens
            self._blocks.remember(seq)
            self._backlog.release_followers(seq)
            self._blocks.slide(seq)  # for the next plan to write
        return plan

    def _plan_decodes(self, draft: Draft) -> None:
        """Plans running sequences that lack one token; notes those that lack more.

        This is the loop that runs for every row of every step, so it is written out flat. Its
        index stays right when `_make_room` preempts, because that removes from behind it.
        """
        running, number, budget, no_blocks = (
            self._running,
            draft.number,
            draft.budget,
            self._blocks.none,
        )
        index = 0
        while index < len(running) and budget > 0:
            seq = running[index]
            index += 1
            num_tokens = seq.num_tokens
            num_computed = seq.num_computed_tokens
            num_pending = seq.num_pending_tokens
            if num_pending and (
                num_tokens >= seq.max_total_tokens or seq.request.needs_host_tokens
            ):
                continue
            grammar = seq.grammar
            if grammar is not None and not grammar.ready:
                continue
            if num_tokens - num_computed > 1 or seq.followers:
                draft.unfinished.append(seq)
                continue
            new_blocks = no_blocks
            if num_computed == seq.num_slots:
                new_blocks = self._make_room(seq, num_tokens, draft)
                if new_blocks is None:
                    continue
            token_ids = () if num_pending else seq.token_ids(num_computed, num_tokens)
            draft.decodes.append(
                RowPlan(
                    seq.seq_id,
                    seq.row,
                    token_ids,
                    num_computed,
                    1,
                    new_blocks,
                    True,
                    False,
                    seq.request.pools,
                )
            )
            seq.last_step = number
            seq.num_computed_tokens = num_tokens
            seq.num_tokens = num_tokens + 1
            seq.num_pending_tokens = num_pending + 1
            if grammar is not None and grammar.mask is not None:
                draft.masks[seq.seq_id] = grammar.mask
            budget -= 1
        draft.budget = budget

    def _plan_chunks(self, draft: Draft) -> None:
        """Plans the next chunk of running sequences that lack more than one token."""
        for seq in draft.unfinished:
            if draft.budget == 0:
                return
            if seq.row == NO_ROW:  # preempted since it was noted
                continue
            num_tokens = min(seq.num_tokens - seq.num_computed_tokens, draft.budget)
            new_blocks = self._make_room(seq, seq.num_computed_tokens + num_tokens, draft)
            if new_blocks is not None:
                draft.add(seq, num_tokens, new_blocks)

    def _make_room(self, seq: Sequence, num_tokens: int, draft: Draft) -> BlockIds | None:
        """The blocks to hold `num_tokens` tokens, if need be those of sequences it outranks.

        None: the sequence sits this step out. That is no deadlock: the blocks are held by one of
        higher standing, which goes on, or by one that is in this step or in flight already.
        """
        while (new_blocks := self._blocks.grow(seq, num_tokens)) is None:
            if self._blocks.give_up_tails(self._running, draft.number):
                continue
            draft.lacks_blocks = True
            victim = next(s for s in reversed(self._running) if s.last_step != draft.number)
            if victim is seq:
                return None
            self._running.remove(victim)
            self._stop_running(victim)
            self._backlog.push(victim)
            self._num_preemptions += 1
        return new_blocks

    def _admit(self, draft: Draft) -> None:
        """Gives rows to waiting sequences, in order, while budget, rows and blocks last."""
        blocks = self._blocks
        while self._free_rows and draft.budget > 0 and (seq := self._backlog.head()) is not None:
            if seq.last_step > self._num_updated_steps:
                return  # preempted, and a launched step still has a token for it
            if not seq.has_mask:  # nobody waits behind it
                self._parked.append(self._backlog.pop())
                continue
            refused, pool, num_free = self._refused
            if self._running and refused == seq.seq_id and pool.num_free <= num_free:
                return  # nothing was freed since
            found = blocks.find(seq)
            shared = max(
                found, blocks.find_sibling(seq, self._running), key=lambda ids: len(ids[0])
            )
            num_shared = len(shared[0]) * blocks.block_size
            num_tokens = min(seq.num_tokens - num_shared, draft.budget)
            if num_shared + num_tokens < seq.num_tokens and not self._limits.enable_chunked_prefill:
                return
            # All known tokens must fit, not only the first chunk: two half-computed prompts that
            # wait for each other's blocks would help nobody.
            pool = blocks.lacking(
                seq.num_tokens,
                shared,
                chunk=num_tokens,
                headroom=HEADROOM if self._running else 0.0,
            )
            if pool is not None:
                self._refused = (seq.seq_id, pool, pool.num_free)
                return
            self._start(self._backlog.pop(), shared, len(found[0]) * blocks.block_size, draft)
            new_blocks = blocks.grow(seq, num_shared + num_tokens)
            if new_blocks is None:
                raise RuntimeError("a sequence was admitted without room")
            draft.add(seq, num_tokens, new_blocks)

    def _start(self, seq: Sequence, shared: BlockIds, num_hits: int, draft: Draft) -> None:
        """Gives a sequence a row, and blocks that others have computed for it."""
        self._blocks.share(seq, shared)
        seq.unstarted.discard(seq.choice)
        seq.row = self._free_rows.pop()
        insort(self._running, seq, key=attrgetter("standing"))
        if seq.scheduled_s == 0.0:  # neither resumed nor a follower
            seq.scheduled_s = time.monotonic()
            seq.num_cached_tokens = num_hits
            if self._blocks.may_read_cache(seq):
                self._num_prefix_queries += seq.num_tokens
                self._num_prefix_hits += num_hits
        draft.add_new_row(seq, shared)

    # -- Results -----------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Takes in what a step sampled; rows of sequences that have ended since are dropped."""
        self._num_updated_steps += 1
        deltas: list[TokenDelta] = []
        num_ended = 0
        live, block_size, finished_s = (
            self._backlog.live,
            self._blocks.block_size,
            result.finished_s,
        )
        for planned, sampled in zip(plan.rows, result.rows, strict=True):
            seq = live.get(sampled.seq_id)
            if seq is None:
                continue
            if sampled.prompt_logprobs is not None:
                seq.collect_prompt_logprobs(planned, sampled.prompt_logprobs)
            if not sampled.token_ids:
                continue
            delta = seq.append(sampled, finished_s)
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._end(seq)
                num_ended += 1
                continue
            if seq.grammar is not None and self._grammars is not None:
                self._grammars.advance(seq.grammar, delta.token_ids)
            if seq.num_computed_tokens // block_size > seq.num_remembered_blocks:
                self._blocks.remember(seq)
        if num_ended:
            self._running = [seq for seq in self._running if seq.row != NO_ROW]
            self.num_finished += num_ended
        return deltas

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; refuses (False) while sequences hold blocks."""
        if self._running:
            return False
        self._blocks.forget_all()
        return True

    def stats(
        self, plan: StepPlan | None, *, host_s: float = 0.0, device_s: float = 0.0
    ) -> StepStats:
        """The figures of now, and those of a plan, if there is one; the caller knows the times."""
        num_decodes = sum(row.num_tokens == 1 and row.samples for row in plan.rows) if plan else 0
        pools, tightest = self._blocks.pools, self._blocks.tightest
        num_allocated = sum(pool.num_held for pool in pools) * self._blocks.block_size
        # Shared blocks are full, so every place without a token belongs to one sequence only.
        num_unwritten = sum(seq.num_slots - seq.num_computed_tokens for seq in self._running)
        return StepStats(
            num_running=len(self._running),
            num_waiting=len(self._backlog.live) - len(self._running),
            num_prefill_tokens=plan.num_tokens - num_decodes if plan else 0,
            num_decode_tokens=num_decodes,
            num_used_blocks=tightest.num_held,
            num_free_blocks=tightest.num_free,
            num_allocated_slots=num_allocated,
            num_written_slots=num_allocated - num_unwritten * len(pools),
            num_preemptions=self._num_preemptions,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            host_s=host_s,
            device_s=device_s,
        )


def _refusal(request: Request, choice: int, error: RequestError) -> TokenDelta:
    return TokenDelta(
        request_id=request.request_id,
        choice=choice,
        token_ids=(),
        finish_reason="error",
        error=str(error),
        times=RequestTimes(arrival_s=request.arrival_s),
    )

"""A device without a model: it keeps what each page slot holds, and catches every wrong page.

The KV of a token is a hash of everything before it, so a row that attends to a page of someone
else's, to one not yet written, or to one written over, is caught at once. The next token is a
function of that hash and the choice, so each sequence has one right output, whatever ran beside it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from jaxserve.kv_group import KVGroup, first_block, most_blocks
from jaxserve.request import Abort, Request, TokenDelta, TokenLogprobs
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.step import RowPlan, SampledRow, StepPlan, StepResult

NUM_TOKEN_IDS = 12
EOS = 11


def make_request(
    request_id: str,
    prompt: tuple[int, ...] | int,
    max_tokens: int = 4,
    *,
    n: int = 1,
    min_tokens: int = 0,
    prompt_logprobs: int | None = None,
    skip_reading_prefix_cache: bool | None = None,
    **fields: object,
) -> Request:
    """A request of known prompt tokens, or of so many tokens; it never ends early by default."""
    tokens = tuple(range(prompt)) if isinstance(prompt, int) else prompt
    request = Request(
        request_id=request_id,
        prompt_token_ids=tokens,
        sampling=SamplingParams(
            n=n,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            prompt_logprobs=prompt_logprobs,
            skip_reading_prefix_cache=skip_reading_prefix_cache,
        ),
        max_tokens=max_tokens,
        eos_token_id=None,
    )
    return replace(request, **fields)  # type: ignore[arg-type]


def kv_of(parent: int, token_id: int) -> int:
    """What the page slot of a token holds, given what the slot before it holds."""
    return hash((parent, token_id))


def kv_root(request: Request) -> int:
    return hash((request.adapter, request.cache_salt))


def next_token(kv: int, choice: int) -> int:
    return hash((kv, choice, 1)) % NUM_TOKEN_IDS  # no text: its hash differs between runs


def score(kv: int, token_id: int) -> TokenLogprobs:
    """The prompt log-probability that the device reports for a token after a context."""
    return TokenLogprobs((token_id,), (float(kv % 1000),), 1)


def expected_output(request: Request, choice: int) -> tuple[tuple[int, ...], str, int | None]:
    """The tokens, finish reason and stop reason of a choice that runs alone."""
    kv = kv_root(request)
    for token_id in request.prompt_token_ids:
        kv = kv_of(kv, token_id)
    output: list[int] = []
    while True:
        output.append(next_token(kv, choice))
        kv = kv_of(kv, output[-1])
        if len(output) >= request.sampling.min_tokens:
            if output[-1] == request.eos_token_id:
                return tuple(output), "stop", None
            if output[-1] in request.stop_token_ids:
                return tuple(output), "stop", output[-1]
        if len(output) == request.max_tokens:
            return tuple(output), "length", None


def expected_prompt_logprobs(request: Request) -> tuple[TokenLogprobs | None, ...]:
    kv = kv_root(request)
    scores: list[TokenLogprobs | None] = [None]
    for token_id, following in zip(
        request.prompt_token_ids, request.prompt_token_ids[1:], strict=False
    ):
        kv = kv_of(kv, token_id)
        scores.append(score(kv, following))
    return tuple(scores)


class _Row:
    """The row state that a runner keeps on the device."""

    def __init__(self, request: Request, choice: int, tokens: list[int], table: list[list[int]]):
        self.request, self.choice, self.tokens, self.table = request, choice, tokens, table
        self.num_computed_tokens = 0


class FakeRunner:
    """Runs plans in order and checks each of them.

    Of each group a row reads what its window shows, and only that: a page that the window has
    passed may hold anything.
    """

    def __init__(
        self,
        *,
        windows: tuple[int | None, ...],
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.windows = windows
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.pages: dict[tuple[int, int, int], int] = {}  # (group, page, offset) -> KV
        self.rows: dict[int, tuple[int, _Row]] = {}  # row -> seq_id and its state
        self.num_computed_tokens = 0

    def run(self, plan: StepPlan) -> StepResult:
        self._check_shape(plan)
        for new in plan.new_rows:
            table = [list(ids) for ids in new.block_ids]
            row = _Row(new.request, new.choice, list(new.token_ids), table)
            row.num_computed_tokens = len(table[0]) * self.block_size
            self.rows[new.row] = new.seq_id, row
        read: dict[tuple[int, int, int], int] = {}
        written: dict[tuple[int, int, int], int] = {}
        assert plan.token_masks.keys() <= {row.seq_id for row in plan.rows if row.samples}
        sampled = tuple(self._run_row(row, read, written, plan.token_masks) for row in plan.rows)
        for slot in written:
            assert slot not in read, f"{slot} is read and written in one step"
            self.pages[slot] = written[slot]
        holders = Counter(
            (group, page)
            for row in plan.rows
            for group, held in enumerate(self.rows[row.row][1].table)
            for page in held[self._first_block(group, row.num_computed_tokens) :]
        )
        for group, page, _ in written:
            assert holders[group, page] == 1, f"page {page} is written but has two holders"
        self.num_computed_tokens += plan.num_tokens
        return StepResult(rows=sampled, finished_s=1.0, device_s=0.0)

    def _first_block(self, group: int, position: int) -> int:
        return first_block(self.windows[group], position, self.block_size)

    def _check_shape(self, plan: StepPlan) -> None:
        assert plan.rows
        assert plan.num_tokens == sum(row.num_tokens for row in plan.rows)
        assert plan.num_tokens <= self.max_num_batched_tokens
        assert len({row.seq_id for row in plan.rows}) == len(plan.rows)
        assert len({row.row for row in plan.rows}) == len(plan.rows)
        assert all(0 <= row.row < self.max_num_seqs for row in plan.rows)
        decodes = [row.num_tokens == 1 and row.samples for row in plan.rows]
        assert decodes == sorted(decodes, reverse=True), "decode rows come first"
        assert {new.seq_id for new in plan.new_rows} <= {row.seq_id for row in plan.rows}

    def _run_row(
        self,
        plan: RowPlan,
        read: dict[tuple[int, int, int], int],
        written: dict[tuple[int, int, int], int],
        masks: Mapping[int, np.ndarray],
    ) -> SampledRow:
        seq_id, row = self.rows[plan.row]
        assert seq_id == plan.seq_id, "the row belongs to another sequence"
        start, end = plan.num_computed_tokens, plan.num_computed_tokens + plan.num_tokens
        if plan.token_ids:
            assert len(plan.token_ids) == plan.num_tokens
            assert plan.token_ids == tuple(row.tokens[start:end])
        else:
            assert not row.request.needs_host_tokens
            assert plan.num_tokens == 1
            assert end == len(row.tokens)
        assert plan.samples == (end == len(row.tokens)), "samples exactly at the last token"
        assert start == row.num_computed_tokens, "each token is computed once, in order"
        row.num_computed_tokens = end
        for group, new in enumerate(plan.new_block_ids):
            held = row.table[group]
            held.extend(new)
            needed = held[self._first_block(group, start) :]
            assert 0 not in needed, "the null page is nobody's"
            assert len(set(needed)) == len(needed), "a page is used twice"
            assert len(held) == -(-end // self.block_size), "as many pages as tokens need"
        kv, chain = kv_root(row.request), []
        for position, token_id in enumerate(row.tokens[:end]):
            kv = kv_of(kv, token_id)
            chain.append(kv)
            for group, (window, held) in enumerate(zip(self.windows, row.table, strict=True)):
                if window is not None and position <= start - window:
                    continue
                slot = (group, held[position // self.block_size], position % self.block_size)
                if position >= start:
                    assert slot not in written, f"{slot} is written by two rows"
                    written[slot] = kv
                else:
                    assert self.pages.get(slot) == kv, f"{slot} holds another token's KV"
                    read[slot] = kv
        prompt = row.request.prompt_token_ids
        scores = tuple(
            score(chain[position], prompt[position + 1])
            for position in range(start, min(end, len(prompt) - 1))
        )
        tokens: tuple[int, ...] = ()
        if plan.samples:
            tokens = (next_token(kv, row.choice),)
            if plan.seq_id in masks:
                word = int(masks[plan.seq_id][0])
                allowed = [i for i in range(NUM_TOKEN_IDS) if word >> i & 1]
                tokens = (allowed[tokens[0] % len(allowed)],)
            row.tokens.extend(tokens)
        return SampledRow(plan.seq_id, tokens, None, scores if plan.wants_prompt_logprobs else None)


class Engine:
    """The engine's loop around a scheduler, in step with it or one step ahead."""

    def __init__(
        self,
        *,
        steps_ahead: int = 0,
        num_blocks: int | tuple[int, ...] = 65,
        windows: tuple[int | None, ...] = (None,),
        **settings: object,
    ) -> None:
        if isinstance(num_blocks, int):
            num_blocks = (num_blocks,) * len(windows)
        groups = tuple(
            KVGroup(num_blocks=count, window=window)
            for count, window in zip(num_blocks, windows, strict=True)
        )
        settings = {
            "groups": groups,
            "block_size": 4,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            "max_model_len": 64,
            **settings,
        }
        self.scheduler = Scheduler(**settings)  # type: ignore[arg-type]
        self.runner = FakeRunner(
            windows=windows,
            block_size=self.scheduler._limits.block_size,
            max_num_seqs=self.scheduler._limits.max_num_seqs,
            max_num_batched_tokens=self.scheduler._limits.max_num_batched_tokens,
        )
        self.steps_ahead = steps_ahead
        self.in_flight: list[tuple[StepPlan, StepResult]] = []
        self.deltas: dict[tuple[str, int], list[TokenDelta]] = {}
        self.plans: list[StepPlan] = []

    def add(self, *commands: Request | Abort) -> None:
        for command in commands:
            self._keep(self.scheduler.accept(command))

    def step(self) -> StepPlan | None:
        """One turn of the loop; raises if nothing moves although something is live."""
        self._keep(self.scheduler.collect_masks())
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append((plan, self.runner.run(plan)))
        check_blocks(self.scheduler)
        if self.in_flight and (plan is None or len(self.in_flight) > self.steps_ahead):
            self._keep(self.scheduler.update(*self.in_flight.pop(0)))
            check_blocks(self.scheduler)
        else:
            waits = self.scheduler.idle or self.scheduler.awaits_masks
            assert plan is not None or waits, "nothing moves, but requests are live"
        return plan

    def run(self, limit: int = 10_000) -> None:
        """Goes on until everything has finished."""
        for _ in range(limit):
            if self.scheduler.idle and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"not finished after {limit} steps")

    def _keep(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            earlier = self.deltas.setdefault((delta.request_id, delta.choice), [])
            assert not earlier or earlier[-1].finish_reason is None, "a delta after the end"
            earlier.append(delta)

    def output(self, request_id: str, choice: int = 0) -> tuple[int, ...]:
        deltas = self.deltas.get((request_id, choice), [])
        return tuple(token for delta in deltas for token in delta.token_ids)

    def check_output(self, request: Request, choice: int = 0) -> None:
        """The choice gave what it gives alone, and ended as it ends alone."""
        tokens, reason, stop_reason = expected_output(request, choice)
        last = self.deltas[request.request_id, choice][-1]
        assert self.output(request.request_id, choice) == tokens
        assert (last.finish_reason, last.stop_reason) == (reason, stop_reason)
        first = self.deltas[request.request_id, choice][0]
        if request.sampling.prompt_logprobs is not None:
            assert first.prompt_logprobs == expected_prompt_logprobs(request)

    @property
    def num_free(self) -> int:
        return self.scheduler.stats(None, host_s=0, device_s=0).num_free_blocks


def check_blocks(scheduler: Scheduler) -> None:
    """No block is leaked, used twice, or found by a name it has lost."""
    for group, (pool, kind) in enumerate(
        zip(scheduler._blocks.pools, scheduler._limits.groups, strict=True)
    ):
        holders = [0] * pool.num_blocks
        for seq in scheduler._running:
            passed = seq.num_passed[group]
            assert not any(seq.block_ids[group][:passed]), "given back"
            assert passed <= first_block(
                kind.window, seq.num_computed_tokens, scheduler._blocks.block_size
            )
            for block_id in seq.block_ids[group][passed:]:
                holders[block_id] += 1
            most = most_blocks(
                kind.window,
                num_tokens=seq.num_slots,
                step_tokens=scheduler._limits.max_num_batched_tokens,
                block_size=scheduler._blocks.block_size,
            )
            assert seq.request.sampling.n > 1 or len(seq.block_ids[group]) - passed <= most
        assert holders == pool._ref_counts
        assert (holders[0], pool._digests[0]) == (0, None), "the null block is nobody's"
        free = [*pool._blank, *pool._evictable]
        held = [block_id for block_id, count in enumerate(holders) if count]
        assert sorted(free + held) == list(range(1, pool.num_blocks))
        assert all(pool._digests[block_id] is None for block_id in pool._blank)
        named = {block: digest for block, digest in enumerate(pool._digests) if digest is not None}
        assert {digest: block for block, digest in named.items()} == pool._by_digest
        assert set(pool._evictable) <= set(named)
    for seq in scheduler._backlog.live.values():
        assert (seq.row >= 0) == (seq in scheduler._running)
        assert seq.row >= 0 or not any(seq.block_ids), "only what runs holds blocks"
    rows = [seq.row for seq in scheduler._running]
    assert sorted(rows + scheduler._free_rows) == list(range(scheduler._limits.max_num_seqs))
    standings = [seq.standing for seq in scheduler._running]
    assert standings == sorted(standings)

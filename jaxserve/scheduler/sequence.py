"""`Sequence`: one choice of a request on its way to its last token."""

from dataclasses import dataclass, field

from jaxserve.request import FinishReason, Request, RequestTimes, TokenDelta, TokenLogprobs
from jaxserve.scheduler.grammar import GrammarState
from jaxserve.step import NO_TOKEN, RowPlan, SampledRow

NO_ROW = -1


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """The only mutable record of a request; the scheduler alone writes to it.

    Tokens are *known* once the host has seen them, *pending* while a launched step is sampling
    them, *computed* once a launched step writes their KV. A sequence is running while it has a row,
    else it waits: for admission, for its leader's prompt, or to be resumed.
    """

    seq_id: int
    request: Request
    choice: int
    standing: tuple[int, int, int]  # priority, arrival, choice: lower runs first, preempted last
    max_total_tokens: int  # prompt and output
    block_ids: tuple[list[int], ...]  # held, per KV group; null: given back already
    row: int = NO_ROW
    output_token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0  # known and pending
    num_pending_tokens: int = 0
    num_computed_tokens: int = 0
    num_slots: int = 0  # token places in the blocks of one group, those given back included
    num_passed: list[int] = field(default_factory=list)  # leading null blocks, per KV group
    last_step: int = 0  # number of the last step that computes any of it
    digests: list[bytes] = field(default_factory=list)  # of its first full blocks
    num_remembered_blocks: int = 0  # of those held, the ones the prefix cache has seen
    followers: list["Sequence"] = field(default_factory=list)  # wait for this one's prompt
    unstarted: set[int] = field(default_factory=set)  # live choices without a row yet; of them all
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # shared by all choices
    grammar: GrammarState | None = None
    num_cached_tokens: int = 0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        return self.num_tokens - self.num_pending_tokens

    @property
    def has_mask(self) -> bool:
        """Whether its next token can be drawn, as far as a grammar is concerned."""
        return self.grammar is None or self.grammar.ready

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """The known tokens at positions start ... end - 1, of prompt and output."""
        prompt = self.request.prompt_token_ids
        if end <= len(prompt):
            return prompt[start:end]
        output = self.output_token_ids[max(0, start - len(prompt)) : end - len(prompt)]
        return prompt[start:] + tuple(output)

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether no prompt position is left to score (or none was asked for)."""
        return self.prompt_logprobs is None or len(self.prompt_logprobs) == self.num_prompt_tokens

    def wants_prompt_logprobs(self, start: int, end: int) -> bool:
        """Whether computing positions start ... end - 1 scores a prompt token not yet scored."""
        collected = self.prompt_logprobs
        return (
            collected is not None
            and len(collected) < self.num_prompt_tokens
            and (end >= len(collected) and start + 1 < self.num_prompt_tokens)
        )

    def collect_prompt_logprobs(self, planned: RowPlan, scored: tuple[TokenLogprobs, ...]) -> None:
        """Keeps the scores of prompt positions after `num_computed_tokens` that are new."""
        collected = self.prompt_logprobs
        if collected is None:
            return
        num_had = len(collected) - (planned.num_computed_tokens + 1)  # before a preemption
        collected.extend(scored[num_had : num_had + self.num_prompt_tokens - len(collected)])

    def append(self, sampled: SampledRow, finished_s: float) -> TokenDelta:
        """Takes in what a step sampled, up to the first token that ends the sequence."""
        request, output, token_ids = self.request, self.output_token_ids, sampled.token_ids
        logprobs, prompt_logprobs = sampled.logprobs, None
        reason: FinishReason | None = None
        stop_reason: int | None = None
        error: str | None = None
        if not output:
            self.first_token_s = finished_s
            if self.prompt_logprobs is not None:
                prompt_logprobs = tuple(self.prompt_logprobs)
        for count, token_id in enumerate(token_ids, 1):
            if token_id < 0:
                reason, error = self._without_token(token_id)
                token_ids, logprobs = token_ids[: count - 1], None
                break
            output.append(token_id)
            may_stop = len(output) >= request.sampling.min_tokens
            if may_stop and token_id == request.eos_token_id:
                reason = "stop"
            elif may_stop and token_id in request.stop_token_ids:
                reason, stop_reason = "stop", token_id
            elif len(output) >= request.max_tokens:
                reason = "length"
            if request.pools:
                reason, stop_reason = "stop", None
            if reason is not None:
                token_ids = token_ids[:count]
                logprobs = logprobs[:count] if logprobs is not None else None
                break
        self.num_pending_tokens -= 1
        self.num_tokens += len(token_ids) - 1
        return TokenDelta(
            request.request_id,
            self.choice,
            token_ids,
            logprobs,
            prompt_logprobs,
            reason,
            stop_reason,
            error,
            self.num_cached_tokens,
            RequestTimes(request.arrival_s, self.scheduled_s, self.first_token_s, finished_s),
            sampled.pooled,
        )

    def end(self, reason: FinishReason, error: str | None, finished_s: float) -> TokenDelta:
        """The last delta of a sequence that ends without a further token."""
        return TokenDelta(
            self.request.request_id,
            self.choice,
            (),
            finish_reason=reason,
            error=error,
            num_cached_tokens=self.num_cached_tokens,
            times=RequestTimes(
                self.request.arrival_s, self.scheduled_s, self.first_token_s, finished_s
            ),
        )

    def _without_token(self, token_id: int) -> tuple[FinishReason, str | None]:
        """How a sequence ends for which there was no token to draw."""
        if token_id != NO_TOKEN:
            return "error", "the model's logits are not numbers (NaN)"
        if self.grammar is not None and self.grammar.may_end:
            return "stop", None
        return "error", (
            "no token is possible: structured_outputs, allowed_token_ids, logit_bias and bad_words "
            "rule out all of them; relax one"
        )

"""`Backlog`: every live sequence, and which of them waits next in line."""

import heapq
import itertools

from jaxserve.request import Abort, Request, TokenLogprobs
from jaxserve.scheduler.sequence import Sequence


class Backlog:
    """All sequences that have not ended, and the line of those ready to be admitted.

    The line is ordered by standing: priority (under that policy), then arrival, then choice. A
    preempted sequence arrived before all that wait behind it, so it comes back to the front. Of a
    request with n > 1 only one choice, the leader, is in line until its prompt is computed; then
    the followers come, and share the leader's prompt blocks.

    Args:
        by_priority: Lower `Request.priority` stands first; else it is ignored.
        num_groups: KV groups of the sequences.
    """

    def __init__(self, *, by_priority: bool, num_groups: int) -> None:
        self.live: dict[int, Sequence] = {}  # by seq_id
        self._by_priority = by_priority
        self._num_groups = num_groups
        self._choices: dict[str, dict[int, Sequence]] = {}  # live ones, by request_id
        self._line: list[tuple[tuple[int, int, int], Sequence]] = []  # heap; may hold ended ones
        self._seq_ids = itertools.count()
        self._arrivals = itertools.count()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._choices

    def add(self, request: Request) -> list[Sequence]:
        """Makes the sequences of a request, and puts choice 0 in line."""
        arrival = next(self._arrivals)
        num_prompt = len(request.prompt_token_ids)
        wants_scores = request.sampling.prompt_logprobs is not None
        # One list for all choices; its first entry is None, because nothing predicts that token.
        prompt_logprobs: list[TokenLogprobs | None] | None = [None] if wants_scores else None
        unstarted = set(range(request.sampling.n))
        choices = [
            Sequence(
                seq_id=next(self._seq_ids),
                request=request,
                choice=choice,
                standing=(request.priority if self._by_priority else 0, arrival, choice),
                max_total_tokens=num_prompt + request.max_tokens,
                block_ids=tuple([] for _ in range(self._num_groups)),
                num_tokens=num_prompt,
                prompt_logprobs=prompt_logprobs,
                unstarted=unstarted,
            )
            for choice in range(request.sampling.n)
        ]
        self.live.update((seq.seq_id, seq) for seq in choices)
        self._choices[request.request_id] = dict(enumerate(choices))
        self._lead(choices)
        return choices

    def head(self) -> Sequence | None:
        """The sequence that is next in line."""
        while self._line:
            seq = self._line[0][1]
            if seq.seq_id in self.live:
                return seq
            heapq.heappop(self._line)
        return None

    def pop(self) -> Sequence:
        """Takes the head out of the line."""
        return heapq.heappop(self._line)[1]

    def push(self, seq: Sequence) -> None:
        """Puts a sequence in line, at the place of its standing."""
        heapq.heappush(self._line, (seq.standing, seq))

    def release_followers(self, leader: Sequence) -> None:
        """Puts the other choices in line once they can share all of the leader's prompt."""
        if leader.num_computed_tokens >= leader.num_prompt_tokens and leader.has_prompt_logprobs:
            for seq in self._live_of(leader.followers):
                seq.scheduled_s = leader.scheduled_s  # its prompt is the leader's
                seq.num_cached_tokens = leader.num_cached_tokens
                self.push(seq)
            leader.followers = []

    def named_by(self, abort: Abort) -> list[Sequence]:
        """The live sequences that an abort means; followers come before their leader."""
        choices = self._choices.get(abort.request_id, {})
        if abort.choice is None:
            return list(reversed(choices.values()))
        return [choices[abort.choice]] if abort.choice in choices else []

    def remove(self, seq: Sequence) -> None:
        """Forgets an ended sequence; if others waited for its prompt, the next choice leads."""
        del self.live[seq.seq_id]
        seq.unstarted.discard(seq.choice)
        choices = self._choices[seq.request.request_id]
        del choices[seq.choice]
        if not choices:
            del self._choices[seq.request.request_id]
        self._lead(self._live_of(seq.followers))
        if len(self._line) > 2 * len(self.live) + 64:  # ended ones must not pile up
            self._line = [entry for entry in self._line if entry[1].seq_id in self.live]
            heapq.heapify(self._line)

    def _lead(self, choices: list[Sequence]) -> None:
        if choices:
            choices[0].followers = choices[1:]
            self.push(choices[0])

    def _live_of(self, sequences: list[Sequence]) -> list[Sequence]:
        return [seq for seq in sequences if seq.seq_id in self.live]

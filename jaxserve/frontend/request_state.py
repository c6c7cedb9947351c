"""What the client keeps of a request: tokens in, `RequestOutput`s out."""

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxserve.frontend.detokenizer import Detokenizer, priming_tokens
from jaxserve.frontend.logprobs import to_logprobs, to_prompt_logprobs
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.outputs import CompletionOutput, PromptLogprobs, RequestOutput, SampleLogprobs
from jaxserve.request import Request, RequestTimes, TokenDelta
from jaxserve.sampling_params import RequestOutputKind


@dataclass(slots=True)
class _Choice:
    """One output of n."""

    index: int
    detokenizer: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: SampleLogprobs | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_taken: int = 0  # tokens
    told_finished: bool = False


class ChoiceSummary(NamedTuple):
    """One output of n, for logs and metrics."""

    text: str  # empty without a tokenizer
    num_tokens: int
    finish_reason: str | None  # None while it runs


class RequestState:
    """A request from submission to its last output.

    `add` is called by whoever reads the engine's messages, `take` by the consumer, each from any
    thread. Outputs are made when they are taken: a slow consumer gets several tokens at once and
    no queue grows.

    Attributes:
        request_id: The user's.
        finished: All choices have ended.
        error: The engine died; `take` raises.
    """

    def __init__(
        self,
        request: Request,
        *,
        request_id: str,
        prompt: str | None,
        tokenizer: Tokenizer | None,
        output_kind: RequestOutputKind | None = None,
        stream_interval: int = 1,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.request_id = request_id
        self.finished = False
        self.error: Exception | None = None
        self._kind = output_kind or sampling.output_kind
        self._interval = stream_interval
        self._prompt = prompt
        # One list for all outputs: a long prompt is not copied with each token of its answer.
        self._prompt_token_ids = list(request.prompt_token_ids)
        self._tokenizer = tokenizer
        self._prompt_logprobs: PromptLogprobs | None = None
        self._num_cached_tokens: int | None = None
        self._times: RequestTimes | None = None
        self._last_taken = False
        self._pooled: np.ndarray | None = None
        self._lock = threading.Lock()
        priming: list[int] = []
        if tokenizer is not None and sampling.detokenize:
            priming = priming_tokens(tokenizer, request.prompt_token_ids)
        self._choices = [
            _Choice(
                index=i,
                detokenizer=None
                if tokenizer is None or not sampling.detokenize
                else Detokenizer(tokenizer, sampling, priming),
                logprobs=None if sampling.logprobs is None else [],
                cumulative_logprob=None if sampling.logprobs is None else 0.0,
            )
            for i in range(sampling.n)
        ]
        self._num_running = sampling.n

    # The engine's side

    def add(self, delta: TokenDelta) -> bool:
        """Take new tokens. True: a stop string ended the choice, so the engine must be told."""
        with self._lock:
            choice = self._choices[delta.choice]
            if choice.finish_reason is not None:
                return False  # tokens made before the engine heard of the stop string
            self._add_facts(delta)
            token_ids, reason, stop_reason = delta.token_ids, delta.finish_reason, delta.stop_reason
            found = None
            if choice.detokenizer is not None:
                kept, found = choice.detokenizer.add(
                    token_ids, ended_by_token=delta.finish_reason == "stop"
                )
                token_ids = token_ids[:kept]
            self._add_tokens(choice, token_ids, delta)
            if found is not None:
                self._finish(choice, "stop", found)
                # The engine may have ended it by itself in the same step.
                return reason is None
            if reason is not None:
                self._finish(choice, reason, delta.error if reason == "error" else stop_reason)
            return False

    def end(self, reason: str) -> None:
        """End every choice that still runs."""
        with self._lock:
            for choice in self._choices:
                if choice.finish_reason is None:
                    self._finish(choice, reason, None)

    def fail(self, error: Exception) -> None:
        """The engine is dead."""
        with self._lock:
            if not self.finished:
                self.error = error
                self.finished = True

    def _finish(self, choice: _Choice, reason: str, stop_reason: int | str | None) -> None:
        choice.finish_reason, choice.stop_reason = reason, stop_reason
        self._num_running -= 1
        self.finished = self._num_running == 0

    def _add_tokens(self, choice: _Choice, token_ids: tuple[int, ...], delta: TokenDelta) -> None:
        if choice.logprobs is not None and delta.logprobs is not None:
            total = choice.cumulative_logprob or 0.0
            before = choice.token_ids[-4:]
            if len(before) < 4:
                before = [*self.request.prompt_token_ids[-4:], *before]
            for token_id, entry in zip(token_ids, delta.logprobs, strict=False):
                choice.logprobs.append(to_logprobs(entry, self._tokenizer, before))
                total += entry.logprobs[0]
                before.append(token_id)
            choice.cumulative_logprob = total
        choice.token_ids.extend(token_ids)

    def _add_facts(self, delta: TokenDelta) -> None:
        if delta.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = to_prompt_logprobs(
                delta.prompt_logprobs, self._tokenizer, self.request.prompt_token_ids
            )
        if delta.pooled is not None:
            self._pooled = delta.pooled
        if self._num_cached_tokens is None:
            self._num_cached_tokens = delta.num_cached_tokens
        new, old = delta.times, self._times
        if old is None:
            self._times = new
        else:  # of several choices: when the first began and the last ended
            self._times = RequestTimes(
                old.arrival_s or new.arrival_s,
                _first(old.scheduled_s, new.scheduled_s),
                _first(old.first_token_s, new.first_token_s),
                max(old.last_token_s, new.last_token_s),
            )

    # For logs and metrics, from any thread

    @property
    def prompt(self) -> str | None:
        """Its text; None: it came as token ids."""
        return self._prompt

    @property
    def times(self) -> RequestTimes | None:
        """Of several choices: when the first began and the last ended. None: no tokens yet."""
        return self._times

    def summaries(self) -> list[ChoiceSummary]:
        """What each choice has come to, without taking it from the consumer."""
        with self._lock:
            return [
                ChoiceSummary(
                    "" if choice.detokenizer is None else choice.detokenizer.visible(True),
                    len(choice.token_ids),
                    choice.finish_reason or (None if self.error is None else "error"),
                )
                for choice in self._choices
            ]

    # The consumer's side

    def take(self) -> RequestOutput | None:
        """What is new since the last call, in the form that output_kind asks for.

        None: nothing yet, or the last output was taken already.

        Raises:
            EngineDeadError: The engine stopped.
        """
        with self._lock:
            if self.error is not None:
                raise self.error
            if self._last_taken:
                return None
            if self._kind is RequestOutputKind.FINAL_ONLY and not self.finished:
                return None
            taken = [self._take_choice(choice) for choice in self._choices]
            news = [output for output, is_new in taken if is_new]
            if not news and not self.finished:
                return None
            self._last_taken = self.finished
            delta = self._kind is RequestOutputKind.DELTA
            outputs = news if delta else [output for output, _ in taken]
            return self._output(outputs)

    def _take_choice(self, choice: _Choice) -> tuple[CompletionOutput, bool]:
        finished = choice.finish_reason is not None
        start = choice.num_taken
        num_new = len(choice.token_ids) - start
        # The first token and the end come at once.
        is_new = num_new >= (self._interval if start else 1) or (
            finished and not choice.told_finished
        )
        delta = self._kind is RequestOutputKind.DELTA
        text, detokenizer = "", choice.detokenizer
        if is_new:
            choice.num_taken = len(choice.token_ids)
            choice.told_finished = finished
        if detokenizer is not None and (is_new or not delta):
            text = detokenizer.take(finished) if delta else detokenizer.visible(finished)
        first = start if delta else 0
        output = CompletionOutput(
            index=choice.index,
            text=text,
            # Copies: the lists grow on.
            token_ids=choice.token_ids[first:],
            cumulative_logprob=choice.cumulative_logprob,
            logprobs=None if choice.logprobs is None else choice.logprobs[first:],
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )
        return output, is_new

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=outputs,
            finished=self.finished,
            metrics=self._times,
            num_cached_tokens=self._num_cached_tokens,
            pooled=self._pooled,
        )


def _first(a: float, b: float) -> float:
    """The earlier of two times, where 0 means not yet."""
    return min(a, b) if a and b else a or b

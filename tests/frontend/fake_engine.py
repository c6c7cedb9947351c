"""An engine without a model: it emits a script of tokens, so tests see the client alone."""

import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.kv_group import KVGroup
from jaxserve.request import Abort, Request, RequestTimes, TokenDelta, TokenLogprobs
from jaxserve.scheduler.limits import Limits
from jaxserve.step import EngineOutput, StepStats

HIDDEN_SIZE = 8

type Script = Callable[[Request, int], Sequence[int]]


class FakeEngine:
    """Answers each choice with a script's tokens, one (or `tokens_per_step`) a step.

    With `start` it runs in a thread of its own; without, a test calls `step` itself.
    """

    def __init__(
        self,
        script: Script,
        *,
        vocab_size: int,
        max_model_len: int = 256,
        tokens_per_step: int = 1,
        refuse_after: int | None = None,
        delay_s: float = 0.0,
        num_blocks: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = HIDDEN_SIZE
        self.max_model_len = max_model_len
        self.num_late_compiles = 0
        self.outbox: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()
        self.script = script
        self.tokens_per_step = tokens_per_step
        self.refuse_after = refuse_after
        self.delay_s = delay_s
        self._limits: Limits | None = None  # those of a KV cache that small
        if num_blocks is not None:
            self._limits = Limits(
                groups=(KVGroup(num_blocks=num_blocks),),
                block_size=16,
                max_num_seqs=8,
                max_num_batched_tokens=64,
                max_model_len=max_model_len,
            )
        self.requests: list[Request] = []
        self.aborts: list[Abort] = []
        self.num_shutdowns = 0
        self._running: dict[tuple[str, int], tuple[Request, list[int], int]] = {}
        self._dead: str | None = None
        self._stop = threading.Event()
        self._work = threading.Event()  # something runs, or it is to end
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        if self._limits is not None:
            self._limits.check(request)
        if self.refuse_after is not None and len(self.requests) >= self.refuse_after:
            raise RequestError("the queue is full", code="server_overloaded")
        with self._lock:
            self.requests.append(request)
            for choice in range(request.sampling.n):
                tokens = list(self.script(request, choice))
                self._running[request.request_id, choice] = (request, tokens, 0)
        self._work.set()

    def abort(self, command: Abort) -> None:
        with self._lock:
            self.aborts.append(command)
            for key in list(self._running):
                if key[0] == command.request_id and command.choice in (None, key[1]):
                    del self._running[key]

    def reset_prefix_cache(self) -> bool:
        return True

    def summary(self) -> dict[str, object]:
        return {"model": "fake"}

    def shutdown(self) -> None:
        self.num_shutdowns += 1
        self._stop.set()
        self._work.set()
        if self._thread.is_alive():
            self._thread.join()

    def die(self, why: str = "boom") -> None:
        self._dead = why
        self.outbox.put(EngineOutput(deltas=(), error=why))

    @property
    def num_running(self) -> int:
        return len(self._running)

    def step(self) -> bool:
        """One message; False: nothing runs."""
        with self._lock:
            deltas = tuple(self._advance(key) for key in list(self._running))
        if deltas:
            self.outbox.put(EngineOutput(deltas=deltas, stats=_stats(len(deltas))))
        return bool(deltas)

    def _run(self) -> None:
        while not self._stop.is_set() and self._dead is None:
            self._work.clear()
            if not self.step():
                self._work.wait(1.0)
            elif self.delay_s:
                time.sleep(self.delay_s)

    def _advance(self, key: tuple[str, int]) -> TokenDelta:
        request, tokens, done = self._running[key]
        if request.pools:
            del self._running[key]
            return TokenDelta(
                request_id=request.request_id,
                choice=key[1],
                token_ids=(),
                pooled=np.arange(1, HIDDEN_SIZE + 1, dtype=np.float32),
                finish_reason="stop",
                times=RequestTimes(request.arrival_s, 1.0, 2.0, 3.0),
            )
        new: list[int] = []
        reason, stop_reason = None, None
        while len(new) < self.tokens_per_step and reason is None:
            token = tokens[done] if done < len(tokens) else 0
            new.append(token)
            done += 1
            if done > request.sampling.min_tokens and token == request.eos_token_id:
                reason = "stop"
            elif done > request.sampling.min_tokens and token in request.stop_token_ids:
                reason, stop_reason = "stop", token
            elif done >= request.max_tokens:
                reason = "length"
        if reason is None:
            self._running[key] = (request, tokens, done)
        else:
            del self._running[key]
        first = done == len(new)
        return TokenDelta(
            request_id=request.request_id,
            choice=key[1],
            token_ids=tuple(new),
            logprobs=self._logprobs(request, new),
            prompt_logprobs=self._prompt_logprobs(request) if first else None,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=2 if first else 0,
            times=RequestTimes(request.arrival_s, 1.0, 2.0, 2.0 + done),
        )

    def _logprobs(self, request: Request, tokens: list[int]) -> tuple[TokenLogprobs, ...] | None:
        num = request.sampling.logprobs
        if num is None:
            return None
        num = self.vocab_size if num == -1 else num
        return tuple(
            TokenLogprobs((token, *range(num)), (-0.5, *(-1.0 - i for i in range(num))), 3)
            for token in tokens
        )

    def _prompt_logprobs(self, request: Request) -> tuple[TokenLogprobs | None, ...] | None:
        if request.sampling.prompt_logprobs is None:
            return None
        rest = request.prompt_token_ids[1:]
        return (None, *(TokenLogprobs((token,), (-0.25,), 1) for token in rest))


def _stats(num_running: int) -> StepStats:
    return StepStats(
        num_running=num_running,
        num_waiting=0,
        num_prefill_tokens=0,
        num_decode_tokens=num_running,
        num_used_blocks=0,
        num_free_blocks=0,
        num_allocated_slots=0,
        num_written_slots=0,
        num_preemptions=0,
        num_prefix_queries=0,
        num_prefix_hits=0,
        host_s=0.0,
        device_s=0.0,
    )

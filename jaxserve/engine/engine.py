"""The engine: one thread that schedules, launches and reads back, one step ahead of the host."""

import logging
import queue
import threading
import time
from dataclasses import dataclass, field

from jaxserve.checkpoint import Checkpoint
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.request import Abort, Request, TokenDelta
from jaxserve.runner.results import Launched
from jaxserve.runner.runner import Runner
from jaxserve.scheduler.grammar import Grammars, MatcherFactory
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.step import EngineOutput, StepPlan, StepStats

logger = logging.getLogger(__name__)

MASK_WAIT_S = (
    1.0  # the loop looks again so often while threads look for masks and nothing else runs
)


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    """A command to forget all cached prefixes; the reply says whether it was done."""

    reply: queue.SimpleQueue[bool] = field(default_factory=queue.SimpleQueue)


type Command = Request | Abort | ResetPrefixCache | None  # None only wakes the loop


class Engine:
    """Serves requests from a thread of its own; results arrive in `outbox`, one message a step.

    Args:
        matchers: For requests that have a grammar; None: there are none.

    Raises:
        ConfigError: An argument cannot work with this model or device.
        CheckpointError: The model is damaged or incomplete.
        UnsupportedError: The model's architecture is not implemented.
    """

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        matchers: MatcherFactory | None = None,
    ) -> None:
        self._config = config
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._grammars = None
        if matchers is not None:
            self._grammars = Grammars(factory=matchers, wake=lambda: self._inbox.put(None))
        self._model_name = checkpoint.name
        self.runner = Runner(config, checkpoint)
        s = self.runner.settings
        self.vocab_size = self.runner.spec.vocab_size
        self.hidden_size = self.runner.spec.hidden_size
        self.max_model_len = s.max_model_len
        self.scheduler = Scheduler(
            groups=self.runner.kv_groups,
            block_size=s.page_size,
            max_num_seqs=s.max_num_seqs,
            max_num_batched_tokens=s.max_num_batched_tokens,
            max_model_len=s.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            enable_chunked_prefill=config.enable_chunked_prefill,
            policy=config.scheduling_policy,
            grammars=self._grammars,
        )
        if config.warm_up:
            self.runner.warm_up()
        self.outbox: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._dead: str | None = None
        self._lock = threading.Lock()
        self._num_submitted = 0  # not yet seen by the loop
        self._num_waiting = 0  # as of the last step
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)

    # What clients call, from any thread

    def start(self) -> None:
        """Starts the loop."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: It can never fit, or the queue is full.
            EngineDeadError: The engine has stopped.
        """
        if self._dead is not None or self._stop.is_set():
            raise EngineDeadError(f"the engine has stopped: {self._dead or 'it was shut down'}")
        self.scheduler.check(request)
        limit = self._config.max_num_queued_reqs
        with self._lock:
            queued = self._num_submitted + self._num_waiting
            if limit is not None and queued >= limit:
                raise RequestError(
                    f"{queued} requests are waiting and max_num_queued_reqs is {limit}. "
                    "Try again later",
                    code="server_overloaded",
                )
            self._num_submitted += 1
        self._inbox.put(request)

    def abort(self, command: Abort) -> None:
        """Ends a request, or one of its choices; without effect if it has ended."""
        self._inbox.put(command)

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; False, and nothing happens, while requests are running."""
        if self._dead is not None or self._stop.is_set():
            raise EngineDeadError(f"the engine has stopped: {self._dead or 'it was shut down'}")
        command = ResetPrefixCache()
        self._inbox.put(command)
        return command.reply.get()

    def shutdown(self) -> None:
        """Stops the loop and frees the device's memory. Running requests end with an error."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()
        if self._grammars is not None:
            self._grammars.close()
        self.runner.close()

    def summary(self) -> dict[str, object]:
        """What the start-up table shows."""
        r, s = self.runner, self.runner.settings
        pages = max(group.num_blocks for group in r.kv_groups)
        windows = ", ".join(
            f"{group.num_blocks:,} pages for windows of {group.window:,}"
            for group in r.kv_groups
            if group.window is not None
        )
        # Of requests as long as can be, in the group that has room for the fewest.
        concurrency = min(
            (group.num_blocks - 1) / (each.least - 1)
            for group, each in zip(r.kv_groups, r.group_pages, strict=True)
        )
        passed_over = "; ".join(f"{name}: {why}" for name, why in r.attention_reasons.items())
        return {
            "model": self._model_name,
            "parameters": r.num_parameters,
            "dtype": str(s.dtype),
            "device": r.device.label,
            "attention backend": r.attention_backend.name,
            "other backends": passed_over,
            "layer loop": "scan" if s.scan_layers else "unrolled",
            "weight bytes": r.weight_bytes,
            "weight load s": r.load_s,
            "KV bytes": r.kv_bytes,
            "KV pages": pages,
            "KV windows": windows,
            "page size": s.page_size,
            "KV tokens": (pages - 1) * s.page_size,
            "max_model_len": s.max_model_len,
            "max_num_seqs": s.max_num_seqs,
            "max_num_batched_tokens": s.max_num_batched_tokens,
            "max concurrency": concurrency,
            "compile s": r.compile_s,
        }

    @property
    def num_late_compiles(self) -> int:
        """XLA compilations in live traffic; always 0 unless something is wrong."""
        return self.runner.compiles.count

    # The loop

    def _run(self) -> None:
        try:
            with self.runner.compiles.watch():
                self._loop()
        except Exception as error:  # the loop ends; everyone who waits is told
            logger.exception("the engine stopped")
            self._dead = f"{type(error).__name__}: {error}"
        else:
            self._dead = "it was shut down"
        self.outbox.put(EngineOutput(deltas=(), error=self._dead))
        for command in self._drain(block=False):
            if isinstance(command, ResetPrefixCache):
                command.reply.put(False)

    def _loop(self) -> None:
        in_flight: Launched | None = None  # at most one step ahead of the host
        ahead = self._config.async_scheduling
        stuck = False  # nothing moves until a mask is found
        while not self._stop.is_set():
            idle = in_flight is None and self.scheduler.idle
            deltas: list[TokenDelta] = []
            for command in self._drain(
                block=idle or stuck, timeout_s=MASK_WAIT_S if stuck else None
            ):
                if isinstance(command, ResetPrefixCache):
                    command.reply.put(in_flight is None and self.scheduler.reset_prefix_cache())
                elif command is not None:
                    deltas.extend(self.scheduler.accept(command))
            start = time.perf_counter()
            deltas.extend(self.scheduler.collect_masks())
            plan = self.scheduler.schedule()
            launched = None if plan is None else self.runner.launch(plan)
            host_s = time.perf_counter() - start
            if not ahead and launched is not None:
                in_flight, launched = launched, None
            stats = None
            if in_flight is not None:
                result = self.runner.wait(in_flight)
                start = time.perf_counter()
                deltas.extend(self.scheduler.update(in_flight.plan, result))
                host_s += time.perf_counter() - start
                stats = self._stats(in_flight.plan, host_s, result.device_s)
            if deltas or stats is not None:
                self.outbox.put(EngineOutput(deltas=tuple(deltas), stats=stats))
            in_flight = launched
            stuck = plan is None and in_flight is None and self.scheduler.awaits_masks
            if self._config.forbid_late_compile and self.num_late_compiles:
                raise AssertionError(f"{self.num_late_compiles} compilations in live traffic")

    def _drain(self, *, block: bool, timeout_s: float | None = None) -> list[Command]:
        """All commands that have come; waits for one if there is nothing else to do."""
        commands: list[Command] = []
        try:
            commands.append(self._inbox.get(block=block, timeout=timeout_s))
            while True:
                commands.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        with self._lock:
            arrived = sum(isinstance(command, Request) for command in commands)
            self._num_submitted -= arrived
            self._num_waiting += arrived
        return commands

    def _stats(self, plan: StepPlan, host_s: float, device_s: float) -> StepStats:
        stats = self.scheduler.stats(plan, host_s=host_s, device_s=device_s)
        with self._lock:
            self._num_waiting = stats.num_waiting
        return stats

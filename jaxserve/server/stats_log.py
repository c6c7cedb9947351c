"""The line about the engine's work that is logged every ten seconds."""

import logging
import threading
import time
from collections.abc import Callable

from jaxserve.server.metrics import Totals

logger = logging.getLogger(__name__)


class StatsLog:
    """Averages over an interval, with the fields of vLLM's line; silent while nothing happens.

    Args:
        totals: What was counted so far: `Metrics.totals`.
        engine: Its number in the line.
    """

    def __init__(
        self,
        totals: Callable[[], Totals],
        *,
        engine: int = 0,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._totals, self._engine = totals, engine
        self._interval_s, self._clock = interval_s, clock
        self._since, self._before = clock(), totals()
        self._hit_rate = 0.0  # of the newest interval with look-ups
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Log from a thread, until `stop`."""
        self._thread = threading.Thread(target=self._run, name="jaxserve-stats", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Log the rest, and end the thread. May be called again."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
            self.log()

    def log(self) -> None:
        """Write the line of the interval that ends now, if there was a step in it."""
        now, totals, before = self._clock(), self._totals(), self._before
        seconds = max(now - self._since, 1e-9)
        self._since, self._before = now, totals
        stats = totals.stats
        if stats is before.stats:
            return
        queries = stats.num_prefix_queries - before.stats.num_prefix_queries
        if queries > 0:
            self._hit_rate = (stats.num_prefix_hits - before.stats.num_prefix_hits) / queries
        blocks = max(1, stats.num_used_blocks + stats.num_free_blocks)
        busy = totals.num_unfinished > 0  # the last step before idling may speak of requests
        logger.info(
            "Engine %03d: Avg prompt throughput: %.1f tokens/s, "
            "Avg generation throughput: %.1f tokens/s, Running: %d reqs, Waiting: %d reqs, "
            "Preemptions: %d, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            self._engine,
            (totals.num_prompt_tokens - before.num_prompt_tokens) / seconds,
            (totals.num_generation_tokens - before.num_generation_tokens) / seconds,
            stats.num_running if busy else 0,
            stats.num_waiting if busy else 0,
            stats.num_preemptions,
            100 * stats.num_used_blocks / blocks if busy else 0.0,
            100 * self._hit_rate,
        )

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.log()

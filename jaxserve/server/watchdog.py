"""Is the engine alive? It is when it makes progress, not when a port answers."""

import threading
import time
from collections.abc import Callable, Sequence

from jaxserve.errors import ConfigError
from jaxserve.frontend.observers import Observers, TokenEvents
from jaxserve.frontend.request_state import RequestState
from jaxserve.step import StepStats


class Watchdog:
    """Watches that steps finish while there is work.

    A busy engine is alive however much waits; an idle one is alive, too. The deadline begins anew
    with each step, and when work comes after idling. Thread-safe, and takes no lock that a step
    holds for long, so that a health check is quick under load.

    Args:
        num_unfinished: The number of requests that wait for the engine.
        timeout_s: A step may take so long.
        clock: Seconds that only grow.

    Raises:
        ConfigError: The timeout is not positive.
    """

    def __init__(
        self,
        num_unfinished: Callable[[], int],
        *,
        timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not timeout_s > 0:
            raise ConfigError(
                f"engine_step_timeout_s={timeout_s} leaves no time for a step; use a number of "
                "seconds above 0, such as 60"
            )
        self._num_unfinished, self._timeout_s, self._clock = num_unfinished, timeout_s, clock
        self._lock = threading.Lock()
        self._num_live = 0  # of those we saw come: counted here, so that no arrival is missed
        self._since = clock()

    def watch(self, observers: Observers) -> None:
        """Watch what these see from now on."""
        observers.submitted.append(self.on_submitted)
        observers.refused.append(self.on_refused)
        observers.step.append(self.on_step)
        observers.finished.append(self.on_finished)

    @property
    def stalled_s(self) -> float:
        """Seconds without progress while there is work; else 0."""
        if self._num_unfinished() == 0:
            return 0.0
        with self._lock:
            return self._clock() - self._since

    def healthy(self) -> bool:
        """False: there is work, and no step has finished within the deadline."""
        return self.stalled_s <= self._timeout_s

    def on_submitted(self, state: RequestState) -> None:
        with self._lock:
            if self._num_live == 0:
                self._since = self._clock()
            self._num_live += 1

    def on_refused(self, error: BaseException, state: RequestState | None) -> None:
        if state is not None:
            self.on_finished([state])

    def on_finished(self, states: Sequence[RequestState]) -> None:
        with self._lock:
            self._num_live -= len(states)

    def on_step(self, stats: StepStats | None, tokens: TokenEvents) -> None:
        if stats is not None:  # else the engine only refused something
            with self._lock:
                self._since = self._clock()

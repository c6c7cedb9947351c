"""Who wants to know what happens to requests: metrics, logs, traces, the watchdog."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxserve.frontend.request_state import RequestState
from jaxserve.request import TokenDelta
from jaxserve.step import StepStats

logger = logging.getLogger(__name__)

type TokenEvents = Sequence[tuple[RequestState, TokenDelta]]


@dataclass(slots=True)
class Observers:
    """Functions that are called as things happen, each list in order; add to them before traffic.

    A request that is `submitted` is afterwards either `refused` or `finished`, once. One that is
    refused before it has a state comes with None. `submitted` runs where the request came from (its
    context variables are set), `step` in the thread that reads the engine, the others in either.

    They must be quick, for requests wait meanwhile. What one raises is logged, and changes nothing.
    """

    submitted: list[Callable[[RequestState], None]] = field(default_factory=list)
    refused: list[Callable[[BaseException, RequestState | None], None]] = field(
        default_factory=list
    )
    # Once a message of the engine: the step's figures, if it was a step, and the new tokens.
    step: list[Callable[[StepStats | None, TokenEvents], None]] = field(default_factory=list)
    # All that ended together, at least one.
    finished: list[Callable[[Sequence[RequestState]], None]] = field(default_factory=list)


def notify[*Facts](observers: Sequence[Callable[[*Facts], None]], *facts: *Facts) -> None:
    """Call each observer, whatever the others do."""
    for observer in observers:
        try:
            observer(*facts)
        except Exception:
            logger.exception("an observer failed: %r", observer)

"""Grammars of running sequences: which tokens may come next, found by threads beside the loop.

What a grammar is, only the matchers know that are handed in; nothing here imports their library.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxserve.request import Grammar

PATIENCE_S = 0.01  # so long a step waits for masks, that rows stay together
SLOW_S = 0.05  # a grammar whose last mask took longer goes where it holds up no other
TIMEOUT_S = 20.0  # for one mask


class Matcher(Protocol):
    """One output's place in a grammar; see `frontend/matchers.py`. ValueError: it cannot go on."""

    ended: bool

    @property
    def may_end(self) -> bool: ...
    def copy(self) -> "Matcher": ...
    def accept(self, token_ids: Sequence[int]) -> None: ...
    def fill(self, words: np.ndarray) -> None: ...


class MatcherFactory(Protocol):
    """Makes matchers, from any thread."""

    num_words: int  # uint32 words of a mask

    def make(self, grammar: str) -> Matcher: ...


@dataclass(slots=True, eq=False, kw_only=True)
class GrammarState:
    """Where one sequence stands. Between `advance` and `collect` it belongs to a thread."""

    seq_id: int
    grammar: Grammar
    words: np.ndarray  # uint32, one bit for each token that may come next
    started: bool  # whether the grammar holds now
    may_open: bool = False  # nothing is out yet, and the next token may begin free text
    opens_only: bool = False  # which no token of the form may be
    matcher: Matcher | None = None
    ready: bool = False  # `words` is right; set by `collect` alone
    may_end: bool = False  # the output so far is complete
    ended: bool = False  # nothing can follow
    error: str | None = None
    dropped: bool = False  # its sequence has gone
    begun_s: float = 0.0  # when a thread began with it, time.monotonic(); 0: not yet
    last_s: float = 0.0  # what the last mask took
    tail: tuple[int, ...] = ()  # newest tokens, as many as the longest of `start_after` has

    @property
    def mask(self) -> np.ndarray | None:
        """The mask of the next token; None: it is free."""
        return self.words if self.started else None

    def take(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Those of new tokens that the grammar governs."""
        if self.may_open:
            self._decide(token_ids[0])
        if self.started:
            return token_ids
        markers = self.grammar.start_after
        longest = max(map(len, markers))
        for i, token_id in enumerate(token_ids, 1):
            self.tail = (*self.tail, token_id)[-longest:]
            if any(self.tail[-len(marker) :] == marker for marker in markers):
                self.started = True
                return token_ids[i:]
        return ()

    def allow_opening(self) -> None:
        """Lets the first token also be the one that begins free text."""
        token_id = self.grammar.opened_by
        if token_id is None:
            return
        word, bit = divmod(token_id, 32)
        self.may_open, self.opens_only = True, not int(self.words[word]) >> bit & 1
        self.words[word] |= np.uint32(1 << bit)

    def _decide(self, token_id: int) -> None:
        """By the first token, whether there is free text. `words` is that of the form's start."""
        self.may_open = False
        if token_id == self.grammar.opened_by:
            self.started = False
            if self.opens_only:
                word, bit = divmod(token_id, 32)
                self.words[word] &= ~np.uint32(1 << bit)


class Lane:
    """Threads that do one kind of job, in the order they come. They start with the first job."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._name, self._num_threads = name, num_threads
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def put(self, job: Callable[[], None]) -> None:
        if not self._threads:
            for i in range(self._num_threads):
                thread = threading.Thread(
                    target=self._run, name=f"jaxserve-{self._name}-{i}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
        self._jobs.put(job)

    def close(self) -> None:
        """Ends the threads once they are done with one job each; waits a little for that."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=5.0)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closed:
            job()


@dataclass(slots=True, kw_only=True)
class Grammars:
    """The grammars of all live sequences. Its methods belong to the engine's thread.

    Args:
        factory: Makes the matchers.
        wake: Called from a thread when something is ready, that a loop which sleeps goes on.
    """

    factory: MatcherFactory
    wake: Callable[[], None]
    _done: "queue.SimpleQueue[GrammarState]" = field(default_factory=queue.SimpleQueue)
    _pending: set[GrammarState] = field(default_factory=set)
    _fresh: set[GrammarState] = field(default_factory=set)  # those that a step still waits for
    _patient_until_s: float = 0.0
    _lanes: dict[str, Lane] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num = max(2, min(8, (os.cpu_count() or 2) // 2))
        self._lanes = {name: Lane(name, num) for name in ("compile", "mask", "slow-mask")}

    @property
    def num_pending(self) -> int:
        """States that threads work on."""
        return len(self._pending)

    def open(self, grammar: Grammar, seq_ids: Sequence[int]) -> list[GrammarState]:
        """States for the choices of a request; not ready yet."""
        states = [
            GrammarState(
                seq_id=seq_id,
                grammar=grammar,
                words=np.zeros(self.factory.num_words, np.uint32),
                started=not grammar.start_after or grammar.opened_by is not None,
            )
            for seq_id in seq_ids
        ]
        self._pending.update(states)
        self._lanes["compile"].put(lambda: self._make(grammar, states))
        return states

    def advance(self, state: GrammarState, token_ids: Sequence[int]) -> None:
        """Takes in tokens of an output; it is not ready then until `collect` says so."""
        governed = state.take(token_ids)
        if not governed:
            return
        state.ready, state.begun_s = False, 0.0
        self._pending.add(state)
        slow = state.last_s > SLOW_S
        if not slow:
            self._fresh.add(state)
            self._patient_until_s = time.monotonic() + PATIENCE_S
        self._lanes["slow-mask" if slow else "mask"].put(lambda: self._step(state, governed))

    def collect(self) -> list[GrammarState]:
        """The states that have become ready, or have failed or ended.

        Waits until every mask that was begun has had `PATIENCE_S`, and not for one that takes
        longer.
        """
        found: list[GrammarState] = []
        while self._pending:
            patience_s = self._patient_until_s - time.monotonic() if self._fresh else 0.0
            try:
                state = self._done.get(timeout=max(0.0, patience_s))
            except queue.Empty:
                self._fresh.clear()
                break
            self._fresh.discard(state)
            if state in self._pending:
                self._pending.remove(state)
                state.ready = True
                found.append(state)
        return found + self._late()

    def forget(self, state: GrammarState) -> None:
        """Its sequence has ended; what a thread still finds for it is dropped."""
        state.dropped = True
        self._pending.discard(state)
        self._fresh.discard(state)

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()

    def _late(self) -> list[GrammarState]:
        limit = time.monotonic() - TIMEOUT_S
        late = [state for state in self._pending if 0 < state.begun_s < limit]
        for state in late:
            self.forget(state)
            state.error = f"the grammar took longer than {TIMEOUT_S:g} s for one token"
        return late

    # In the lanes' threads

    def _make(self, grammar: Grammar, states: list[GrammarState]) -> None:
        if all(state.dropped for state in states):
            return
        for state in states:
            state.begun_s = time.monotonic()
        first, *others = states
        try:
            matcher = self.factory.make(grammar.text)
            matcher.fill(first.words)
            first.matcher = matcher
            _look(first, matcher)
            for state in others:
                state.matcher = matcher.copy()
                state.words[:] = first.words
                state.error, state.may_end = first.error, first.may_end
        except Exception as error:  # of this request; the loop and the others go on
            for state in states:
                state.error = _message(error)
        for state in states:
            if state.error is None:
                state.allow_opening()
            self._done.put(state)
        self.wake()

    def _step(self, state: GrammarState, token_ids: Sequence[int]) -> None:
        if state.dropped:
            return
        state.begun_s = time.monotonic()
        try:
            if state.matcher is None:
                raise ValueError("there is no matcher")
            state.matcher.accept(token_ids)
            if state.matcher.ended:
                state.ended = True
            else:
                state.matcher.fill(state.words)
                _look(state, state.matcher)
        except Exception as error:
            state.error = _message(error)
        state.last_s = time.monotonic() - state.begun_s
        self._done.put(state)
        self.wake()


def _look(state: GrammarState, matcher: Matcher) -> None:
    """Notes whether the output may end here, and whether it must."""
    state.may_end = matcher.may_end
    if not state.words.any():
        if state.may_end:
            state.ended = True
        else:
            state.error = "the grammar allows no token"


def _message(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"the grammar cannot go on: {first[:200] or type(error).__name__}"

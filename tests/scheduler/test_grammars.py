"""Rows with a grammar, whose masks threads find: they wait for them, and nobody else does."""

import dataclasses
import queue
import random
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from jaxserve.request import Abort, Grammar, Request
from jaxserve.scheduler.grammar import Grammars, GrammarState
from tests.scheduler.fake_runner import EOS, Engine, make_request


class FakeMatcher:
    """Outputs of `length` tokens, odd ones after even ones, then EOS.

    The text is "length", or "length:what:when": from token `when` on a mask is "slow" or "stuck"
    (it waits for a gate), "fails", is "empty", or the token itself is "rejected".
    """

    gate = queue.SimpleQueue[None]()

    def __init__(self, text: str) -> None:
        length, self.what, when = [*text.split(":"), "", "0"][:3]
        self.length, self.when = int(length), int(when)
        self.count = 0
        self.ended = False
        if self.what == "broken":
            raise ValueError("this grammar does not compile")

    @property
    def may_end(self) -> bool:
        return self.count == self.length

    def copy(self) -> "FakeMatcher":
        other = FakeMatcher(f"{self.length}:{self.what}:{self.when}")
        other.count = self.count
        return other

    def accept(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if self.what == "rejected" and self.count == self.when:
                raise ValueError("not this token")
            if token_id == EOS:
                assert self.may_end
                self.ended = True
            else:
                assert token_id % 2 == self.count % 2
                self.count += 1

    def fill(self, words: np.ndarray) -> None:
        if self.count >= self.when:
            if self.what == "slow":
                time.sleep(0.06)
            elif self.what == "stuck":
                FakeMatcher.gate.get()
            elif self.what == "fails":
                raise RuntimeError("boom")
            elif self.what == "empty":
                words[:] = 0
                return
        parity = 0b010101010101 if self.count % 2 == 0 else 0b001010101010
        words[0] = 1 << EOS if self.may_end else parity & ~(1 << EOS)


class Factory:
    num_words = 1

    def make(self, grammar: str) -> FakeMatcher:
        return FakeMatcher(grammar)


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    found = Grammars(factory=Factory(), wake=lambda: None)
    yield found
    for _ in range(100):
        FakeMatcher.gate.put(None)
    found.close()
    while not FakeMatcher.gate.empty():
        FakeMatcher.gate.get()


def bound(
    request: Request,
    text: str,
    start_after: tuple[tuple[int, ...], ...] = (),
    opened_by: int | None = None,
) -> Request:
    grammar = Grammar(text=text, start_after=start_after, opened_by=opened_by)
    return dataclasses.replace(
        request, grammar=grammar, needs_host_tokens=True, eos_token_id=EOS, max_tokens=20
    )


def run(engine: Engine, until: Callable[[], bool] | None = None, limit_s: float = 20.0) -> None:
    """The engine's loop; waits where nothing moves until a mask is found."""
    end = time.monotonic() + limit_s
    while until is None or not until():
        if engine.scheduler.idle and not engine.in_flight:
            return
        assert time.monotonic() < end, "it takes too long"
        engine.step()


def ends(engine: Engine, request_id: str, choice: int = 0) -> tuple[str | None, str | None]:
    last = engine.deltas[request_id, choice][-1]
    return last.finish_reason, last.error


def is_right(output: tuple[int, ...], length: int) -> bool:
    return (
        len(output) == length + 1
        and output[-1] == EOS
        and all(token % 2 == i % 2 for i, token in enumerate(output[:-1]))
    )


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_outputs_follow_their_grammars_and_others_are_as_alone(
    grammars: Grammars, steps_ahead: int
) -> None:
    engine = Engine(steps_ahead=steps_ahead, grammars=grammars)
    plain = [make_request(f"p{i}", (i, 2, 3), 12) for i in range(3)]
    requests = [bound(make_request(f"g{i}", (i, 5), n=1 + i % 2), f"{3 + i}") for i in range(4)]
    engine.add(*plain, *requests)
    run(engine)
    for request in plain:
        engine.check_output(request)
    for i, request in enumerate(requests):
        for choice in range(request.sampling.n):
            output = engine.output(request.request_id, choice)
            assert is_right(output, 3 + i)
            alone = Engine(steps_ahead=steps_ahead, grammars=grammars)
            alone.add(request)
            run(alone)
            assert alone.output(request.request_id, choice) == output


def test_tokens_survive_preemption(grammars: Grammars) -> None:
    requests = [bound(make_request(f"g{i}", (i, 5, 7), 16), "15") for i in range(4)]
    outputs = []
    for num_blocks in (65, 9):
        engine = Engine(steps_ahead=1, grammars=grammars, num_blocks=num_blocks)
        engine.add(*requests)
        run(engine)
        outputs.append([engine.output(request.request_id) for request in requests])
        assert (engine.scheduler.stats(None).num_preemptions > 0) == (num_blocks == 9)
    assert outputs[0] == outputs[1]
    assert all(is_right(output, 15) for output in outputs[0])


@pytest.mark.parametrize("when", [0, 2])
def test_a_mask_that_takes_for_ever_stalls_nobody_else(grammars: Grammars, when: int) -> None:
    # It stands first in line, and there is one row more than it needs.
    engine = Engine(steps_ahead=1, grammars=grammars, max_num_seqs=2)
    stuck = bound(make_request("stuck", (1, 2)), f"4:stuck:{when}")
    others = [bound(make_request(f"g{i}", (i, 5)), "4") for i in range(3)]
    plain = make_request("p", (9, 9), 12)
    engine.add(stuck, *others, plain)
    run(engine, until=lambda: len(engine.scheduler._backlog.live) == 1)
    assert all(is_right(engine.output(request.request_id), 4) for request in others)
    engine.check_output(plain)
    assert ("stuck", 0) not in engine.deltas or ends(engine, "stuck") == (None, None)
    for _ in range(8):
        FakeMatcher.gate.put(None)
    run(engine)
    assert is_right(engine.output("stuck"), 4)


def test_slow_masks_do_not_slow_the_steps_of_others(grammars: Grammars) -> None:
    engine = Engine(steps_ahead=1, grammars=grammars)
    engine.add(*[bound(make_request(f"slow{i}", (i, 2)), "9:slow:0") for i in range(3)])
    run(engine, until=lambda: len(engine.deltas) == 3)
    quick = [bound(make_request(f"g{i}", (i, 5)), "9") for i in range(3)]
    engine.add(*quick)
    start = time.monotonic()
    run(engine, until=lambda: all(ends_of(engine, r) for r in quick))
    assert time.monotonic() - start < 9 * 0.06 * 3  # in turns it would take nine times three
    run(engine)
    assert all(is_right(engine.output(f"slow{i}"), 9) for i in range(3))


def ends_of(engine: Engine, request: Request) -> bool:
    deltas = engine.deltas.get((request.request_id, 0))
    return deltas is not None and deltas[-1].finish_reason is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5:broken:0", "does not compile"),
        ("5:fails:0", "boom"),
        ("5:fails:3", "boom"),
        ("5:empty:0", "allows no token"),
        ("5:empty:2", "allows no token"),
        ("5:rejected:1", "not this token"),
    ],
)
def test_a_grammar_that_fails_ends_its_request_alone(
    grammars: Grammars, text: str, message: str
) -> None:
    engine = Engine(steps_ahead=1, grammars=grammars)
    good = bound(make_request("good", (3, 4), n=2), "5")
    engine.add(bound(make_request("bad", (1, 2), n=2), text), good, make_request("p", (8,), 9))
    run(engine)
    for choice in range(2):
        reason, error = ends(engine, "bad", choice)
        assert reason == "error"
        assert error is not None
        assert message in error
        assert is_right(engine.output("good", choice), 5)
    assert engine.output("p")
    assert engine.num_free == 64


def test_failures_at_random_steps_touch_nobody_else(grammars: Grammars) -> None:
    rng = random.Random(5)
    engine = Engine(steps_ahead=1, grammars=grammars, num_blocks=24)
    wanted: dict[str, str] = {}
    for i in range(60):
        what = rng.choice(["", "fails", "rejected", "empty", "slow", "abort"])
        name = f"{what or 'good'}{i}"
        text = "7" if what in ("", "abort") else f"7:{what}:{rng.randrange(7)}"
        engine.add(bound(make_request(name, tuple(rng.choices(range(11), k=4))), text))
        wanted[name] = what
        for _ in range(rng.randrange(4)):
            engine.step()
        if what == "abort":
            engine.add(Abort(request_id=name))
    run(engine)
    for name, what in wanted.items():
        if what in ("", "slow"):
            assert is_right(engine.output(name), 7), name
        elif what != "abort":
            assert ends(engine, name)[0] == "error"
    assert engine.num_free == 23
    assert grammars.num_pending == 0


def test_an_aborted_request_is_forgotten_while_a_thread_works_for_it(grammars: Grammars) -> None:
    engine = Engine(grammars=grammars)
    engine.add(bound(make_request("stuck", (1, 2)), "4:stuck:0"))
    engine.step()
    engine.add(Abort(request_id="stuck"))
    assert engine.scheduler.idle
    assert grammars.num_pending == 0


def test_the_grammar_begins_after_the_marker(grammars: Grammars) -> None:
    state = GrammarState(
        seq_id=0,
        grammar=Grammar(text="3", start_after=((5, 6, 9), (7, 8))),
        words=np.zeros(1, np.uint32),
        started=False,
    )
    assert state.take([1, 7]) == ()
    assert state.mask is None
    assert list(state.take([8, 2])) == [2]
    assert state.mask is not None
    assert list(state.take([4])) == [4]


def test_free_text_before_the_marker_is_what_it_is_alone(grammars: Grammars) -> None:
    plain = make_request("p", (3, 1, 4), 20)
    engine = Engine(steps_ahead=1, grammars=grammars)
    engine.add(plain)
    run(engine)
    free = engine.output("p")
    marker = free[3:5]
    first = next(i for i in range(5) if free[i : i + 2] == marker)
    assert EOS not in free[: first + 2]
    engine.add(bound(make_request("g", (3, 1, 4), 20), "4", (marker,)))
    run(engine)
    output = engine.output("g")
    assert output[: first + 2] == free[: first + 2]
    assert is_right(output[first + 2 :], 4)


def test_without_the_token_that_opens_free_text_the_grammar_holds_at_once(
    grammars: Grammars,
) -> None:
    opened = 0
    for opener in range(1, 10, 2):  # the form itself begins with an even one
        engine = Engine(steps_ahead=1, grammars=grammars)
        engine.add(bound(make_request("g", (3, 1, 4), 20), "4", ((9, 9, 9),), opener))
        run(engine)
        output = engine.output("g")
        opened += output[0] == opener
        assert output[0] == opener or is_right(output, 4)
    assert opened < 5


def test_the_token_that_opens_free_text_may_be_drawn_first_and_only_then(
    grammars: Grammars,
) -> None:
    grammar = Grammar(text="3", start_after=((7,),), opened_by=5)
    (state,) = grammars.open(grammar, [0])
    while not state.ready:
        grammars.collect()
    form = 0b010101010101
    assert state.words[0] == form | 1 << 5
    assert state.mask is not None
    grammars.advance(state, [5])
    assert state.mask is None
    assert state.ready
    grammars.advance(state, [1, 7])
    assert state.mask is not None
    assert state.words[0] == form
    (other,) = grammars.open(grammar, [1])
    while not other.ready:
        grammars.collect()
    grammars.advance(other, [2])
    assert other.mask is not None
    while not other.ready:
        grammars.collect()
    assert other.words[0] == 0b001010101010


def test_without_a_tokenizer_such_requests_are_refused() -> None:
    engine = Engine()
    engine.add(bound(make_request("g", (1,)), "3"))
    assert ends(engine, "g")[0] == "error"
    assert engine.scheduler.idle


def test_a_mask_that_is_never_found_ends_its_request(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.scheduler.grammar.TIMEOUT_S", 0.2)
    engine = Engine(steps_ahead=1, grammars=grammars)
    engine.add(bound(make_request("stuck", (1, 2)), "4:stuck:1"))
    run(engine)
    reason, error = ends(engine, "stuck")
    assert reason == "error"
    assert error is not None
    assert "took longer than 0.2 s" in error

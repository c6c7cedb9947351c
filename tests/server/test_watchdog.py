"""Alive is who makes progress: an idle engine, a busy one, a stuck one."""

import pytest

from jaxserve.errors import ConfigError, RequestError
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.watchdog import Watchdog
from tests.server.observed import Clock, make_client, new_delta, new_state, new_stats, run


class Engine:
    """What a watchdog sees."""

    def __init__(self) -> None:
        self.clock = Clock(0.0)
        self.num_unfinished = 0
        self.dog = Watchdog(lambda: self.num_unfinished, timeout_s=60, clock=self.clock)

    def submit(self, name: str = "a") -> None:
        self.num_unfinished += 1
        self.dog.on_submitted(new_state(name))

    def finish(self, name: str = "a") -> None:
        self.num_unfinished -= 1
        self.dog.on_finished([new_state(name)])


def test_an_idle_engine_is_alive() -> None:
    engine = Engine()
    engine.clock.now = 1e6
    assert engine.dog.healthy()
    assert engine.dog.stalled_s == 0


def test_an_engine_without_progress_is_dead_after_the_deadline() -> None:
    engine = Engine()
    engine.submit()
    engine.clock.now = 60.0
    assert engine.dog.healthy()
    engine.clock.now = 60.1
    assert not engine.dog.healthy()
    assert engine.dog.stalled_s == pytest.approx(60.1)
    engine.dog.on_step(new_stats(), [])  # it was slow, and goes on
    assert engine.dog.healthy()


def test_a_busy_engine_is_alive_however_much_waits() -> None:
    engine = Engine()
    for i in range(500):
        engine.submit(str(i))
        engine.clock.now += 59.0
        engine.dog.on_step(new_stats(num_waiting=i), [])
    assert engine.dog.healthy()


def test_the_deadline_begins_anew_when_work_comes_after_idling() -> None:
    engine = Engine()
    engine.submit()
    engine.dog.on_step(new_stats(), [])
    engine.finish()
    engine.clock.now = 1000.0
    engine.submit("b")
    assert engine.dog.healthy()
    engine.clock.now = 1059.0
    engine.submit("c")  # more work is no progress
    engine.clock.now = 1061.0
    assert not engine.dog.healthy()


def test_a_refusal_is_neither_work_nor_progress() -> None:
    engine = Engine()
    engine.submit()
    engine.clock.now = 61.0
    engine.dog.on_refused(RequestError("bad"), None)
    refused = new_state("b")
    engine.dog.on_submitted(refused)
    engine.dog.on_refused(RequestError("full"), refused)
    engine.dog.on_step(None, [new_delta(new_state("c"), tokens=0, reason="error")])
    assert not engine.dog.healthy()
    engine.finish()
    engine.clock.now = 1000.0
    engine.submit("d")
    assert engine.dog.healthy()


def test_it_watches_a_client() -> None:
    client, engine = make_client("a b c")
    clock = Clock(0.0)
    dog = Watchdog(lambda: client.num_unfinished, timeout_s=5, clock=clock)
    dog.watch(client.observers)
    clock.now = 100.0
    state = client.submit("Say", SamplingParams())
    clock.now = 106.0
    assert not dog.healthy()
    run(client, engine, [state])
    assert dog.healthy()
    with pytest.raises(RequestError):
        client.submit("", SamplingParams())
    client.submit("Say", SamplingParams())
    clock.now = 112.0
    assert not dog.healthy()
    client.shutdown()
    assert dog.healthy()  # nobody waits; that it is dead says `Client.check_health`


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_a_deadline_without_time_is_refused(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="engine_step_timeout_s"):
        Watchdog(lambda: 0, timeout_s=timeout_s)

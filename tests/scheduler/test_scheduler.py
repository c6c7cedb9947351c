"""Who runs when: order, budget, chunks, stops, aborts, and what is reported."""

import ast
from pathlib import Path
from random import Random

import pytest

import jaxserve.scheduler
from jaxserve.errors import ConfigError, RequestError
from jaxserve.request import Abort, TokenLogprobs
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step import SampledRow, StepPlan
from tests.scheduler.fake_runner import EOS, Engine, expected_output, make_request


def shape(plan: StepPlan | None) -> list[tuple[int, int, bool]]:
    """Of each row: the sequence, its tokens, whether it samples."""
    return [(row.seq_id, row.num_tokens, row.samples) for row in plan.rows] if plan else []


def test_a_long_prompt_takes_what_decoding_leaves_of_the_budget() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add(make_request("a", 4, 8))
    assert shape(engine.step()) == [(0, 4, True)]
    engine.add(make_request("b", (9,) * 16, 2))
    assert shape(engine.step()) == [(0, 1, True), (1, 7, False)]
    assert shape(engine.step()) == [(0, 1, True), (1, 7, False)]
    assert shape(engine.step()) == [(0, 1, True), (1, 2, True)]
    assert shape(engine.step()) == [(0, 1, True), (1, 1, True)]


def test_a_last_chunk_of_one_token_counts_as_a_decode_row() -> None:
    engine = Engine(max_num_batched_tokens=4, max_num_seqs=2)
    engine.add(make_request("a", 5), make_request("b", 9))
    engine.step()
    assert shape(engine.step()) == [(0, 1, True), (1, 3, False)]


def test_without_chunked_prefill_a_prompt_waits_until_all_of_it_fits() -> None:
    engine = Engine(max_num_batched_tokens=64, enable_chunked_prefill=False)
    engine.add(make_request("a", 40), make_request("b", (9,) * 30), make_request("c", (8,) * 10))
    assert shape(engine.step()) == [(0, 40, True)]
    assert shape(engine.step()) == [(0, 1, True), (1, 30, True), (2, 10, True)]


def test_without_chunked_prefill_the_budget_must_hold_a_whole_prompt() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=63 is less than max_model_len"):
        Engine(max_num_batched_tokens=63, enable_chunked_prefill=False)


def test_sizes_that_cannot_work_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="num_blocks=1 leaves none.*max_num_seqs=0 is too small"):
        Engine(num_blocks=1, max_num_seqs=0)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "message"),
    [
        (0, 4, "has 0 tokens"),
        (4, 0, "max_tokens is 0; use at least 1"),
        (60, 5, "65 together, but max_model_len is 64 tokens"),
        (20, 14, "needs 9 KV blocks of 4 tokens, but the cache has 8"),
    ],
)
def test_what_could_never_run_is_refused(num_prompt: int, max_tokens: int, message: str) -> None:
    engine = Engine(num_blocks=9)
    request = make_request("a", num_prompt)
    object.__setattr__(request, "max_tokens", max_tokens)
    with pytest.raises(RequestError, match=message):
        engine.scheduler.check(request)
    (delta,) = engine.scheduler.accept(request)
    assert (delta.finish_reason, delta.request_id) == ("error", "a")
    assert message in (delta.error or "")
    assert engine.scheduler.idle


def test_what_just_fits_the_pool_runs() -> None:
    engine = Engine(num_blocks=9)
    request = make_request("a", 20, 13)  # the last of 33 tokens needs no KV
    engine.add(request)
    engine.run()
    engine.check_output(request)


def test_a_refused_request_answers_for_every_choice() -> None:
    deltas = Engine().scheduler.accept(make_request("a", 80, n=3))
    assert [delta.choice for delta in deltas] == [0, 1, 2]


def test_an_id_in_use_is_refused_and_the_first_goes_on() -> None:
    engine = Engine()
    request = make_request("a", 4)
    engine.add(request)
    (delta,) = engine.scheduler.accept(make_request("a", 5))
    assert delta.finish_reason == "error"
    engine.run()
    engine.check_output(request)


def test_first_come_first_served_without_overtaking() -> None:
    engine = Engine(num_blocks=9)
    engine.add(make_request("a", 16, 8), make_request("b", (9,) * 20), make_request("c", 1))
    engine.run()
    assert [[row.seq_id for row in plan.rows] for plan in engine.plans[:8]] == [[0]] * 8
    assert [new.seq_id for new in engine.plans[8].new_rows] == [1, 2], "c fits, but b comes first"


def test_priority_comes_before_arrival_only_under_that_policy() -> None:
    for policy, order in (("fcfs", [0, 1, 2]), ("priority", [1, 2, 0])):
        engine = Engine(policy=policy, max_num_seqs=1)
        for index, priority in enumerate((5, -1, 0)):
            engine.add(make_request(str(index), 4, 1, priority=priority))
        engine.run()
        assert [plan.rows[0].seq_id for plan in engine.plans] == order


def test_a_token_not_yet_seen_is_read_on_the_device() -> None:
    engine = Engine(steps_ahead=1)
    engine.add(make_request("a", 3, 3))
    engine.run()
    assert [row.token_ids for plan in engine.plans for row in plan.rows] == [(0, 1, 2), (), ()]


def test_nothing_is_scheduled_past_the_last_token() -> None:
    for steps_ahead in (0, 1, 2):
        engine = Engine(steps_ahead=steps_ahead)
        engine.add(make_request("a", 3, 5))
        engine.run()
        assert sum(row.samples for plan in engine.plans for row in plan.rows) == 5


def eos_request(max_tokens: int = 30) -> tuple[tuple[int, ...], int]:
    """A prompt whose output alone reaches EOS, and after how many tokens."""
    for start in range(100):
        prompt = (start, 1, 2)
        request = make_request("x", prompt, max_tokens, eos_token_id=EOS)
        tokens, reason, _ = expected_output(request, 0)
        if reason == "stop" and 2 < len(tokens) < max_tokens:
            return prompt, len(tokens)
    raise AssertionError("no such prompt")


def test_an_end_seen_a_step_late_costs_one_row_and_no_token() -> None:
    prompt, num_tokens = eos_request()
    for steps_ahead in (0, 1):
        engine = Engine(steps_ahead=steps_ahead)
        request = make_request("a", prompt, 30, eos_token_id=EOS)
        engine.add(request)
        engine.run()
        engine.check_output(request)
        assert len(engine.plans) == num_tokens + steps_ahead


def test_eos_as_the_last_allowed_token_is_a_stop() -> None:
    prompt, num_tokens = eos_request()
    engine = Engine()
    engine.add(make_request("a", prompt, num_tokens, eos_token_id=EOS))
    engine.run()
    last = engine.deltas["a", 0][-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", None)


def test_a_stop_token_is_named_unless_it_is_eos() -> None:
    prompt, _ = eos_request()
    for eos, expected in ((None, EOS), (EOS, None)):
        engine = Engine()
        engine.add(make_request("a", prompt, 30, eos_token_id=eos, stop_token_ids=(EOS,)))
        engine.run()
        last = engine.deltas["a", 0][-1]
        assert (last.finish_reason, last.stop_reason) == ("stop", expected)


def test_nothing_stops_before_min_tokens() -> None:
    prompt, num_tokens = eos_request()
    for eos, stops in ((EOS, ()), (None, (EOS,))):
        engine = Engine()
        request = make_request(
            "a", prompt, 30, eos_token_id=eos, stop_token_ids=stops, min_tokens=num_tokens + 1
        )
        engine.add(request)
        engine.run()
        engine.check_output(request)
        assert len(engine.output("a")) > num_tokens


def test_a_row_that_needs_the_host_sits_out_while_others_go_on() -> None:
    engine = Engine(steps_ahead=1)
    engine.add(make_request("a", 3, 3, needs_host_tokens=True), make_request("b", 3, 6))
    engine.run()
    rows = [[row.seq_id for row in plan.rows] for plan in engine.plans]
    assert rows == [[0, 1], [1], [0, 1], [1], [0, 1], [1]]


def test_an_abort_frees_at_once_even_with_a_step_in_flight() -> None:
    engine = Engine(steps_ahead=1)
    engine.add(make_request("a", 10, 8), make_request("b", 10, 8))
    engine.step()
    free = engine.num_free
    engine.add(Abort(request_id="a"))
    assert engine.num_free == free + 3
    engine.run()
    assert ("a", 0) not in engine.deltas
    assert (engine.scheduler.num_aborted, engine.scheduler.num_finished) == (1, 1)


def test_what_the_client_finished_counts_as_finished() -> None:
    engine = Engine()
    engine.add(make_request("a", 10, 8))
    engine.step()
    engine.add(Abort(request_id="a", finished=True))
    assert (engine.scheduler.num_aborted, engine.scheduler.num_finished) == (0, 1)
    assert engine.scheduler.idle


def test_an_unknown_abort_is_ignored() -> None:
    engine = Engine()
    engine.add(make_request("a", 3), Abort(request_id="b"), Abort(request_id="a", choice=7))
    engine.run()
    assert engine.deltas["a", 0][-1].finish_reason == "length"


def test_aborted_waiting_requests_do_not_pile_up() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add(make_request("a", 3, 60))
    engine.step()
    for index in range(1000):
        engine.add(make_request(str(index), 3), Abort(request_id=str(index)))
    assert len(engine.scheduler._backlog._line) < 100


def test_times_are_those_of_the_steps() -> None:
    engine = Engine()
    engine.add(make_request("a", 3, 2, arrival_s=0.5))
    engine.run()
    first, last = engine.deltas["a", 0]
    assert first.times.arrival_s == 0.5
    assert first.times.scheduled_s > 0
    assert (first.times.first_token_s, first.times.last_token_s) == (1.0, 1.0)
    assert last.times.scheduled_s == first.times.scheduled_s


def test_stats_count_rows_tokens_and_unused_slots() -> None:
    engine = Engine(max_num_seqs=2, max_num_batched_tokens=16)
    engine.add(make_request("a", 6, 4), make_request("b", (9,) * 5, 4), make_request("c", 3, 4))
    plan = engine.step()
    stats = engine.scheduler.stats(plan, host_s=0.25, device_s=0.5)
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.num_prefill_tokens, stats.num_decode_tokens) == (11, 0)
    assert (stats.num_used_blocks, stats.num_free_blocks) == (4, 60)
    assert (stats.num_allocated_slots, stats.num_written_slots) == (16, 11)
    assert (stats.host_s, stats.device_s) == (0.25, 0.5)
    stats = engine.scheduler.stats(engine.step())
    assert (stats.num_prefill_tokens, stats.num_decode_tokens) == (0, 2)


def test_the_scheduler_imports_no_jax() -> None:
    for path in Path(jaxserve.scheduler.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("jax", "flax") for name in names), path


def test_nothing_to_do_is_no_plan() -> None:
    scheduler: Scheduler = Engine().scheduler
    assert scheduler.idle
    assert scheduler.schedule() is None


def test_the_line_stays_in_order_when_many_leave_it() -> None:
    random = Random(1)
    engine = Engine(max_num_seqs=1, policy="priority")
    priorities = [random.randrange(1000) for _ in range(400)]
    for index, priority in enumerate(priorities):
        engine.add(make_request(str(index), 2, 1, priority=priority))
    left = sorted(random.sample(range(400), 60))
    for index in set(range(400)) - set(left):
        engine.add(Abort(request_id=str(index)))
    engine.run()
    order = [plan.rows[0].seq_id for plan in engine.plans]
    assert order == sorted(left, key=lambda index: (priorities[index], index))


def test_of_several_sampled_tokens_those_after_the_end_are_dropped() -> None:
    request = make_request("a", 3, 9, stop_token_ids=(5,))
    scores = tuple(TokenLogprobs((token,), (0.0,), 1) for token in (4, 5, 6))
    seq = Sequence(
        seq_id=0,
        request=request,
        choice=0,
        standing=(0, 0, 0),
        max_total_tokens=12,
        block_ids=([],),
        num_tokens=4,
        num_pending_tokens=1,
    )
    delta = seq.append(SampledRow(0, (4, 5, 6), scores), 1.0)
    assert (delta.token_ids, delta.logprobs) == ((4, 5), scores[:2])
    assert (delta.finish_reason, delta.stop_reason) == ("stop", 5)
    assert (seq.num_tokens, seq.num_known_tokens) == (5, 5)

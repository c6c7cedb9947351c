"""Blocks are shared by prefix and by choice, and given up and rebuilt under pressure."""

import pytest

from jaxserve.request import Abort
from tests.scheduler.fake_runner import Engine, make_request


def test_a_computed_prefix_is_not_computed_again() -> None:
    engine = Engine()
    first, second = make_request("a", 14), make_request("b", (*range(12), 7, 7, 7))
    engine.add(first)
    engine.run()
    engine.add(second)
    plan = engine.step()
    assert plan is not None
    assert plan.num_tokens == 3
    assert plan.new_rows[0].block_ids == ((1, 2, 3),)
    engine.run()
    engine.check_output(second)
    assert {delta.num_cached_tokens for delta in engine.deltas["b", 0]} == {12}
    stats = engine.scheduler.stats(None)
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (14 + 15, 12)


def test_the_last_token_is_always_computed() -> None:
    engine = Engine()
    engine.add(make_request("a", 12))
    engine.run()
    engine.add(make_request("b", 12))
    plan = engine.step()
    assert plan is not None
    assert plan.num_tokens == 4


def test_a_prefix_is_shared_with_one_that_still_runs_but_not_in_the_same_step() -> None:
    for steps_ahead in (0, 1):
        engine = Engine(steps_ahead=steps_ahead)
        engine.add(make_request("a", 12), make_request("b", 12))
        engine.step()
        engine.add(make_request("c", 12))
        engine.step()
        assert [plan.num_tokens for plan in engine.plans] == [24, 2 + 4]


def test_output_tokens_enter_the_cache_too() -> None:
    for steps_ahead in (0, 1):
        engine = Engine(steps_ahead=steps_ahead)
        engine.add(make_request("a", 6, 7))  # computes 12 tokens
        engine.run()
        turn = (*range(6), *engine.output("a"), 1)
        engine.add(make_request("b", turn))
        engine.run()
        assert engine.deltas["b", 0][0].num_cached_tokens == 12


@pytest.mark.parametrize("field", ["cache_salt", "adapter"])
def test_tenants_and_adapters_share_nothing(field: str) -> None:
    engine = Engine()
    for index, value in enumerate((None, "x", "y", "x")):
        engine.add(make_request(str(index), 12, **{field: value}))  # type: ignore[arg-type]
        engine.run()
    cached = [deltas[0].num_cached_tokens for deltas in engine.deltas.values()]
    assert cached == [0, 0, 0, 8]


def test_a_salt_is_not_taken_for_an_adapter() -> None:
    engine = Engine()
    engine.add(make_request("a", 12, cache_salt="x"))
    engine.run()
    engine.add(make_request("b", 12, adapter="x"))
    engine.run()
    assert engine.deltas["b", 0][0].num_cached_tokens == 0


def test_a_request_may_write_the_cache_without_reading_it() -> None:
    engine = Engine()
    for index, skip in enumerate((True, True, False)):
        engine.add(make_request(str(index), 12, skip_reading_prefix_cache=skip))
        engine.run()
    cached = [deltas[0].num_cached_tokens for deltas in engine.deltas.values()]
    assert cached == [0, 0, 8]
    assert engine.scheduler.stats(None).num_prefix_queries == 12


def test_with_the_cache_off_nothing_is_found() -> None:
    engine = Engine(enable_prefix_caching=False)
    for index in range(2):
        engine.add(make_request(str(index), 12))
        engine.run()
        assert engine.deltas[str(index), 0][0].num_cached_tokens == 0


def test_prefixes_outlive_the_tails_that_follow_them() -> None:
    engine = Engine(num_blocks=9)
    engine.add(make_request("a", 16, 1))
    engine.run()
    engine.add(make_request("b", (9,) * 24, 1))  # four blank blocks, then two of a's
    engine.run()
    engine.add(make_request("c", 16, 1))
    engine.run()
    assert engine.deltas["c", 0][0].num_cached_tokens == 8


def test_the_cache_can_be_reset_only_while_nothing_runs() -> None:
    engine = Engine()
    engine.add(make_request("a", 12))
    engine.step()
    assert not engine.scheduler.reset_prefix_cache()
    engine.run()
    assert engine.scheduler.reset_prefix_cache()
    engine.add(make_request("b", 12))
    engine.run()
    assert engine.deltas["b", 0][0].num_cached_tokens == 0


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_choices_share_the_prompt_without_a_copy(caching: bool, steps_ahead: int) -> None:
    engine = Engine(enable_prefix_caching=caching, steps_ahead=steps_ahead)
    request = make_request("a", 14, 2, n=4)
    engine.add(request)
    first, second = engine.step(), engine.step()
    assert first is not None
    assert second is not None
    assert first.num_tokens == 14
    assert second.num_tokens == 1 + 3 * 2
    assert [new.block_ids for new in second.new_rows] == [((1, 2, 3),)] * 3
    if steps_ahead:
        stats = engine.scheduler.stats(second)
        assert stats.num_used_blocks == 3 + 4
        assert stats.num_allocated_slots - stats.num_written_slots == 1 + 3 * 2
    engine.run()
    for choice in range(4):
        engine.check_output(request, choice)
        assert engine.deltas["a", choice][0].num_cached_tokens == 0
    assert engine.scheduler.stats(None).num_prefix_hits == 0


def test_choices_share_even_when_rows_are_few() -> None:
    engine = Engine(enable_prefix_caching=False, max_num_seqs=2)
    request = make_request("a", 14, 3, n=5)
    engine.add(request)
    engine.run()
    for choice in range(5):
        engine.check_output(request, choice)
    assert engine.runner.num_computed_tokens <= 14 + 4 * 2 + 5 * 2 + 14


def test_when_the_leader_ends_early_the_next_choice_leads() -> None:
    engine = Engine(max_num_batched_tokens=8, steps_ahead=1)
    request = make_request("a", 14, 3, n=3)
    engine.add(request)
    engine.step()
    engine.add(Abort(request_id="a", choice=0))
    engine.run()
    assert sorted(engine.deltas) == [("a", 1), ("a", 2)]
    engine.check_output(request, 1)
    engine.check_output(request, 2)


def test_all_choices_end_with_their_request() -> None:
    for steps in range(4):
        engine = Engine(max_num_batched_tokens=8)
        engine.add(make_request("a", 14, 8, n=3))
        for _ in range(steps):
            engine.step()
        engine.add(Abort(request_id="a"))
        assert engine.scheduler.idle
        assert engine.scheduler.num_aborted == 3


def test_prompt_logprobs_are_whole_and_come_once() -> None:
    for steps_ahead in (0, 1):
        engine = Engine(max_num_batched_tokens=5, steps_ahead=steps_ahead)
        engine.add(make_request("warm", 14))
        engine.run()
        request = make_request("a", 14, 3, prompt_logprobs=0, n=2)
        engine.add(request)
        engine.run()
        for choice in range(2):
            engine.check_output(request, choice)
            assert all(d.prompt_logprobs is None for d in engine.deltas["a", choice][1:])


def test_the_last_to_arrive_is_preempted_and_comes_back_with_all_its_tokens() -> None:
    engine = Engine(num_blocks=9, enable_prefix_caching=False, steps_ahead=1)
    a, b = make_request("a", 12, 20), make_request("b", (5,) * 12, 20)
    engine.add(a, b)
    while engine.scheduler.stats(None).num_preemptions == 0:
        engine.step()
    (survivor,) = engine.scheduler._running
    assert survivor.request is a
    engine.run()
    engine.check_output(a)
    engine.check_output(b)
    resumed = next(new for plan in engine.plans[1:] for new in plan.new_rows)
    assert resumed.request is b
    assert len(resumed.token_ids) > 12
    assert engine.scheduler.stats(None).num_preemptions == 1


def test_the_least_important_is_preempted_under_priority() -> None:
    engine = Engine(num_blocks=9, policy="priority")
    a, b = make_request("a", 12, 20, priority=1), make_request("b", (5,) * 12, 20, priority=0)
    engine.add(a, b)
    while engine.scheduler.stats(None).num_preemptions == 0:
        engine.step()
    (survivor,) = engine.scheduler._running
    assert survivor.request is b
    engine.run()
    engine.check_output(a)
    engine.check_output(b)


def test_what_was_preempted_finds_its_own_blocks_again() -> None:
    engine = Engine(num_blocks=13)
    a, b = make_request("a", 12, 20), make_request("b", (5,) * 24, 8)
    engine.add(a, b)
    engine.run()
    assert engine.scheduler.stats(None).num_preemptions >= 1
    resumed = [new for plan in engine.plans[1:] for new in plan.new_rows]
    assert any(new.block_ids[0] for new in resumed)
    engine.check_output(b)
    assert engine.deltas["b", 0][-1].num_cached_tokens == 0, "its own blocks are no cache hit"


def test_a_prompt_is_admitted_only_when_all_of_it_has_room() -> None:
    engine = Engine(num_blocks=9, max_num_batched_tokens=8)
    engine.add(make_request("a", 16, 4), make_request("b", (5,) * 20, 4))
    engine.run()
    assert all(len(plan.rows) == 1 for plan in engine.plans), "4 and 5 blocks are more than 8"
    assert engine.scheduler.stats(None).num_preemptions == 0


def test_a_hit_counts_only_if_every_group_has_the_block() -> None:
    for groups, cached in ((2, 0), (1, 8)):
        engine = Engine(windows=(None, None))
        engine.add(make_request("a", 12))
        engine.run()
        for pool in engine.scheduler._blocks.pools[1:groups]:
            pool.forget_all()
        engine.add(make_request("b", 12))
        engine.run()
        assert engine.deltas["b", 0][0].num_cached_tokens == cached


def test_the_output_of_one_that_still_runs_is_found() -> None:
    for steps_ahead in (0, 1):
        engine = Engine(steps_ahead=steps_ahead)
        engine.add(make_request("a", 6, 40))
        while len(engine.output("a")) < 8:
            engine.step()
        engine.add(make_request("b", (*range(6), *engine.output("a")[:7])))
        engine.step()
        assert engine.plans[-1].new_rows[0].block_ids == ((1, 2, 3),)


def test_choices_share_after_a_last_chunk_of_one_token() -> None:
    engine = Engine(enable_prefix_caching=False, max_num_batched_tokens=12)
    request = make_request("a", 13, n=2)
    engine.add(request)
    engine.run()
    assert [new.block_ids for plan in engine.plans for new in plan.new_rows] == [
        ((),),
        ((1, 2, 3),),
    ]
    engine.check_output(request, 1)


def test_choices_with_prompt_logprobs_share_the_prompt_too() -> None:
    for steps_ahead in (0, 1):
        engine = Engine(steps_ahead=steps_ahead)
        request = make_request("a", 14, 6, n=3, prompt_logprobs=0)
        engine.add(request)
        engine.run()
        assert engine.runner.num_computed_tokens == 14 + 5 + 2 * (2 + 5)
        for choice in range(3):
            engine.check_output(request, choice)


def test_every_choice_reports_what_the_leader_found_in_the_cache() -> None:
    engine = Engine()
    engine.add(make_request("warm", 8))
    engine.run()
    engine.add(make_request("a", 14, n=2))
    engine.run()
    assert [engine.deltas["a", choice][0].num_cached_tokens for choice in (0, 1)] == [8, 8]


def test_one_preempted_in_the_middle_of_its_prompt_starts_over() -> None:
    engine = Engine(num_blocks=13, max_num_batched_tokens=5, enable_prefix_caching=False)
    growing = [make_request(name, (index,) * 4, 30) for index, name in enumerate("abc")]
    long = make_request("long", 20, 2, prompt_logprobs=0)
    engine.add(*growing, long)
    engine.run()
    for request in (*growing, long):
        engine.check_output(request)
    rows = [row for plan in engine.plans for row in plan.rows if row.seq_id == 3]
    starts = [i for i, row in enumerate(rows) if row.num_computed_tokens == 0]
    assert starts[0] == 0
    assert starts[1] > 1
    assert not any(row.samples for row in rows[: starts[1]]), "preempted before its prompt was done"
    first, *_ = rows[starts[1] :]
    assert not first.wants_prompt_logprobs, "these positions have been scored before"


def test_nobody_is_admitted_while_one_of_higher_standing_lacks_blocks() -> None:
    engine = Engine(num_blocks=13, max_num_batched_tokens=9, policy="priority")
    small = make_request("small", (8,), 2, priority=2)
    decoding = make_request("decoding", (9,) * 4, 20, priority=1)
    urgent = make_request("urgent", 40, 2, priority=0)
    engine.add(decoding)
    engine.step()
    engine.add(urgent, small)
    engine.run()
    for request in (small, decoding, urgent):
        engine.check_output(request)
    sitting_out = engine.plans[5:13]
    assert all([row.seq_id for row in plan.rows] == [0] for plan in sitting_out)
    assert [row.seq_id for row in engine.plans[13].rows] == [1], "it took the other's blocks"


def test_one_noted_for_a_chunk_may_be_preempted_before_its_turn() -> None:
    engine = Engine(num_blocks=4, max_num_batched_tokens=10)
    leader = make_request("a", 8, 4, n=2, prompt_logprobs=0)
    other = make_request("b", (9,) * 4, 2)
    engine.add(leader, other)
    first, second = engine.step(), engine.step()
    assert first is not None
    assert second is not None
    assert [row.num_tokens for row in first.rows] == [8, 2]
    assert [row.seq_id for row in second.rows] == [0]
    engine.run()
    engine.check_output(leader, 0)
    engine.check_output(leader, 1)
    engine.check_output(other)


def test_a_preempted_one_waits_for_the_token_of_its_last_step() -> None:
    engine = Engine(num_blocks=9, steps_ahead=2)
    a, b = make_request("a", 12, 20), make_request("b", (5,) * 12, 20)
    engine.add(a, b)
    while engine.scheduler.stats(None).num_preemptions == 0:
        engine.step()
    engine.add(Abort(request_id="a"))  # so that there is room at once
    assert engine.scheduler.schedule() is None
    engine.run()
    engine.check_output(b)

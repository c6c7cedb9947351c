"""Layers that see a window only: what is given back when, and what a prefix must still have."""

import pytest

from jaxserve.errors import ConfigError, RequestError
from jaxserve.kv_group import first_block, most_blocks
from tests.scheduler.fake_runner import Engine, make_request

MIX = (None, 6)


def test_blocks_that_the_window_has_passed_are_given_back() -> None:
    engine = Engine(windows=MIX)
    engine.add(make_request("a", 16, 12))
    engine.step()
    # Token 16 sees tokens 11 ... 16: of the prompt's four blocks the last two.
    assert engine.scheduler.num_held_blocks == (4, 2)
    for _ in range(11):
        engine.step()
    assert engine.scheduler.num_held_blocks == (0, 0)
    held = {len(engine.runner.rows[0][1].table[group]) for group in (0, 1)}
    assert held == {7}, "a row's table names every page, also those that are gone"


def test_a_step_may_write_the_block_that_its_other_row_has_just_passed() -> None:
    engine = Engine(
        windows=MIX, num_blocks=(65, 6), max_num_batched_tokens=8, enable_prefix_caching=False
    )
    requests = make_request("a", 16, 20), make_request("b", (9,) * 8, 20)
    engine.add(*requests)
    engine.run()
    for request in requests:
        engine.check_output(request)
    # Five blocks are enough for two rows of up to three, as they do not begin one together.
    assert engine.scheduler.stats(None).num_preemptions == 0
    assert any(len(plan.rows) == 2 for plan in engine.plans)


def test_a_prefix_is_found_without_what_the_window_has_passed() -> None:
    engine = Engine(windows=MIX)
    engine.add(make_request("a", 16, 1))
    engine.run()
    window_pool = engine.scheduler._blocks.pools[1]
    window_pool.take(window_pool.num_free - 3)  # of the prompt, the first block among them
    engine.add(make_request("b", (*range(16), 5), 1))
    plan = engine.scheduler.schedule()
    assert plan is not None
    assert plan.num_tokens == 1
    full, window = plan.new_rows[0].block_ids
    assert full == (1, 2, 3, 4)
    assert window[:2] == (0, 0)
    assert 0 not in window[2:]


def test_the_longest_prefix_counts_that_every_group_has() -> None:
    engine = Engine(windows=MIX)
    engine.add(make_request("a", 24, 1))
    engine.run()
    pool = engine.scheduler._blocks.pools[1]
    # Forget block 4, which holds tokens 16 ... 19: what follows it by less than a window is lost.
    digests = {block: digest for digest, block in pool._by_digest.items()}
    forgotten = list(digests)[4]
    del pool._by_digest[digests[forgotten]]
    engine.add(make_request("b", (*range(24), 5), 1))
    plan = engine.scheduler.schedule()
    assert plan is not None
    assert plan.num_tokens == 25 - 16


@pytest.mark.parametrize("num_prompt", [15, 16, 17])
def test_choices_share_the_prompts_end_though_the_leader_goes_on(num_prompt: int) -> None:
    for steps_ahead in (0, 1):
        engine = Engine(windows=MIX, enable_prefix_caching=False, steps_ahead=steps_ahead)
        request = make_request("a", num_prompt, 3, n=3)
        engine.add(request)
        engine.run()
        num_own = num_prompt - (num_prompt - 1) // 4 * 4
        assert engine.runner.num_computed_tokens == num_prompt + 2 * num_own + 3 * 2
        for choice in range(3):
            engine.check_output(request, choice)


def test_what_is_kept_for_choices_goes_before_anyone_is_preempted() -> None:
    engine = Engine(
        windows=MIX,
        num_blocks=(65, 6),
        max_num_seqs=1,
        max_num_batched_tokens=8,
        enable_prefix_caching=False,
    )
    request = make_request("a", 16, 14, n=2)
    engine.add(request)
    engine.run()
    engine.check_output(request, 0)
    engine.check_output(request, 1)
    assert engine.scheduler.stats(None).num_preemptions == 0


def test_a_long_request_needs_few_blocks_of_a_window() -> None:
    engine = Engine(windows=MIX, num_blocks=(17, 4), max_num_batched_tokens=8, max_num_seqs=1)
    with pytest.raises(
        RequestError, match=r"needs 4 KV blocks of 4 .*of layers with a window of 6 has 3"
    ):
        engine.scheduler.check(make_request("a", 50, 14))
    engine = Engine(windows=MIX, num_blocks=(17, 5), max_num_batched_tokens=8, max_num_seqs=1)
    request = make_request("a", 50, 14)
    engine.add(request)
    engine.run()
    engine.check_output(request)


def test_usage_is_that_of_the_group_which_is_fullest() -> None:
    engine = Engine(windows=MIX, num_blocks=(101, 7))
    engine.add(make_request("a", 16, 4))
    stats = engine.scheduler.stats(engine.step())
    assert (stats.num_used_blocks, stats.num_free_blocks) == (2, 4)
    assert stats.num_allocated_slots == stats.num_written_slots == (4 + 2) * 4


def test_a_window_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="window=0 is too small"):
        Engine(windows=(0,))


@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("step_tokens", [1, 3, 4, 9])
def test_the_most_blocks_are_those_of_the_worst_place_in_a_block(
    window: int, step_tokens: int
) -> None:
    held = [-(-(start + step_tokens) // 4) - first_block(window, start, 4) for start in range(100)]
    assert most_blocks(window, num_tokens=200, step_tokens=step_tokens, block_size=4) == max(held)

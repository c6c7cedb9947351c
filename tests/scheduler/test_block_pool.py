"""Blocks are counted right, and freed ones are reused in the right order."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduler.block_pool import BlockPool


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert pool.num_free == 4
    assert sorted(pool.take(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0


def test_blocks_are_reused_least_recently_freed_first() -> None:
    pool = BlockPool(3)
    a, b = pool.take(2)
    pool.give_back([b, a])
    assert pool.take(2) == (b, a)


def test_evictable_blocks_are_reused_least_recently_freed_first_too() -> None:
    pool = BlockPool(3)
    a, b = pool.take(2)
    pool.remember(a, b"a")
    pool.remember(b, b"b")
    pool.give_back([b, a])
    assert pool.take() == (b,)
    assert pool.find(b"b") is None
    assert pool.find(b"a") == a


def test_blocks_that_hold_nothing_of_use_go_first() -> None:
    pool = BlockPool(3)
    a, b = pool.take(2)
    pool.remember(a, b"a")
    pool.give_back([a])
    pool.give_back([b])
    assert pool.take() == (b,)


def test_a_shared_block_is_free_when_the_last_holder_gives_it_back() -> None:
    pool = BlockPool(2)
    (a,) = pool.take()
    pool.share([a])
    pool.give_back([a])
    assert (pool.num_free, pool.ref_count(a)) == (0, 1)
    pool.give_back([a])
    assert (pool.num_free, pool.ref_count(a)) == (1, 0)


def test_a_hit_on_an_evictable_block_takes_it_out_of_the_free_list() -> None:
    pool = BlockPool(3)
    a, b = pool.take(2)
    pool.remember(a, b"a")
    pool.give_back([a, b])
    pool.share([a])
    assert (pool.num_free, pool.num_held) == (1, 1)
    assert pool.take() == (b,)
    assert pool.find(b"a") == a


def test_the_first_block_with_some_content_keeps_its_name() -> None:
    pool = BlockPool(3)
    a, b = pool.take(2)
    pool.remember(a, b"same")
    pool.remember(b, b"same")
    assert pool.find(b"same") == a
    pool.give_back([b, a])
    assert pool.take() == (b,)
    assert pool.find(b"same") == a


def test_giving_back_twice_is_noticed() -> None:
    pool = BlockPool(2)
    (a,) = pool.take()
    pool.give_back([a])
    with pytest.raises(RuntimeError, match="block 1 was given back twice"):
        pool.give_back([a])


def test_after_forgetting_nothing_is_found_and_nothing_is_lost() -> None:
    pool = BlockPool(3)
    a, b = pool.take(2)
    pool.remember(a, b"a")
    pool.give_back([a, b])
    pool.forget_all()
    assert pool.find(b"a") is None
    assert sorted(pool.take(2)) == [a, b]


@given(st.integers(2, 8), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99)), max_size=80))
def test_no_block_is_lost_or_used_twice(num_blocks: int, actions: list[tuple[int, int]]) -> None:
    pool = BlockPool(num_blocks)
    held: list[int] = []  # once for each reference
    for action, number in actions:
        if action == 0 and pool.num_free:
            (block_id,) = pool.take()
            assert block_id not in held
            held.append(block_id)
        elif action == 1 and held:
            pool.give_back([held.pop(number % len(held))])
        elif action == 2 and held:
            block_id = held[number % len(held)]
            pool.share([block_id])
            held.append(block_id)
        elif action == 3 and held:
            block_id = held[number % len(held)]
            if pool._digests[block_id] is None:
                pool.remember(block_id, b"%d" % number)
        elif action == 4 and (hit := pool.find(b"%d" % number)) is not None:
            pool.share([hit])
            held.append(hit)
        assert Counter(held) == {b: n for b, n in enumerate(pool._ref_counts) if n}
        assert pool.num_held == len(set(held))
        assert pool.num_free == num_blocks - 1 - len(set(held))
    pool.give_back(held)
    assert sorted(pool.take(num_blocks - 1)) == list(range(1, num_blocks))

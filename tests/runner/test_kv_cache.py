"""Pages are shared out between KV groups: no group gets more than it can use, and all fits."""

from dataclasses import replace
from random import Random

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.kv_group import KVGroup
from jaxserve.runner import kv_cache
from jaxserve.runner.device import DeviceInfo, detect
from jaxserve.runner.kv_cache import GroupPages, fitting_override, kv_bytes, size_groups
from tests.scheduler.fake_runner import EOS, Engine, make_request

MIB = 1 << 20
PAGE_BYTES = 16 * 1024  # a layer's page


@pytest.fixture(scope="module")
def device() -> DeviceInfo:
    return detect()


def group(window: int | None, num_layers: int = 1, **sizes: int) -> GroupPages:
    sizes = {
        "page_size": 16,
        "max_model_len": 8192,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        **sizes,
    }
    return GroupPages.of(window, bytes_a_page=num_layers * PAGE_BYTES, **sizes)


def counts(device: DeviceInfo, groups: tuple[GroupPages, ...], **config: int) -> list[int]:
    sizes = size_groups(
        EngineConfig(model="m", **config),  # type: ignore[arg-type]
        device,
        groups,
        max_model_len=8192,
        weight_bytes=0,
        step_bytes=0,
    )
    assert [size.window for size in sizes] == [each.window for each in groups]
    return [size.num_blocks for size in sizes]


def test_what_has_no_window_can_fill_all_rows() -> None:
    only = group(None)
    assert (only.least, only.most) == (8192 // 16 + 1, 8 * 8192 // 16 + 1)


def test_a_window_needs_few_pages_however_long_the_sequences() -> None:
    short, long = group(512), group(512, max_model_len=1 << 20)
    # 511 tokens before and 512 computed; whatever the offset, that is at most 65 pages.
    assert short.least == long.least == 65 + 1
    # 32 pages of the window and two begun for each of 8 rows, 32 for the step: and 1% headroom.
    assert short.most == long.most == 308 + 1


def test_a_window_never_needs_more_than_full_attention() -> None:
    assert group(8000, max_num_seqs=256).most <= group(None, max_num_seqs=256).most
    assert group(100_000).least == group(None).least


def test_the_budget_goes_to_full_attention_once_windows_have_enough(device: DeviceInfo) -> None:
    groups = (group(512, 5), group(None, 1))
    for budget in (14 * MIB, 30 * MIB, 60 * MIB):
        found = counts(device, groups, kv_cache_memory_bytes=budget)
        used = sum(n * each.bytes_a_page for n, each in zip(found, groups, strict=True))
        assert budget - sum(each.bytes_a_page for each in groups) < used <= budget
    assert counts(device, groups, kv_cache_memory_bytes=30 * MIB)[0] == 281
    assert counts(device, groups, kv_cache_memory_bytes=60 * MIB) == [309, 2295]
    assert counts(device, groups, kv_cache_memory_bytes=600 * MIB) == [309, 4097]


def test_both_grow_alike_before_that(device: DeviceInfo) -> None:
    groups = (group(2048, max_num_seqs=64), group(None, max_num_seqs=64))
    first, second = counts(device, groups, kv_cache_memory_bytes=64 * MIB)
    assert first == second == 64 * MIB // (2 * PAGE_BYTES)


def test_one_full_sequence_fits_before_windows_get_more_than_they_must(device: DeviceInfo) -> None:
    groups = (group(512, 50), group(None, 1))
    needed = sum(each.least * each.bytes_a_page for each in groups)
    assert counts(device, groups, kv_cache_memory_bytes=needed) == [66, 513]
    with pytest.raises(ConfigError, match="one sequence of max_model_len=8192 tokens needs"):
        counts(device, groups, kv_cache_memory_bytes=needed - 1)


def test_a_model_of_windows_alone_takes_no_more_than_it_can_use(device: DeviceInfo) -> None:
    groups = (group(512, 3), group(64, 2))
    found = counts(device, groups, kv_cache_memory_bytes=1 << 30)
    assert found == [each.most for each in groups]


def test_the_override_counts_the_pages_of_full_attention(device: DeviceInfo) -> None:
    groups = (group(512, 5), group(None, 1))
    assert counts(device, groups, num_gpu_blocks_override=10_000) == [309, 10_000]
    assert counts(device, groups, num_gpu_blocks_override=50) == [50, 50]
    with pytest.raises(ConfigError, match="num_gpu_blocks_override=1 leaves no page"):
        counts(device, groups, num_gpu_blocks_override=1)


@pytest.mark.parametrize("budget", [0, PAGE_BYTES, 7 * MIB, 30 * MIB, 64 * MIB + 5])
def test_the_override_to_try_is_the_largest_that_fits(device: DeviceInfo, budget: int) -> None:
    groups = (group(512, 5), group(None, 1))

    def cost(override: int) -> int:
        found = size_groups(
            EngineConfig(model="m", num_gpu_blocks_override=override),
            device,
            groups,
            max_model_len=8192,
            weight_bytes=0,
            step_bytes=0,
        )
        return kv_bytes(groups, found)

    fitting = fitting_override(groups, budget)
    assert fitting < 2 or cost(fitting) <= budget
    assert cost(max(2, fitting + 1)) > budget


@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("max_num_batched_tokens", [6, 40])
def test_with_all_the_pages_it_can_use_a_window_never_stops_a_row(
    window: int, max_num_batched_tokens: int
) -> None:
    """It takes as many steps as with pages without end, and nobody is preempted for them."""
    sizes = {
        "max_model_len": 120,
        "max_num_seqs": 6,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    most = GroupPages.of(window, bytes_a_page=1, page_size=4, **sizes).most
    num_steps = []
    for num_blocks in (most, 1000):
        random = Random(window)
        engine = Engine(
            windows=(None, window),
            num_blocks=(1000, num_blocks),
            block_size=4,
            steps_ahead=1,
            **sizes,
        )
        for index in range(40):
            prompt = tuple(random.randrange(9) for _ in range(random.randrange(1, 90)))
            engine.add(make_request(str(index), prompt, random.randrange(1, 30), eos_token_id=EOS))
        engine.run()
        assert engine.scheduler.stats(None).num_preemptions == 0
        num_steps.append(len(engine.plans))
    assert num_steps[0] <= 1.02 * num_steps[1]


def test_a_page_costs_what_its_layers_store() -> None:
    assert kv_bytes((group(None, 3), group(8, 2)), (KVGroup(num_blocks=5), KVGroup(num_blocks=7)))
    one, two = replace(group(None), bytes_a_page=10), replace(group(8), bytes_a_page=3)
    sizes = (KVGroup(num_blocks=5), KVGroup(num_blocks=7, window=8))
    assert kv_cache.kv_bytes((one, two), sizes) == 71

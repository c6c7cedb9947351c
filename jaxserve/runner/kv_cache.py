"""How many pages each KV group gets, and where their memory comes from."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.kv_group import HEADROOM, KVGroup, most_blocks
from jaxserve.layers.kernels import Backend, KVSpec, kv_pages_shape
from jaxserve.runner.device import GIB, DeviceInfo, cpu_kv_bytes


def page_bytes(spec: KVSpec, num_layers: int, *, backend: Backend) -> int:
    """Bytes of one page in all layers of a group."""
    shape = kv_pages_shape(spec, num_layers, 1, backend=backend)
    return shape.size * shape.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPages:
    """What a page of a KV group costs, and how many are of use; the null page counts."""

    window: int | None
    bytes_a_page: int  # in all layers of the group
    least: int  # with fewer a sequence of max_model_len tokens could not run alone
    most: int  # more could never be filled

    @classmethod
    def of(
        cls,
        window: int | None,
        *,
        bytes_a_page: int,
        page_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> "GroupPages":
        """The pages of a group whose layers see `window` tokens; None: all.

        A row of a window group holds the pages of its window, and one more that is begun. The
        tokens that a step computes are added once, however many rows share them, but each row may
        begin one more page with them.
        """
        longest = -(-max_model_len // page_size)
        least = most_blocks(
            window,
            num_tokens=max_model_len,
            step_tokens=max_num_batched_tokens,
            block_size=page_size,
        )
        most = max_num_seqs * longest
        if window is not None:
            seen = -(-(window - 1) // page_size)
            held = max_num_seqs * (seen + 2) + max_num_batched_tokens // page_size
            # What the scheduler leaves free when it admits a sequence must not cost the last row.
            most = min(most, math.ceil(held / (1 - HEADROOM)))
        return cls(window=window, bytes_a_page=bytes_a_page, least=least + 1, most=most + 1)


def size_groups(
    config: EngineConfig,
    device: DeviceInfo,
    groups: tuple[GroupPages, ...],
    *,
    max_model_len: int,
    weight_bytes: int,
    step_bytes: int,
) -> tuple[KVGroup, ...]:
    """Pages to allocate for each group.

    In this order: `num_gpu_blocks_override`, `kv_cache_memory_bytes`, what a device has left of
    its share after weights and a step's temporaries; on the CPU a share of the free memory. All
    groups grow alike until those with a window have all that they can use; the others get the
    rest, up to what all rows can fill at full length. The override is the pages of a group that
    sees all; those with a window get as many, or all that they can use.

    Raises:
        ConfigError: Not even one sequence of `max_model_len` tokens fits.
    """
    override = config.num_gpu_blocks_override
    if override is not None:
        if override < 2:
            raise ConfigError(
                f"num_gpu_blocks_override={override} leaves no page to use beside the null page; "
                "use at least 2"
            )
        return tuple(
            KVGroup(num_blocks=count, window=group.window)
            for group, count in zip(groups, _overridden(groups, override), strict=True)
        )
    budget = config.kv_cache_memory_bytes
    if budget is None:
        limit = device.memory_limit_bytes(config.gpu_memory_utilization)
        budget = cpu_kv_bytes() if limit is None else limit - weight_bytes - step_bytes

    def sizes(level: int) -> list[int]:
        return [max(group.least, min(group.most, level)) for group in groups]

    needed = _bytes(groups, sizes(0))
    if budget < needed:
        raise ConfigError(
            f"the KV cache gets {max(budget, 0) / GIB:.2f} GiB, but one sequence of "
            f"max_model_len={max_model_len} tokens needs {needed / GIB:.2f} GiB. "
            "Lower max_model_len, or raise gpu_memory_utilization or kv_cache_memory_bytes"
        )
    levels = range(max(group.most for group in groups) + 1)
    level = bisect_right(levels, budget, key=lambda each: _bytes(groups, sizes(each))) - 1
    return tuple(
        KVGroup(num_blocks=count, window=group.window)
        for group, count in zip(groups, sizes(level), strict=True)
    )


def kv_bytes(groups: tuple[GroupPages, ...], sizes: tuple[KVGroup, ...]) -> int:
    """Bytes of the caches of all groups."""
    return _bytes(groups, [size.num_blocks for size in sizes])


def fitting_override(groups: tuple[GroupPages, ...], budget: int) -> int:
    """The largest `num_gpu_blocks_override` whose pages take at most `budget` bytes; 0: none."""
    levels = range(budget // min(group.bytes_a_page for group in groups) + 2)
    costs = bisect_right(levels, budget, key=lambda each: _bytes(groups, _overridden(groups, each)))
    return max(0, costs - 1)


def _overridden(groups: tuple[GroupPages, ...], override: int) -> list[int]:
    return [override if group.window is None else min(group.most, override) for group in groups]


def _bytes(groups: tuple[GroupPages, ...], counts: list[int]) -> int:
    return sum(group.bytes_a_page * count for group, count in zip(groups, counts, strict=True))

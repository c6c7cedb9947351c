"""A model some of whose layers see only a window, and whose pages are few."""

import json
from pathlib import Path

import pytest

from jaxserve.step import StepStats
from tests.engine.harness import TINY_CONFIG, Answers, answer, request, running, write_tiny_llama


@pytest.mark.slow
def test_rows_that_pass_pages_on_to_each_other_get_the_tokens_they_get_alone(
    tmp_path: Path,
) -> None:
    folder = write_tiny_llama(tmp_path / "m")
    config = {
        **TINY_CONFIG,
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    trunk = tuple(range(7, 50))
    requests = [
        request(str(i), (*trunk[: 6 * i], *range(100 + i, 104 + 2 * i)), max_tokens=8 + 5 * i)
        for i in range(8)
    ]
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 4, "warm_up": False}
    with running(folder, num_gpu_blocks_override=15, **small) as engine:
        assert [group.window for group in engine.runner.kv_groups] == [20, None]
        alone: Answers = {}
        stats: list[StepStats] = []
        for one in requests:
            assert engine.reset_prefix_cache()
            alone |= answer(engine, [one])[0]
        for _ in range(2):  # the second time with what the first left in the prefix cache
            together, stats = answer(engine, requests)
            for key, expected in alone.items():
                assert together[key].token_ids == expected.token_ids
        assert stats[-1].num_preemptions > 0
        assert stats[-1].num_prefix_hits > 0
        assert engine.scheduler.num_held_blocks == (0, 0)

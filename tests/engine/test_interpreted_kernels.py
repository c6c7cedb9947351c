"""The engine with Pallas' kernels inside, interpreted on the CPU: the tokens of the XLA path."""

import dataclasses
from pathlib import Path

import pytest

from tests.engine.harness import answer, request, running, write_tiny_llama


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("backend", ["tpu-interpret"])
def test_greedy_tokens_are_those_of_xla(tmp_path: Path, backend: str) -> None:
    model = write_tiny_llama(tmp_path / "model")
    prompts = [
        dataclasses.replace(request("a", range(5, 14)), max_tokens=3),
        dataclasses.replace(request("b", range(40, 43)), max_tokens=3),
    ]
    small = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "num_gpu_blocks_override": 16}
    found = {}
    for name in ("xla", backend):
        with running(model, attention_backend=name, layer_loop="scan", **small) as engine:
            answers, _ = answer(engine, prompts)
            found[name] = [answers[one.request_id, 0].token_ids for one in prompts]
    assert all(len(ids) == 3 for ids in found["xla"])
    assert found[backend] == found["xla"]

"""Models of very different kinds, served by an engine, give the tokens that transformers does."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxserve.request import Request
from tests.engine.harness import answer, request, running
from tests.golden.models.weights import write_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden" / "models"


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",  # learned positions
        pytest.param("mixtral", marks=pytest.mark.slow),  # experts
        pytest.param("gemma3", marks=pytest.mark.slow),  # windows beside full attention
        # latent attention, shared experts, dense layers first
        pytest.param("deepseek_v3", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_the_same_alone_batched_and_preempted(name: str, tmp_path: Path) -> None:
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    write_checkpoint(case, tmp_path)
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        prompt, others = arrays["tokens_1"].tolist(), arrays["tokens_2"].tolist()
        want = arrays["greedy"].tolist()

    def same(i: int) -> Request:
        return request(f"same {i}", prompt, max_tokens=len(want), cache_salt=f"{i}")

    # Three rows that grow to 6 blocks of 8 tokens, and one of 11, share 21 blocks.
    with running(
        tmp_path, num_gpu_blocks_override=22, max_num_batched_tokens=8, max_num_seqs=4
    ) as engine:
        alone, _ = answer(engine, [same(0)])
        long = request("long", others, max_tokens=24)
        together, stats = answer(engine, [long, *(same(i) for i in range(1, 7))])
    assert alone["same 0", 0].token_ids == want
    assert [together[f"same {i}", 0].token_ids for i in range(1, 4)] == [want] * 3
    assert stats[-1].num_preemptions > 0

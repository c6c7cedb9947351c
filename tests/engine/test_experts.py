"""Experts, latent caches and attention within chunks, served by an engine: transformers' tokens."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.engine.harness import answer, request, running
from tests.golden.models.weights import write_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden" / "models"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "llama4", "gpt_oss_mxfp4"])
def test_a_prompt_beside_others_is_continued_as_by_transformers(name: str, tmp_path: Path) -> None:
    write_checkpoint(json.loads((GOLDEN / f"{name}.json").read_text()), tmp_path)
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        prompts = [arrays[f"tokens_{i}"].tolist() for i in range(3)]
        greedy = arrays["greedy"].tolist()
    asked = [
        request(str(i), prompt, max_tokens=len(greedy), ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]
    with running(tmp_path, max_num_seqs=4, max_num_batched_tokens=16, dtype="float32") as engine:
        together, _ = answer(engine, asked)
        again, _ = answer(engine, asked[1:2])  # whose prompt's blocks are cached now
    assert together["1", 0].token_ids == greedy
    assert again["1", 0].token_ids == greedy
    assert again["1", 0].num_cached_tokens > 0

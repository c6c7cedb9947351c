"""What a model makes of one text, against transformers (golden/make_real.py)."""

import json
import math
from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams

GOLDEN = json.loads((Path(__file__).parent / "golden" / "perplexity.json").read_text())


def check_perplexity(llm: LLM, name: str) -> None:
    """The perplexity by the API's scores of the prompt is that of transformers."""
    want = GOLDEN["models"][name]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([GOLDEN["text"]], params, use_tqdm=False)
    ids, scores = output.prompt_token_ids, output.prompt_logprobs
    assert ids is not None
    assert scores is not None
    assert (ids[:4], len(ids)) == (want["first_token_ids"], want["num_tokens"])
    assert scores[0] is None
    own = [at[token].logprob for token, at in zip(ids[1:], scores[1:], strict=True) if at]
    assert len(own) == len(ids) - 1
    perplexity = math.exp(-math.fsum(own) / len(own))
    assert perplexity == pytest.approx(math.exp(want["mean_nll"]), rel=1e-3)

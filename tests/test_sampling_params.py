"""What `SamplingParams` refuses, and how it says so."""

from typing import Any

import pytest

from jaxserve import SamplingParams
from jaxserve.errors import RequestError


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": True}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"], "detokenize": False}, "stop"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
        ({"extra_args": {"x": 1}}, "extra_args"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(given: dict[str, Any], names: str) -> None:
    with pytest.raises(RequestError, match=names) as caught:
        SamplingParams(**given)
    assert caught.value.param == names


def test_http_style_values_are_normalised() -> None:
    params = SamplingParams.from_optional(logit_bias={"5": 300}, top_p=None, seed=-1)
    assert params.logit_bias == {5: 100.0}
    assert params.top_p == 1.0
    assert params.seed is None
    with pytest.raises(RequestError, match="abc"):
        SamplingParams.from_optional(logit_bias={"abc": 1})

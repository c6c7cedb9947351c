"""However a request is served, its tokens are the same."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.request import Request
from tests.engine.harness import Answers, answer, request, running, write_tiny_llama

RNG = np.random.default_rng(7)
SHARED = RNG.integers(0, 300, 40).tolist()
PROMPTS = [RNG.integers(0, 300, n).tolist() for n in (1, 2, 7, 8, 9, 31, 33, 64, 90)]
PROMPTS += [SHARED + tail for tail in ([1], [2, 3], [4] * 9)]


def requests() -> list[Request]:
    """Greedy and drawn requests, with penalties and the rest, of many lengths."""
    variants: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "top_k": 20, "seed": 5},
        {"temperature": 1.2, "top_p": 0.9, "seed": 2**40 + 1, "frequency_penalty": 0.7},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {17: 2.0}},
        {"bad_words_token_ids": ((3,), (5, 6)), "min_tokens": 3, "stop_token_ids": [9]},
        {"temperature": 1.0, "min_p": 0.05, "seed": -3, "allowed_token_ids": list(range(200))},
    ]
    return [
        request(f"{i}", prompt, logprobs=2, max_tokens=6 + i, **variants[i % len(variants)])
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(model: Path) -> Answers:
    """Each request by itself: synchronous, whole prompt, nothing cached."""
    answers: Answers = {}
    with running(
        model, enable_prefix_caching=False, async_scheduling=False, max_num_batched_tokens=128
    ) as engine:
        for one in requests():
            answers |= answer(engine, [one])[0]
    return answers


def check_same(got: Answers, want: Answers) -> None:
    assert got.keys() == want.keys()
    for key, answer_ in want.items():
        assert got[key].token_ids == answer_.token_ids, key
        assert got[key].finish_reason == answer_.finish_reason
        for a, b in zip(got[key].logprobs, answer_.logprobs, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-4)


def test_the_requests_tell_mistakes_apart(alone: Answers) -> None:
    outputs = [tuple(a.token_ids) for a in alone.values()]
    assert len(set(outputs)) == len(outputs)
    assert sum(len(set(o)) for o in outputs) > 60  # not one token over and over


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="full batch, chunked, one step ahead"),
        pytest.param({"cudagraph_capture_sizes": None}, id="every bucket"),
        pytest.param({"async_scheduling": False}, id="synchronous"),
        pytest.param({"max_num_batched_tokens": 128}, id="whole prompts"),
        pytest.param({"max_num_batched_tokens": 11}, id="a budget that is no power of two"),
        pytest.param({"enable_prefix_caching": False}, id="nothing cached"),
        pytest.param({"layer_loop": "scan"}, id="scanned layers"),
        pytest.param({"block_size": 16}, id="larger pages"),
        pytest.param({"attention_backend": "reference"}, id="reference attention"),
        pytest.param({"max_num_seqs": 2}, id="few rows"),
        pytest.param({"scheduling_policy": "priority"}, id="priority policy"),
    ],
)
def test_tokens_are_those_of_the_request_alone(
    model: Path, alone: Answers, config: dict[str, Any]
) -> None:
    with running(model, **{"max_num_batched_tokens": 32, **config}) as engine:
        got, _ = answer(engine, requests())
        check_same(got, alone)
        again, _ = answer(engine, requests())  # and now with whatever the cache holds
        check_same(again, alone)
        if config.get("enable_prefix_caching", True):
            assert again["8", 0].num_cached_tokens >= 80


@pytest.mark.parametrize("ahead", [True, False])
def test_tokens_survive_preemption(model: Path, ahead: bool) -> None:
    # Each grows to 8 pages of 8 tokens, and 8 of them share 17 pages.
    growing = [
        dataclasses.replace(one, max_tokens=50, prompt_token_ids=one.prompt_token_ids[:9])
        for one in requests()[:8]
    ]
    with running(model, async_scheduling=ahead) as engine:
        want, plenty = answer(engine, growing)
    with running(model, num_gpu_blocks_override=18, async_scheduling=ahead) as engine:
        got, stats = answer(engine, growing)
    check_same(got, want)
    assert plenty[-1].num_preemptions == 0
    assert stats[-1].num_preemptions > 0
    assert stats[-1].num_used_blocks == 0


def test_choices_share_the_prompt_and_draw_apart(model: Path) -> None:
    drawn = request("n", SHARED, temperature=1.0, n=4, seed=11, max_tokens=10)
    with running(model, enable_prefix_caching=False) as engine:
        together, stats = answer(engine, [drawn])
        for i in range(4):
            params = dataclasses.replace(drawn.sampling, n=1)
            one = dataclasses.replace(drawn, request_id=f"{i}", sampling=params, seed=11 + i)
            single, _ = answer(engine, [one])
            assert together["n", i].token_ids == single[f"{i}", 0].token_ids
    assert len({tuple(a.token_ids) for a in together.values()}) == 4
    apart = 4 * -(-(len(SHARED) + 10) // 8)
    assert max(s.num_used_blocks for s in stats) < apart - 3 * 4  # 4 full prompt blocks, shared


def test_salts_keep_prefixes_apart(model: Path) -> None:
    with running(model) as engine:
        cached = []
        for name, salt in (("a", None), ("b", "x"), ("c", "x"), ("d", "y"), ("e", None)):
            got, _ = answer(engine, [request(name, SHARED, cache_salt=salt)])
            cached.append(got[name, 0].num_cached_tokens)
    assert cached == [0, 0, 32, 0, 32]


def test_prompt_logprobs_are_the_same_chunked_and_cached(model: Path) -> None:
    prompt = PROMPTS[8]
    with running(model, max_num_batched_tokens=128) as engine:
        whole, _ = answer(engine, [request("w", prompt, prompt_logprobs=3)])
    with running(model) as engine:
        answer(engine, [request("warm", prompt)])
        others = [request(f"o{i}", p) for i, p in enumerate(PROMPTS[:5])]
        chunked, _ = answer(engine, [*others, request("w", prompt, prompt_logprobs=3)])
    a, b = whole["w", 0].prompt_logprobs, chunked["w", 0].prompt_logprobs
    assert a is not None
    assert b is not None
    assert len(a) == len(b) == len(prompt)
    assert a[0] is None
    assert b[0] is None
    for token, x, y in zip(prompt[1:], a[1:], b[1:], strict=True):
        assert x is not None
        assert y is not None
        assert x.token_ids[0] == y.token_ids[0] == token
        assert len(x.token_ids) == 4
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=2e-4)
        assert x.rank == y.rank

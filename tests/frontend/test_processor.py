"""Prompts and sampling parameters become requests, or errors that name the mistake."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.checkpoint import Checkpoint
from jaxserve.config import EngineConfig
from jaxserve.errors import CheckpointError, ConfigError, RequestError, UnsupportedError
from jaxserve.frontend.processor import Processor
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.sampling_params import SamplingParams

LIMIT = 64  # max_model_len
VOCAB = 49_152


def make(checkpoint: Checkpoint, tokenizer: Tokenizer | None, **config: Any) -> Processor:
    return Processor(EngineConfig(**config), checkpoint, tokenizer, VOCAB, LIMIT)


@pytest.fixture
def processor(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Processor:
    return make(checkpoint, tokenizer)


@pytest.mark.parametrize(
    "prompt",
    [
        "Hello world",
        [19556, 905],
        (19556, 905),
        range(19556, 19558),
        np.array([19556, 905], np.int32),
        [np.int64(19556), np.uint16(905)],
        {"prompt": "Hello world"},
        {"prompt_token_ids": [19556, 905]},
        {"prompt_token_ids": np.array([19556, 905]), "prompt": None, "multi_modal_data": None},
        {"prompt": "as shown", "prompt_token_ids": [19556, 905], "cache_salt": "a"},
    ],
)
def test_every_form_of_prompt_is_taken(processor: Processor, prompt: Any) -> None:
    request = processor.process("r", prompt, SamplingParams())
    ids = request.prompt_token_ids
    assert ids[0] == 19556
    assert all(type(i) is int for i in ids)
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([-1], "token id -1; use ids from 0 to 49151"),
        ([VOCAB], "token id 49152"),
        ([2**32 + 3], "token id 4294967299"),
        ([2**63], "token id"),
        ([1, True], "bool"),
        ([1, 1.0], "float"),
        ([1, "1"], "str"),
        ([1, None], "NoneType"),
        (np.array([1.5]), "float"),
        (np.ones((2, 2), int), "NoneType"),
        (b"x", "bytes"),
        (5, "int"),
        ({}, "nothing to continue"),
        ({"promt": "x"}, "promt"),
        ({"prompt": 5}, "use a string"),
        ({"prompt_token_ids": "abc"}, "list of ids"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "x", "cache_salt": "a/b"}, "cache_salt"),
        ({"prompt": "x", "cache_salt": "a" * 129}, "cache_salt"),
        ([1] * 65, "maximum context length is 64 tokens. However, your prompt contains 65"),
        ([1] * 64, "at least 1"),
        ("word " * 100, "maximum context length is 64 tokens"),
        ("x" * 10_000_000, "at least"),
    ],
)
def test_a_bad_prompt_is_refused(processor: Processor, prompt: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        processor.process("r", prompt, SamplingParams())


def test_prompts_of_other_media_are_unsupported(processor: Processor) -> None:
    with pytest.raises(UnsupportedError, match="multi_modal_data"):
        processor.parse({"prompt": "x", "multi_modal_data": {"image": 1}})


def test_truncation_keeps_the_end(processor: Processor) -> None:
    ids = list(range(100))
    assert processor.parse(ids, truncate_prompt_tokens=3).token_ids == (97, 98, 99)
    assert len(processor.parse(ids, truncate_prompt_tokens=-1).token_ids) == LIMIT - 1
    assert len(processor.parse("a b c d " * 99, truncate_prompt_tokens=5).token_ids) == 5
    for bad in (0, -2, LIMIT + 1, True):
        with pytest.raises(RequestError, match="truncate_prompt_tokens"):
            processor.parse(ids, truncate_prompt_tokens=bad)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"logprobs": 21}, "at most 20"),
        ({"logprobs": -1}, "at most 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"allowed_token_ids": [1, VOCAB]}, "allowed_token_ids"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"max_tokens": LIMIT + 1}, "max_tokens=65"),
        ({"max_tokens": None, "min_tokens": 63}, "min_tokens"),
        ({"bad_words": ["   "]}, "no token"),
        ({"bad_words": ["x" * 400]}, "at most 128"),
        ({"bad_words": [f"w{i}" for i in range(129)]}, "at most 128"),
    ],
)
def test_bad_parameters_are_refused(
    processor: Processor, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        processor.process("r", [1, 2], SamplingParams(**params))


def test_max_tokens_is_what_fits(processor: Processor) -> None:
    def resolved(max_tokens: int | None) -> int:
        return processor.process("r", [1] * 60, SamplingParams(max_tokens=max_tokens)).max_tokens

    assert [resolved(n) for n in (1, 4, 5, 64, None)] == [1, 4, 4, 4, 4]


def test_the_whole_vocabulary_of_logprobs_can_be_allowed(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    processor = make(checkpoint, tokenizer, max_logprobs=-1)
    processor.process("r", [1], SamplingParams(logprobs=-1))
    with pytest.raises(RequestError, match="at most 49152"):
        processor.process("r", [1], SamplingParams(logprobs=VOCAB + 1))


def test_end_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    checkpoint = replace(checkpoint, generation_config={"eos_token_id": [2, 0, 7, VOCAB]})
    processor = make(checkpoint, tokenizer)
    request = processor.process("r", [1], SamplingParams(stop_token_ids=[7, 9]))
    assert (request.eos_token_id, request.stop_token_ids) == (2, (7, 9, 0))
    ignoring = SamplingParams(stop_token_ids=[9], ignore_eos=True)
    request = processor.process("r", [1], ignoring)
    assert (request.eos_token_id, request.stop_token_ids) == (None, (9,))
    # Without a tokenizer the first of the generation config is EOS.
    assert make(checkpoint, None).process("r", [1], SamplingParams()).eos_token_id == 2


def test_bad_words_are_tokenized_at_the_start_and_after_a_space(
    processor: Processor, tokenizer: Tokenizer
) -> None:
    def banned(*words: str) -> list[str]:
        request = processor.process("r", [1], SamplingParams(bad_words=list(words)))
        return [tokenizer.decode(list(w)) for w in request.bad_words_token_ids]

    assert banned("Paris")[-1] == " Paris"
    assert banned(" the") == ["the", " the"]
    assert banned() == []
    assert banned("New York City")
    assert banned("the", "the") == ["the", " the"]


def test_unseeded_requests_repeat_with_the_engines_seed(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    def seeds(seed: int) -> list[int]:
        processor = make(checkpoint, tokenizer, seed=seed)
        return [processor.process("r", [1], SamplingParams()).seed for _ in range(4)]

    assert seeds(0) == seeds(0)
    assert seeds(0) != seeds(-1)
    assert len(set(seeds(0))) == 4
    processor = make(checkpoint, tokenizer)
    assert processor.process("r", [1], SamplingParams(seed=-(2**63))).seed == -(2**63)


def test_a_request_does_not_change_with_the_callers_parameters(processor: Processor) -> None:
    params = SamplingParams(logit_bias={1: 2.0})
    request = processor.process("r", [1], params)
    assert params.logit_bias is not None
    params.logit_bias[VOCAB] = 1.0
    assert request.sampling.logit_bias == {1: 2.0}


def test_without_a_tokenizer_only_ids_are_taken(checkpoint: Checkpoint) -> None:
    processor = make(checkpoint, None)
    assert processor.process("r", [1, 2], SamplingParams()).prompt_token_ids == (1, 2)
    for prompt, params in (
        ("x", SamplingParams()),
        ([1], SamplingParams(stop=["x"])),
        ([1], SamplingParams(bad_words=["x"])),
    ):
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            processor.process("r", prompt, params)


def test_defaults_come_from_the_generation_config(
    tmp_path: Path, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    own = {"temperature": 0.6, "top_k": 20, "top_p": None, "max_new_tokens": 99, "do_sample": True}
    checkpoint = replace(checkpoint, generation_config=own)
    default = make(checkpoint, tokenizer).default_sampling_params()
    assert default == SamplingParams(temperature=0.6, top_k=20, max_tokens=99)
    none = make(checkpoint, tokenizer, generation_config="vllm").default_sampling_params()
    assert none == SamplingParams()
    (tmp_path / "generation_config.json").write_text('{"min_p": 0.1}')
    other = make(checkpoint, tokenizer, generation_config=str(tmp_path))
    assert other.sampling_defaults == {"min_p": 0.1}
    with pytest.raises(ConfigError, match="cannot be read"):
        make(checkpoint, tokenizer, generation_config=str(tmp_path / "no"))
    with pytest.raises(CheckpointError, match="top_p"):
        make(replace(checkpoint, generation_config={"top_p": 7}), tokenizer)

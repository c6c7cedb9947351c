"""The demo model through the public API, against Hugging Face transformers on the same weights.

The reference is golden/smollm2.json (see golden/make_smollm2.py). Everything here is float32.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.checkpoint import open_checkpoint
from jaxserve.frontend.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.weights.reader import TensorFiles, read_into
from tests.models.alone import ModelAlone
from tests.perplexity import check_perplexity

GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2.json").read_text())["prompts"]
TIE = 1e-3  # logits closer than this may swap, and only they
SIZES: dict[str, Any] = {
    "max_model_len": 768,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 600,
    "forbid_late_compile": True,
    "show_progress": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", **SIZES) as llm:
        yield llm


def generate(llm: LLM, cases: list[dict[str, Any]], **params: Any) -> list[RequestOutput]:
    """Greedy outputs from the prompts' own form: text, or messages."""
    chats = [case for case in cases if "messages" in case]
    texts = [case for case in cases if "messages" not in case]

    def sampling(these: list[dict[str, Any]]) -> list[SamplingParams]:
        return [SamplingParams(temperature=0, max_tokens=c["max_tokens"], **params) for c in these]

    outputs = llm.generate([c["prompt"] for c in texts], sampling(texts), use_tqdm=False)
    outputs += llm.chat([c["messages"] for c in chats], sampling(chats), use_tqdm=False)
    by_name = dict(zip([c["name"] for c in texts + chats], outputs, strict=True))
    return [by_name[case["name"]] for case in cases]


def check_tokens(case: dict[str, Any], got: list[int]) -> None:
    """Equal tokens, up to the first place where the reference reports a tie."""
    for i, (a, b) in enumerate(zip(got, case["token_ids"], strict=False)):
        if a != b:
            assert case["gaps"][i] < TIE, f"{case['name']}: token {i} is {a}, not {b}"
            return
    assert len(got) == len(case["token_ids"]), case["name"]


def test_tokens_logprobs_and_text_equal_those_of_transformers(llm: LLM) -> None:
    assert len(GOLDEN) >= 24
    for case, output in zip(GOLDEN, generate(llm, GOLDEN, logprobs=5), strict=True):
        assert output.prompt_token_ids == case["prompt_token_ids"], case["name"]
        (choice,) = output.outputs
        check_tokens(case, choice.token_ids)
        # A character cut off at the end is withheld (as vLLM does); the reference shows its bytes.
        assert choice.text == case["text_out"].rstrip("\ufffd"), case["name"]
        assert choice.finish_reason == case["finish"]
        assert choice.logprobs is not None
        for got, want in zip(choice.logprobs, case["top"], strict=True):
            for token, value in want:
                assert got[token].logprob == pytest.approx(value, abs=1e-3), case["name"]


def test_prompt_logprobs_equal_those_of_transformers(llm: LLM) -> None:
    cases = [case for case in GOLDEN if "prompt_logprobs" in case]
    assert cases
    for case, output in zip(cases, generate(llm, cases, prompt_logprobs=1), strict=True):
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        scores = zip(
            case["prompt_token_ids"][1:],
            output.prompt_logprobs[1:],
            case["prompt_logprobs"],
            strict=True,
        )
        for token, got, (value, rank, top, top_value) in scores:
            assert got is not None
            assert got[token].logprob == pytest.approx(value, abs=1e-3)
            assert got[token].rank == rank or abs(value - top_value) < TIE
            assert got[top].logprob == pytest.approx(top_value, abs=1e-3)


def test_perplexity_is_that_of_transformers(llm: LLM) -> None:
    check_perplexity(llm, "demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a Hugging Face folder in two shards, dequantized to float32."""
    path = tmp_path_factory.mktemp("smollm2")
    checkpoint = open_checkpoint("demo")
    shards: list[dict[str, np.ndarray]] = [{}, {}]
    with TensorFiles() as files:
        for i, (name, info) in enumerate(checkpoint.tensors.items()):
            array = np.empty(info.shape, np.float32)
            read_into(files, info, tuple(slice(0, n) for n in info.shape), array)
            shards[i % 2][name] = array
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file(shard, path / file)
        index |= dict.fromkeys(shard, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "config.json").write_text(json.dumps(checkpoint.config))
    (path / "generation_config.json").write_text(json.dumps(checkpoint.generation_config))
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.gguf is not None
    parts = tokenizer_from_gguf(checkpoint.tokenizer.gguf)
    parts.tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "bos_token": parts.bos_token,
        "eos_token": parts.eos_token,
        "chat_template": checkpoint.chat_template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


def test_a_folder_with_the_same_weights_gives_the_same_tokens(folder: Path) -> None:
    # And by the other loop over the layers, with the prompts in smaller pieces.
    sizes = {**SIZES, "max_num_batched_tokens": 32, "cudagraph_capture_sizes": (4,)}
    cases = [*GOLDEN[::4], GOLDEN[-3]]
    with LLM(str(folder), layer_loop="scan", **sizes) as other:
        for case, output in zip(cases, generate(other, cases), strict=True):
            check_tokens(case, output.outputs[0].token_ids)
            assert output.prompt_token_ids == case["prompt_token_ids"]


def logits_at_the_end(model: ModelAlone, prompt: list[int]) -> np.ndarray:
    return model.logits(np.asarray(prompt))[-1]


def test_logits_are_within_a_thousandth_of_those_of_transformers() -> None:
    cases = [case for case in GOLDEN if "logits" in case]
    assert cases
    model = ModelAlone(open_checkpoint("demo"), scan=True, max_len=768)
    for case in cases:
        got = logits_at_the_end(model, case["prompt_token_ids"])
        want = np.array(case["logits"]["values"])
        np.testing.assert_allclose(got[case["logits"]["ids"]], want, atol=1e-3)

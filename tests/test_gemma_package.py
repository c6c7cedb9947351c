"""Gemma-3-270m from PyPI's packages, where they are installed: a real model in four chunks.

What it answers is compared with golden/gemma3_270m.json (see golden/make_real.py), in float32.
"""

import importlib.util
import json
import mmap
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from jaxserve.checkpoint import Checkpoint, open_checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.gguf.checkpoint import PACKAGED, packaged_files
from jaxserve.weights.reader import TensorFiles, read_into
from tests.models.alone import ModelAlone
from tests.perplexity import GOLDEN as PERPLEXITY

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gemma3_270m.json").read_text())["prompts"]
TIE = 1e-3  # logits closer than this may swap, and only they
STEP = 64  # tokens

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in PACKAGED["gemma3-270m"]),
    reason="needs `make models`",
)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("gemma3-270m")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


def test_its_config_is_gemma_3s(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"]) == (
        640,
        18,
        256,
    )
    assert config["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert (config["sliding_window"], config["query_pre_attn_scalar"]) == (512, 256)
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4
    assert (config["tie_word_embeddings"], config["rms_norm_eps"]) == (True, 1e-6)
    assert len(checkpoint.tensors) == 18 * 13 + 2


def test_tensors_across_chunks_are_those_of_the_whole_file(checkpoint: Checkpoint) -> None:
    across = [info for info in checkpoint.tensors.values() if info.tail]
    assert across
    sizes = {path: path.stat().st_size for path in packaged_files("gemma3-270m")}
    some = [*across, *list(checkpoint.tensors.values())[5::40]]
    with TensorFiles() as files:
        for info in some:
            raw, begin = b"", info.offset
            for path in (info.file, *info.tail):
                with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=1) as data:
                    raw += data[begin : min(sizes[path], begin + info.nbytes - len(raw))]
                begin = 0
            rows = min(info.shape[0], 2000)  # the embedding has 262,144
            stored = np.frombuffer(raw, np.uint8).reshape(info.shape[0], -1)[-rows:]
            expected = dequantize(stored, GGMLQuantizationType[info.encoding])
            expected = expected.reshape(rows, *info.shape[1:]) + np.float32(info.shift)
            out = np.full(expected.shape, np.nan, np.float32)
            last = (
                slice(info.shape[0] - rows, info.shape[0]),
                *(slice(0, n) for n in info.shape[1:]),
            )
            read_into(files, info, last, out)
            assert np.array_equal(out, expected), info.name


# Compared with transformers' own conversion of the file, on 341 texts.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [2, 9259, 236764, 1902, 236888]),
        ("a  b\n\n\n   c", [2, 236746, 138, 236763, 109, 139, 236755]),
        (
            "<start_of_turn>user\nnaïve 你好 🙂\x07",
            [2, 105, 2364, 107, 1789, 238527, 560, 43758, 237389, 57235, 245],
        ),
    ],
)
def test_its_tokenizer_is_gemmas(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids[1:]) == text


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> ModelAlone:
    return ModelAlone(checkpoint, scan=True, max_len=1024)  # twice the window


def logits_after(model: ModelAlone, ids: list[int], first: int) -> np.ndarray:
    """Logits [len(ids) - first, V] at the tokens from `first` on; all steps have one shape."""
    count = -(-len(ids) // STEP)
    padded = np.resize(ids, count * STEP)  # no token sees those after it
    return model.logits(padded, [STEP] * count)[first : len(ids)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    highest = logits.max(axis=-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))


def test_its_tokens_and_logprobs_equal_those_of_transformers(
    model: ModelAlone, tokenizer: Tokenizer
) -> None:
    assert len(GOLDEN) >= 6
    assert max(len(case["prompt_token_ids"]) for case in GOLDEN) > 512
    for case in GOLDEN:
        prompt, output = case["prompt_token_ids"], case["token_ids"]
        assert tokenizer.encode(case["prompt"]) == prompt, case["name"]
        # Given the tokens before it, each is the best one, but where the reference has a tie.
        logits = logits_after(model, prompt + output[:-1], len(prompt) - 1)
        for i, best in enumerate(logits.argmax(axis=-1)):
            assert best == output[i] or case["gaps"][i] < TIE, f"{case['name']}: token {i}"
        logprobs = log_softmax(logits)
        for got, want in zip(logprobs, case["top"], strict=True):
            for token, value in want:
                assert got[token] == pytest.approx(value, abs=1e-3), case["name"]
        if "logits" in case:
            np.testing.assert_allclose(
                logits[0, case["logits"]["ids"]], case["logits"]["values"], atol=1e-3
            )


def test_decoded_one_at_a_time_its_tokens_are_the_same(model: ModelAlone) -> None:
    case = GOLDEN[0]
    assert min(case["gaps"]) > TIE
    assert model.greedy(np.array(case["prompt_token_ids"]), 12) == case["token_ids"][:12]


def test_its_perplexity_is_that_of_transformers(model: ModelAlone, tokenizer: Tokenizer) -> None:
    want = PERPLEXITY["models"]["gemma3-270m"]
    ids = tokenizer.encode(PERPLEXITY["text"])
    assert (ids[:4], len(ids)) == (want["first_token_ids"], want["num_tokens"])
    logprobs = log_softmax(logits_after(model, ids[:-1], 0))
    mean = -logprobs[np.arange(len(ids) - 1), ids[1:]].mean(dtype=np.float64)
    assert np.exp(mean) == pytest.approx(np.exp(want["mean_nll"]), rel=1e-3)

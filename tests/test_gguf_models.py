"""GGUF models of every family come back as the Hugging Face models that they were made from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxserve.checkpoint import open_checkpoint
from jaxserve.errors import CheckpointError
from jaxserve.gguf.families import FAMILIES
from jaxserve.model_index import TensorInfo
from jaxserve.weights.reader import TensorFiles, read_into
from tests.weights.gguf_models import CASES, MODEL_ARCH_NAMES, weights, write


def read(
    files: TensorFiles, info: TensorInfo, index: tuple[slice, ...] | None = None
) -> np.ndarray:
    index = index or tuple(slice(0, n) for n in info.shape)
    out = np.full([s.stop - s.start for s in index], np.nan, np.float32)
    read_into(files, info, index, out)
    return out


@pytest.mark.parametrize("name", CASES)
def test_names_shapes_and_values_come_back(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    expected = weights(case)
    found = open_checkpoint(str(write(case, tmp_path / "x.gguf", expected)))
    assert found.config["architectures"] == [case.architecture]
    assert {key: found.config[key] for key in case.config} == case.config
    assert found.tensors.keys() == expected.keys()
    rng = np.random.default_rng(0)
    with TensorFiles() as files:
        for tensor, values in expected.items():
            info = found.tensors[tensor]
            assert info.shape == values.shape, tensor
            whole = read(files, info)
            if info.shift:  # 1 was added in float32, and is taken away in float32
                assert np.abs(whole - values).max() < 5e-7, tensor
            else:
                assert np.array_equal(whole, values), tensor
            index = tuple(slice(*sorted(rng.integers(0, n + 1, 2).tolist())) for n in info.shape)
            assert np.array_equal(read(files, info, index), whole[index]), tensor


def test_every_architecture_is_tested() -> None:
    assert {MODEL_ARCH_NAMES[case.arch] for case in CASES.values()} == FAMILIES.keys()


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("falcon40b", "attention.head_count_kv", 4, "192 are needed by the file's own sizes"),
        ("deepseek_v2", "attention.head_count", 2, "4 matrices, 2 are needed"),
        ("deepseek_v2", "rope.dimension_count", 32, "more than the 32 rotated columns"),
        ("gpt_oss", "expert_feed_forward_length", 16, "16 are needed by the file's own sizes"),
        ("internlm2", "attention.head_count_kv", 1, "are needed by the file's own sizes"),
        ("cohere2", "logit_scale", float("nan"), "logit_scale is 'nan'"),
        ("olmo3", "attention.sliding_window_pattern", [True], "not a list of 2 flags"),
    ],
)
def test_sizes_that_do_not_fit_the_tensors_are_one_clear_error(
    tmp_path: Path, name: str, key: str, value: object, words: str
) -> None:
    case = CASES[name]
    tensors = weights(case)
    path = write(replace(case, keys={**case.keys, key: value}), tmp_path / "x.gguf", tensors)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(path))
    assert words in str(error.value)
    assert "x.gguf" in str(error.value)

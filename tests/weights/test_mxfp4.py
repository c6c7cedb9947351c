"""MXFP4 experts of a folder read as the numbers that the OCP specification gives them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.checkpoint import WeightSource, open_checkpoint
from jaxserve.errors import CheckpointError
from jaxserve.model_index import Part
from jaxserve.weights import mxfp4
from jaxserve.weights.loader import load_weights

EXPERTS, ROWS, BLOCKS = 3, 10, 2


def element(code: int) -> float:
    """The specification's table: 1 sign bit, 2 of the exponent (bias 1), 1 of the mantissa."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -size if sign else size


def expected(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, R, n, 16] and [E, R, n] -> [E, R, 32 n]."""
    out = np.zeros((*scales.shape, 32))
    for at in np.ndindex(scales.shape):
        for byte, value in enumerate(blocks[at].tolist()):
            out[at][2 * byte : 2 * byte + 2] = element(value & 15), element(value >> 4)
        out[at] *= 2.0 ** (int(scales[at]) - 127)
    return out.reshape(*scales.shape[:-1], -1)


def folder(path: Path, **tensors: np.ndarray) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["GptOssForCausalLM"]}))
    save_file(tensors, path / "model.safetensors")
    return path


def random_tensors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (EXPERTS, ROWS, BLOCKS, 16), np.uint8)
    return blocks, rng.integers(100, 140, (EXPERTS, ROWS, BLOCKS), np.uint8)


def test_every_code_is_the_number_of_the_specification() -> None:
    block = np.arange(16, dtype=np.uint8)[None, None] * 16 + np.arange(16, dtype=np.uint8)
    got = mxfp4.decode_blocks(block, np.full((1, 1), 127, np.uint8))
    assert got[0].tolist() == [element(code) for code in range(16) for _ in range(2)]


@pytest.mark.parametrize("turn", [0, 1])
def test_experts_that_take_turns_are_read_apart(tmp_path: Path, turn: int) -> None:
    blocks, scales = random_tensors()
    found = open_checkpoint(
        str(folder(tmp_path / "m", gate_up_blocks=blocks, gate_up_scales=scales))
    )
    assert found.tensors["gate_up"].shape == (EXPERTS, 32 * BLOCKS, ROWS)
    source = WeightSource(
        names=("gate_up",),
        shape=(EXPERTS, 32 * BLOCKS, ROWS // 2),
        part=Part(start=turn, stop=turn + 1, group_size=2, groups=ROWS // 2, axis=-1),
    )
    loaded = load_weights(found, {"gate": source}, dtype=np.float32)
    want = expected(blocks, scales).swapaxes(1, 2)[..., turn::2]
    np.testing.assert_array_equal(np.asarray(loaded["gate"]), want)


def test_blocks_without_their_scales_are_not_weights(tmp_path: Path) -> None:
    blocks, _ = random_tensors()
    found = open_checkpoint(str(folder(tmp_path / "m", gate_up_blocks=blocks)))
    source = WeightSource(names=("gate_up",), shape=(EXPERTS, 32 * BLOCKS, ROWS))
    with pytest.raises(CheckpointError, match=r"1 missing: gate_up.*1 unexpected: gate_up_blocks"):
        load_weights(found, {"gate": source}, dtype=np.float32)


def test_a_vector_may_be_stored_with_leading_axes_of_one(tmp_path: Path) -> None:
    values = np.arange(8, dtype=np.float32)
    found = open_checkpoint(str(folder(tmp_path / "m", bias=values[None], other=values[:, None])))
    bias = WeightSource(names=("bias",), shape=(8,))
    other = WeightSource(names=("other",), shape=(8,))
    loaded = load_weights(found, {"bias": bias}, dtype=np.float32, ignored=("other",))
    np.testing.assert_array_equal(np.asarray(loaded["bias"]), values)
    with pytest.raises(CheckpointError, match=r"other is \(8, 1\), the config needs \(8,\)"):
        load_weights(found, {"other": other}, dtype=np.float32, ignored=("bias",))

"""Dequantisation is bit for bit that of the gguf package."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as oracle
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.checkpoint import demo_path, open_checkpoint
from jaxserve.gguf.header import ENCODINGS
from jaxserve.weights.gguf import BLOCK_FORMATS, dequantize, unpermute_rows
from jaxserve.weights.reader import TensorFiles, read_into

ROWS = 6


def bits(values: np.ndarray) -> list[int]:
    return np.ascontiguousarray(values, np.float32).view(np.uint32).ravel().tolist()


@pytest.mark.parametrize("encoding", sorted(BLOCK_FORMATS.keys() - {"Q8_K"}))
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_bytes_agree_bit_for_bit(encoding: str, seed: int) -> None:
    block = BLOCK_FORMATS[encoding]
    raw = np.random.default_rng(seed).integers(0, 256, (ROWS, 3 * block.nbytes), np.uint8)
    ours = dequantize(raw, encoding, ROWS)
    with np.errstate(all="ignore"):
        theirs = oracle(raw, GGMLQuantizationType[encoding])
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    # A NaN's payload is no value; everything else is compared by its bits.
    same = np.isnan(ours) & np.isnan(theirs)
    assert bits(np.where(same, 0, ours)) == bits(np.where(same, 0, theirs))


@pytest.mark.parametrize("special", [0x7C00, 0xFC00, 0x7E00, 0x0001, 0x8000])
@pytest.mark.parametrize("encoding", sorted(BLOCK_FORMATS.keys() - {"Q8_K", "MXFP4"}))
def test_scales_that_are_infinite_or_no_number_are_kept(encoding: str, special: int) -> None:
    block = BLOCK_FORMATS[encoding]
    raw = np.random.default_rng(0).integers(0, 256, (2, block.nbytes), np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}
    for place in places.get(encoding, (0,)):
        raw[:, place : place + 2] = np.array([special], "<u2").view(np.uint8)
    with np.errstate(all="ignore"):
        theirs = oracle(raw, GGMLQuantizationType[encoding])
    assert np.array_equal(dequantize(raw, encoding, 2), theirs, equal_nan=True)


def test_q8_k_is_a_float_times_bytes() -> None:  # the gguf package does not read it
    quants = np.random.default_rng(0).integers(-128, 128, (ROWS, 2, 256), np.int8)
    scales = np.random.default_rng(1).standard_normal((ROWS, 2, 1), np.float32)
    sums = np.full((ROWS, 2, 32), 0xAA, np.uint8)
    raw = np.concatenate((scales.view(np.uint8), quants.view(np.uint8), sums), axis=-1)
    expected = (scales * quants.astype(np.float32)).reshape(ROWS, 512)
    assert bits(dequantize(raw.reshape(ROWS, -1), "Q8_K", ROWS)) == bits(expected)


@pytest.mark.parametrize(
    "encoding", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"]
)
def test_quantised_values_come_back(encoding: str) -> None:
    kind = GGMLQuantizationType[encoding]
    values = np.random.default_rng(1).standard_normal((ROWS, 256), np.float32)
    raw = quantize(values, kind)
    ours = dequantize(raw, encoding, ROWS)
    assert bits(ours) == bits(oracle(raw, kind))
    assert np.abs(ours - values).max() < {"TQ1_0": 2.5, "TQ2_0": 2.5, "MXFP4": 1}.get(encoding, 0.5)


def test_block_sizes_are_those_of_the_header_reader() -> None:
    known = {name: (values, nbytes) for name, values, nbytes in ENCODINGS.values()}
    for name, block in BLOCK_FORMATS.items():
        assert known[name] == (block.values, block.nbytes)


def test_unpermuted_rows_pair_as_hugging_face_rotates_them() -> None:
    head_dim, heads = 8, 3
    stored = np.arange(heads * head_dim, dtype=np.float32)[:, None]
    rows = unpermute_rows(stored, head_dim)[:, 0].reshape(heads, head_dim)
    for head in range(heads):
        for pair in range(head_dim // 2):
            first = head * head_dim + 2 * pair
            assert rows[head, pair] == first
            assert rows[head, pair + head_dim // 2] == first + 1


def test_the_demo_agrees_with_the_gguf_package() -> None:
    """The largest tensor's start, and whole matrices of each kind, against the oracle."""
    tensors = open_checkpoint("demo").tensors
    data = np.memmap(demo_path(), np.uint8, "r")
    with TensorFiles() as files:
        for name in (
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.29.self_attn.k_proj.weight",
            "model.layers.7.mlp.down_proj.weight",
            "model.layers.3.input_layernorm.weight",
            "model.embed_tokens.weight",
        ):
            info = tensors[name]
            out = np.full(info.shape, np.nan, np.float32)
            read_into(files, info, tuple(slice(0, n) for n in info.shape), out)
            stored = data[info.offset : info.offset + info.nbytes]
            kind = GGMLQuantizationType[info.encoding]
            if info.encoding == "F32":
                expected = stored.view(np.float32)
            else:
                expected = oracle(stored.reshape(info.shape[0], -1), kind)
            if info.permute_heads:
                half = info.shape[0] // info.permute_heads // 2
                paired = expected.reshape(info.permute_heads, half, 2, info.shape[1])
                expected = paired.swapaxes(1, 2).reshape(info.shape)
            assert np.array_equal(out, expected), name

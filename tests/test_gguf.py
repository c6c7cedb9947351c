"""The GGUF header reader: agrees with the gguf package, and survives hostile files."""

import contextlib
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.checkpoint import open_checkpoint
from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.frontend.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.gguf.header import ENCODINGS, read_gguf
from tests.weights.files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    gguf_bytes,
    gguf_key,
    gguf_string,
    gguf_tensor,
    llama_gguf,
    llama_weights,
)

KEYS = [
    ("general.architecture", STRING, "llama"),
    ("general.name", STRING, "naïve 名"),
    ("a.u8", U8, 200),
    ("a.i8", I8, -3),
    ("a.f32", F32, 0.5),
    ("a.f64", F64, 0.1),
    ("a.u64", U64, 2**63),
    ("a.true", BOOL, True),
    ("a.words", ARRAY, (STRING, ["x", "", "ÿz"])),
    ("a.numbers", ARRAY, (I32, [1, -2, 3])),
    ("a.flags", ARRAY, (BOOL, [True, False])),
    ("a.none", ARRAY, (U16, [])),
]
TENSORS = {
    "one": ((2, 32), GGMLQuantizationType.Q8_0, bytes(range(68))),
    "two": ((5,), GGMLQuantizationType.F32, bytes(20)),
    "three": ((1, 2, 3), GGMLQuantizationType.F16, bytes(12)),
}


def header(num_tensors: int = 0, num_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_values_and_positions_agree_with_the_gguf_package(tmp_path: Path, version: int) -> None:
    path = write(tmp_path, gguf_bytes(KEYS, TENSORS, version=version))
    found, oracle = read_gguf(path), GGUFReader(path)
    for key, _, _ in KEYS:
        value = found.metadata[key]
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        assert plain == oracle.fields[key].contents(), key
    for tensor in oracle.tensors:
        ours = found.tensors[tensor.name]
        assert ours.shape == tuple(map(int, reversed(tensor.shape)))
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.encoding == tensor.tensor_type.name


def test_the_block_sizes_are_those_of_the_gguf_package() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    ours = {name: (block, nbytes) for name, block, nbytes in ENCODINGS.values()}
    theirs = {kind.name: size for kind, size in GGML_QUANT_SIZES.items()}
    assert ours == {name: theirs[name] for name in ours}
    assert all(GGMLQuantizationType(number).name == e[0] for number, e in ENCODINGS.items())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"GG", "starts with"),
        (b"PK\3\4" + bytes(100), "starts with"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (header(version=0), "version 0"),
        (header(version=99), "version 99"),
        (header(version=3 << 24), "big-endian"),
        (header(num_tensors=2**63), "number of tensors"),
        (header(num_keys=2**63), "number of metadata keys"),
        (header(num_keys=1) + struct.pack("<Q", 2**63), "length of metadata key"),
        (header(num_keys=1) + gguf_string(b"\xff\xfe") + bytes(8), "not UTF-8"),
        (header(num_keys=1) + gguf_string("k") + struct.pack("<I", 200), "type 200"),
        (header(num_keys=1) + gguf_string("k") + struct.pack("<IQ", STRING, 2**62), "length of"),
        (header(num_keys=1) + gguf_string("k") + struct.pack("<IIQ", 9, 4, 2**60), "length of"),
        (header(num_keys=1) + gguf_string("k") + struct.pack("<IIQ", 9, 8, 2**21), "truncated"),
        (header(num_keys=1) + gguf_string("k") + struct.pack("<IIQ", 9, 0, 2**21), "truncated"),
        (header(num_keys=1) + gguf_string("k") + struct.pack("<IIQ", 9, 9, 2), "array of arrays"),
        (header(num_keys=1) + gguf_key("k", ARRAY, (STRING, [b"\xff"])), "not UTF-8"),
        (header(num_keys=2) + 2 * gguf_key("k", U8, 1), "twice"),
        (header(1) + gguf_tensor("t", [4], 0, 0), "truncated"),
        (header(1) + gguf_tensor("t", [], 0, 0) + bytes(64), "0 dimensions"),
        (header(1) + gguf_string("t") + struct.pack("<I", 10**9), "1000000000 dimensions"),
        (header(1) + gguf_tensor("t", [2**63, 2], 0, 0) + bytes(64), "shape"),
        (header(1) + gguf_tensor("t", [2**31 + 1] * 4, 0, 0) + bytes(64), "truncated"),
        (header(1) + gguf_tensor("t", [0], 0, 0) + bytes(64), "shape"),
        (header(1) + gguf_tensor("t", [31], 8, 0) + bytes(64), "not whole Q8_0 blocks"),
        (header(1) + gguf_tensor("t", [4], 77, 0) + bytes(64), "unknown ggml type 77"),
        (header(1) + gguf_tensor("t", [4], 0, 7) + bytes(64), "multiple of 32"),
        (header(1) + gguf_tensor("t", [4], 0, 2**63) + bytes(64), "truncated"),
        (header(2) + 2 * gguf_tensor("t", [4], 0, 0) + bytes(64), "twice"),
        (
            header(2) + gguf_tensor("t", [9], 0, 0) + gguf_tensor("u", [4], 0, 32) + bytes(128),
            "overlaps tensor 't'",
        ),
        *(
            (header(0, 1) + gguf_key("general.alignment", U32, value), "general.alignment")
            for value in (0, 3, 2**31, 1)
        ),
        (header(0, 1) + gguf_key("general.alignment", STRING, "x"), "general.alignment"),
    ],
)
def test_a_damaged_header_is_one_clear_error(tmp_path: Path, data: bytes, words: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        read_gguf(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_a_folder_is_a_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_gguf(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = gguf_bytes(KEYS, TENSORS)
    end = read_gguf(write(tmp_path, whole)).tensors["three"]
    for size in range(end.offset + end.nbytes):
        with pytest.raises(CheckpointError):
            read_gguf(write(tmp_path, whole[:size]))


@pytest.mark.parametrize("kind", [STRING, U8, I32, F64])
def test_a_hostile_array_costs_neither_memory_nor_time(tmp_path: Path, kind: int) -> None:
    items = struct.pack("<IQ", kind, 2**20)
    data = header(num_keys=1) + gguf_string("k") + struct.pack("<I", ARRAY) + items + bytes(1000)
    path = write(tmp_path, data)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError):
        read_gguf(path)
    assert time.perf_counter() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_many_large_arrays_are_refused_in_sum(tmp_path: Path) -> None:
    body = b"".join(
        gguf_string(f"k{i}") + struct.pack("<IIQ", ARRAY, U8, 2**21) + bytes(2**21)
        for i in range(3)
    )
    with pytest.raises(CheckpointError, match="arrays hold more than"):
        read_gguf(write(tmp_path, header(num_keys=3) + body))


def test_a_vocabulary_of_262144_tokens_is_read_within_a_second(tmp_path: Path) -> None:
    tokens = [f"token{i}" for i in range(262_144)]
    keys: list[tuple[str, int, Any]] = [
        ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        ("tokenizer.ggml.merges", ARRAY, (STRING, [f"a{t} b" for t in tokens])),
        ("tokenizer.ggml.scores", ARRAY, (F32, range(len(tokens)))),
    ]
    path = write(tmp_path, gguf_bytes(keys, {}))
    start = time.process_time()
    found = read_gguf(path)
    assert time.process_time() - start < 1
    assert found.metadata["tokenizer.ggml.tokens"] == tokens


TOKENIZER_KEYS = [
    ("tokenizer.ggml.model", STRING, "llama"),
    ("tokenizer.ggml.pre", STRING, "smollm"),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, ["<u>", "<s>", "</s>", "a", "b", "ab", "▁", "▁a"])),
    ("tokenizer.ggml.scores", ARRAY, (F32, [0, 0, 0, -5, -6, -1, -7, -2])),
    ("tokenizer.ggml.token_type", ARRAY, (I32, [2, 3, 3, 1, 1, 1, 1, 4])),
    ("tokenizer.ggml.merges", ARRAY, (STRING, ["a b", "▁ a"])),
    ("tokenizer.ggml.add_bos_token", BOOL, True),
    ("tokenizer.chat_template", STRING, "{{ x }}"),
]
SMALL = llama_gguf(llama_weights(tied=True), keys=TOKENIZER_KEYS)
SMALL_HEADER_BYTES = SMALL.index(b"output_norm.weight") + 60  # the last tensor's entry


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_raise_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, SMALL_HEADER_BYTES))
        raw[position] = data.draw(
            st.sampled_from((0, 1, 8, 9, 127, 128, 255)) | st.integers(0, 255)
        )
    path = write(tmp_path, bytes(raw))
    with contextlib.suppress(CheckpointError, UnsupportedError):
        source = open_checkpoint(str(path)).tokenizer
        if source is not None and source.gguf is not None:
            tokenizer_from_gguf(source.gguf).tokenizer.encode("ab a")

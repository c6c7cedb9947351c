"""The safetensors header reader: agrees with the safetensors package, survives hostile files."""

import contextlib
import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save, save_file

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.safetensors import MAX_HEADER_BYTES, read_safetensors


def pack(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, end: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    return path


def test_positions_agree_with_the_safetensors_package(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3, np.float16),
        "empty": np.zeros((0, 4), np.int8),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "np"})
    found, raw = read_safetensors(path), path.read_bytes()
    with safe_open(path, "numpy") as oracle:
        assert found.keys() == set(oracle.keys())
        for name, e in found.items():
            value = oracle.get_tensor(name)
            assert e.shape == value.shape
            assert raw[e.offset : e.offset + e.nbytes] == value.tobytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "truncated"),
        (b"1234", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (struct.pack("<Q", 2**60) + b"{}", "claims 1152921504606846976 bytes"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (pack(b"[]"), "not a JSON object"),
        (pack(b"{"), "not JSON"),
        (pack(b'{"a":' + b"[" * 10_000), "not JSON"),
        (pack(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000), "not JSON"),
        (pack(b'{"a":{},"a":{}}'), "'a' twice"),
        (pack({"a": 1}), "needs dtype"),
        (pack({"a": {"dtype": "F32"}}), "needs dtype"),
        (pack({"a": entry(0, 8, dtype="F99")}, bytes(8)), "unknown dtype 'F99'"),
        (pack({"a": entry(0, 8, [2**60, 2**60])}, bytes(8)), "impossible shape"),
        (pack({"a": entry(0, 8, [-2])}, bytes(8)), "impossible shape"),
        (pack({"a": entry(0, 8, [2.0])}, bytes(8)), "impossible shape"),
        (pack({"a": entry(0, 8, [True])}, bytes(8)), "impossible shape"),
        (pack({"a": entry(0, 8, [1] * 17)}, bytes(8)), "impossible shape"),
        (pack({"a": entry(8, 0)}, bytes(8)), "impossible data_offsets"),
        (pack({"a": entry(-8, 0)}, bytes(8)), "impossible data_offsets"),
        (pack({"a": entry(0, 8, [3])}, bytes(8)), "needs 12 bytes"),
        (pack({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps tensor 'a'"),
        (pack({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "hole after tensor 'a'"),
        (pack({"a": entry(4, 12)}, bytes(12)), "hole after the header"),
        (pack({"a": entry(0, 8)}, bytes(7)), "truncated"),
        (pack({"a": entry(0, 8)}, bytes(9)), "1 bytes after"),
        (pack({"n" * 600: entry(0, 8)}, bytes(8)), "longer than 512"),
    ],
)
def test_a_damaged_header_is_one_clear_error(tmp_path: Path, data: bytes, words: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        read_safetensors(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = save({"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float16)})
    for size in range(len(whole)):
        with pytest.raises(CheckpointError):
            read_safetensors(write(tmp_path, whole[:size]))


@pytest.mark.parametrize("what", ["tensors", "lists", "numbers"])
def test_a_header_bomb_costs_neither_memory_nor_time(tmp_path: Path, what: str) -> None:
    if what == "tensors":  # a million empty ones are valid to the format
        one = b'"%07d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
        text = b"{" + b",".join(one % i for i in range(500_000)) + b"}"
    elif what == "lists":
        text = b'{"a":[' + b",".join([b"[]"] * 5_000_000) + b"]}"
    else:
        text = b'{"a":[' + b",".join([b"1000"] * 3_000_000) + b"]}"
    path = write(tmp_path, pack(text))
    assert len(text) < MAX_HEADER_BYTES
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CheckpointError, match="its header"):
        read_safetensors(path)
    assert time.process_time() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    tracemalloc.stop()


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_raise_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(save({"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float16)}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path, bytes(raw))
    with contextlib.suppress(CheckpointError, UnsupportedError):
        read_safetensors(path)

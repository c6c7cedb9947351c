"""Any slice of a stored tensor equals that slice of the whole, and every value is written."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.checkpoint import TensorInfo
from jaxserve.errors import CheckpointError
from jaxserve.weights import reader
from jaxserve.weights.reader import TensorFiles, copy_values, read_into

SHAPES = [(7,), (8, 64), (3, 8, 64), (2, 3, 4, 32), ()]


def store(
    folder: Path, values: np.ndarray, encoding: str, heads: int | None = None
) -> tuple[TensorInfo, np.ndarray]:
    """Write one tensor after some padding; return its info and its values after rounding."""
    if encoding in ("F32", "F16", "F64"):
        stored = values.astype({"F32": "f4", "F16": "f2", "F64": "f8"}[encoding])
        exact = stored
    elif encoding == "BF16":
        exact = stored = values.astype(ml_dtypes.bfloat16)
    else:
        stored = quantize(values, GGMLQuantizationType[encoding])
        exact = dequantize(stored, GGMLQuantizationType[encoding])
    path = folder / "tensor"
    path.write_bytes(b"\xaa" * 13 + stored.tobytes() + b"\xaa" * 5)
    info = TensorInfo(
        name="t",
        shape=values.shape,
        file=path,
        offset=13,
        nbytes=stored.nbytes,
        encoding=encoding,
        permute_heads=heads,
    )
    return info, exact.astype(np.float64)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_slice_is_that_slice_of_the_whole(tmp_path: Path, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    quantised = shape and shape[-1] % 32 == 0
    encodings = ["F32", "F16", "BF16", "F64", *(["Q8_0", "Q4_1"] if quantised else [])]
    encoding = data.draw(st.sampled_from(encodings))
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    info, exact = store(tmp_path, values, encoding)
    index = []
    for n in shape:
        start = data.draw(st.integers(0, n))
        index.append(slice(start, data.draw(st.integers(start, n))))
    expected = exact[tuple(index)]
    with pytest.MonkeyPatch.context() as patch, TensorFiles() as files:
        patch.setattr(reader, "CHUNK_VALUES", data.draw(st.sampled_from((1, 100, 1 << 20))))
        out = np.full(expected.shape, np.nan, np.float32)
        read_into(files, info, tuple(index), out)
        assert np.array_equal(out, expected.astype(np.float32))
        if len(shape) == 2:  # into a transposed view, as for a kernel [in, out]
            turned = np.full(expected.shape[::-1], np.nan, np.float32)
            read_into(files, info, tuple(index), turned.T)
            assert np.array_equal(turned.T, out)


@given(start=st.integers(0, 24), length=st.integers(0, 24), chunk=st.sampled_from((1, 600, 9999)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_slice_of_permuted_heads_is_that_slice_of_the_whole(
    tmp_path: Path, start: int, length: int, chunk: int
) -> None:
    heads, stop = 3, min(24, start + length)
    whole = np.random.default_rng(0).standard_normal((24, 32)).astype(np.float32)
    stored = whole.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(24, 32)
    with pytest.MonkeyPatch.context() as patch, TensorFiles() as files:
        patch.setattr(reader, "CHUNK_VALUES", chunk)
        info, _ = store(tmp_path, stored, "F32", heads)
        out = np.empty((stop - start, 10), np.float32)
        read_into(files, info, (slice(start, stop), slice(5, 15)), out)
        assert np.array_equal(out, whole[start:stop, 5:15])
    with TensorFiles() as files:  # a bias is permuted like the rows it belongs to
        info, _ = store(tmp_path, stored[:, 0], "F32", heads)
        bias = np.empty(stop - start, np.float32)
        read_into(files, info, (slice(start, stop),), bias)
        assert np.array_equal(bias, whole[start:stop, 0])


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_copy_into_a_transposed_array_is_exact_and_stays_inside(
    monkeypatch: pytest.MonkeyPatch, stored: np.typing.DTypeLike, dtype: np.typing.DTypeLike
) -> None:
    monkeypatch.setattr(reader, "_TURNED_ROWS", 16)
    monkeypatch.setattr(reader, "_TILE_BYTES", 1 << 12)
    for shape in ((1, 1), (16, 64), (50, 200), (33, 65), (7, 1000), (300, 3)):
        values = np.random.default_rng(0).standard_normal(shape).astype(stored)
        whole = np.zeros((shape[1] + 2, shape[0] + 2), dtype)
        expected = whole.copy()
        copy_values(values, whole[1:-1, 1:-1].T)
        expected[1:-1, 1:-1] = values.T
        assert np.array_equal(whole, expected), shape


def test_values_that_overflow_the_dtype_are_refused(tmp_path: Path) -> None:
    info, _ = store(tmp_path, np.array([[1.0, 70000.0], [1.0, 1.0]], np.float32), "F32")
    for out in (np.empty((2, 2), np.float16), np.empty((2, 2), np.float16).T):
        with TensorFiles() as files, pytest.raises(CheckpointError, match="--dtype bfloat16"):
            read_into(files, info, (slice(0, 2), slice(0, 2)), out)


def test_stored_infinities_are_kept(tmp_path: Path) -> None:
    info, _ = store(tmp_path, np.array([[1.0, np.inf]], np.float32), "F32")
    out = np.empty((1, 2), np.float16)
    with TensorFiles() as files:
        read_into(files, info, (slice(0, 1), slice(0, 2)), out)
    assert out.tolist() == [[1.0, np.inf]]


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path) -> None:
    info, _ = store(tmp_path, np.ones((64, 64), np.float32), "F32")
    with info.file.open("r+b") as file:
        file.truncate(1000)
    with TensorFiles() as files, pytest.raises(CheckpointError, match="became shorter"):
        read_into(files, info, (slice(0, 64), slice(0, 64)), np.empty((64, 64), np.float32))
    info.file.unlink()
    with TensorFiles() as files, pytest.raises(CheckpointError, match="cannot be read"):
        read_into(files, info, (slice(0, 64), slice(0, 64)), np.empty((64, 64), np.float32))


def test_reading_outside_of_a_tensor_is_a_bug(tmp_path: Path) -> None:
    info, _ = store(tmp_path, np.ones((2, 2), np.float32), "F32")
    with TensorFiles() as files, pytest.raises(ValueError, match="are not in"):
        files.read(info, 8, np.empty(3, np.float32))

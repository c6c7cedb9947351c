"""Reading any part of one stored tensor, in bounded memory.

Plain reads, not a memory map: a map's pages count as the process's memory, and a file that
shrinks while it is mapped kills the process. A short read is an error with a name instead.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from jaxserve.checkpoint import TensorInfo
from jaxserve.errors import CheckpointError
from jaxserve.weights import mxfp4, scaled
from jaxserve.weights.gguf import BLOCK_FORMATS, dequantize, unpermute_rows
from jaxserve.weights.safetensors import PLAIN

CHUNK_VALUES = 1 << 18  # decoded at a time, by each thread: about what a core's cache holds
_TURNED_ROWS = 128  # at a time into a transposed array: whole cache lines of it
_TILE_BYTES = 1 << 18  # transposed at a time: it must stay in a core's own cache
_LINE = 64  # bytes of a cache line


def readable_encodings() -> tuple[str, ...]:
    """The encodings that can be turned into floating-point weights."""
    return (*PLAIN, *BLOCK_FORMATS, mxfp4.ENCODING, *scaled.VALUES)


class TensorFiles:
    """The open files of a checkpoint; a context manager, usable from several threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fill a contiguous array with the bytes of a tensor that begin at `start`."""
        if not 0 <= start <= start + out.nbytes <= info.nbytes:
            raise ValueError(f"bytes {start} to {start + out.nbytes} are not in {info}")
        view = memoryview(out.reshape(-1).view(np.uint8))
        position, tail = info.offset + start, list(info.tail)
        try:
            descriptor = self._open(info.file)
            while view:
                count = os.preadv(descriptor, [view[: 1 << 30]], position)
                if count == 0 and tail:  # the bytes go on in the next file
                    position -= os.fstat(descriptor).st_size
                    descriptor = self._open(tail.pop(0))
                    continue
                if count == 0:
                    raise CheckpointError(
                        f"{info.file} became shorter while tensor {info.name!r} was read; "
                        "leave the file alone while it loads"
                    )
                view, position = view[count:], position + count
        except OSError as error:
            raise CheckpointError(
                f"{info.file} cannot be read: {error.strerror}; check the disk"
            ) from error

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]


def read_into(
    files: TensorFiles,
    info: TensorInfo,
    index: tuple[slice, ...],
    out: np.ndarray,
) -> None:
    """Fill `out` with `tensor[index]`, converted to its dtype.

    Args:
        files: Open files.
        info: The tensor; its shape is Hugging Face's.
        index: One slice of step 1 per axis.
        out: Shape of the result; any strides.
    """
    if info.pieces:
        _read_pieces(files, info, index, out)
        return
    if info.transposed:
        index, out = (*index[:-2], index[-1], index[-2]), out.swapaxes(-1, -2)
        stored = (*info.shape[:-2], info.shape[-1], info.shape[-2])
        info = replace(info, shape=stored, transposed=False)
    shape = info.shape
    if info.encoding == mxfp4.ENCODING:
        _read_mxfp4(files, info, index, out)
        return
    if len(shape) <= 1:
        # A vector is a row; but one whose entries belong to the rows of a matrix is a column.
        column = info.permute_heads is not None
        matrix, axis = ((*shape, 1), -1) if column else ((1, *(shape or (1,))), 0)
        whole = slice(0, 1)
        spans = (index[0], whole) if column else (whole, index[0] if index else whole)
        _read_matrix(files, info, 0, matrix, spans, np.expand_dims(out, axis))
        return
    strides = np.cumprod([1, *reversed(shape[:-2])])[-2::-1] if len(shape) > 2 else []
    lead = [range(*s.indices(n)) for s, n in zip(index[:-2], shape[:-2], strict=True)]
    for position in np.ndindex(*(len(r) for r in lead)):
        number = sum(int(m) * r[p] for m, r, p in zip(strides, lead, position, strict=True))
        first_row = number * shape[-2]
        _read_matrix(files, info, first_row, shape[-2:], index[-2:], out[position])


def _read_pieces(
    files: TensorFiles, info: TensorInfo, index: tuple[slice, ...], out: np.ndarray
) -> None:
    """`read_into` for a tensor that is joined of several."""
    spans = [range(*s.indices(n)) for s, n in zip(index, info.shape, strict=True)]
    if len(spans) > 2:  # matrix by matrix, which bounds what is held besides `out`
        for place, number in enumerate(spans[0]):
            one = (slice(number, number + 1), *index[1:])
            _read_joined(files, info, one, spans[1:], out[place : place + 1])
    else:
        _read_joined(files, info, index, spans, out)


def _read_joined(
    files: TensorFiles,
    info: TensorInfo,
    index: tuple[slice, ...],
    spans: Sequence[range],
    out: np.ndarray,
) -> None:
    """Each piece's share of a range; `spans` are the last axes' of `index`."""
    for piece in info.pieces:
        part = piece.part
        span, axis = spans[part.axis], len(info.shape) + part.axis
        group, place = np.divmod(np.arange(span.start, span.stop), part.group_size)
        mine = np.flatnonzero((part.start <= place) & (place < part.stop))
        if not mine.size:
            continue
        # What the piece gives to a range of the whole is a range of the piece.
        source = group[mine] * (part.stop - part.start) + place[mine] - part.start
        wanted = (*index[:axis], slice(int(source[0]), int(source[-1]) + 1), *index[axis + 1 :])
        before = (slice(None),) * axis
        if mine[-1] - mine[0] + 1 == mine.size:
            target = out[(*before, slice(int(mine[0]), int(mine[-1]) + 1))]
            read_into(files, piece.info, wanted, target)
        else:
            shape = (*out.shape[:axis], mine.size, *out.shape[axis + 1 :])
            values = np.empty(shape, out.dtype)
            read_into(files, piece.info, wanted, values)
            out[(*before, mine)] = values


def _read_mxfp4(
    files: TensorFiles, info: TensorInfo, index: tuple[slice, ...], out: np.ndarray
) -> None:
    """`read_into` for experts' rows [E, out, in] whose blocks and exponents lie apart."""
    if info.scales is None:
        raise ValueError(f"{info} has no scales")
    _, num_rows, num_inputs = info.shape
    (first, last, _), (top, bottom, _), (left, right, _) = (
        s.indices(n) for s, n in zip(index, info.shape, strict=True)
    )
    row_blocks = num_inputs // 32
    for expert in range(first, last):
        for start, stop in _row_chunks(top, bottom, 1, num_inputs):
            row = expert * num_rows + start
            blocks = np.empty((stop - start, row_blocks, 16), np.uint8)
            files.read(info, row * row_blocks * 16, blocks)
            scales = np.empty((stop - start, row_blocks), np.uint8)
            files.read(info.scales, row * row_blocks, scales)
            rows = mxfp4.decode_blocks(blocks, scales)[:, left:right]
            store_values(rows, out[expert - first, start - top : stop - top], info)


def _read_matrix(
    files: TensorFiles,
    info: TensorInfo,
    first_row: int,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    out: np.ndarray,
) -> None:
    """`read_into` for one matrix of a tensor, which begins at row `first_row`."""
    (top, bottom, _), (left, right, _) = (s.indices(n) for s, n in zip(index, shape, strict=True))
    if top >= bottom or left >= right:
        return
    values, block_bytes = _block(info.encoding)
    row_bytes = shape[1] // values * block_bytes
    changed = info.permute_heads is not None or info.shift
    is_scaled = info.encoding in scaled.VALUES
    scales = _read_scales(files, info, first_row // shape[0], shape) if is_scaled else None
    as_stored = PLAIN.get(info.encoding) == out.dtype and not changed
    if as_stored and (left, right) == (0, shape[1]) and out.flags.c_contiguous:
        files.read(info, (first_row + top) * row_bytes, out)
        return
    head_dim = shape[0] // info.permute_heads if info.permute_heads else 1
    least = _TURNED_ROWS if _is_turned(out) else 1
    for start, stop in _row_chunks(top, bottom, head_dim, shape[1], least):
        raw = np.empty((stop - start, row_bytes), np.uint8)
        files.read(info, (first_row + start) * row_bytes, raw)
        first, last = left // values, -(-right // values)  # only the blocks that are asked for
        raw = raw[:, first * block_bytes : last * block_bytes]
        if scales is None:
            rows = _decode(raw, info.encoding)[:, left - first * values : right - first * values]
        else:
            rows = scaled.decode(
                raw, info.encoding, scales, first=(start, left), block=info.scale_block
            )
        if info.permute_heads:
            rows = unpermute_rows(rows, head_dim)
        if info.shift:
            rows = rows.astype(np.float32) + np.float32(info.shift)
        begin, end = max(start, top), min(stop, bottom)
        store_values(rows[begin - start : end - start], out[begin - top : end - top], info)


def _read_scales(
    files: TensorFiles, info: TensorInfo, number: int, shape: tuple[int, ...]
) -> np.ndarray:
    """The scales [blocks down, blocks across] of one matrix of a tensor, float32."""
    if info.scales is None:
        raise ValueError(f"{info} has no scales")
    counts = [-(-size // block) for size, block in zip(shape, info.scale_block, strict=True)]
    found = np.empty(counts, scaled.SCALE_TYPES[info.scales.encoding])
    files.read(info.scales, number * found.nbytes, found)
    return found.astype(np.float32)


def _block(encoding: str) -> tuple[int, int]:
    """Values and bytes of one block; a plain number is a block of one."""
    if encoding in scaled.VALUES:
        return 1, 1
    if encoding in PLAIN:
        return 1, PLAIN[encoding].itemsize
    return BLOCK_FORMATS[encoding].values, BLOCK_FORMATS[encoding].nbytes


def _row_chunks(
    top: int, bottom: int, unit: int, width: int, least: int = 1
) -> Iterator[tuple[int, int]]:
    """Ranges that cover rows `top` to `bottom`, made of whole units (heads).

    They have `least` rows, unless that makes them four times as large as others.
    """
    rows = max(CHUNK_VALUES // width, min(least, 4 * CHUNK_VALUES // width))
    step = max(1, rows // unit) * unit
    start, end = top // unit * unit, -(-bottom // unit) * unit
    for row in range(start, end, step):
        yield row, min(row + step, end)


def _decode(raw: np.ndarray, encoding: str) -> np.ndarray:
    """Bytes [rows, bytes of a row] -> values [rows, values of a row]."""
    raw = np.ascontiguousarray(raw)
    if encoding in PLAIN:
        return raw.view(PLAIN[encoding])
    return dequantize(raw, encoding, len(raw))


def store_values(values: np.ndarray, out: np.ndarray, info: TensorInfo) -> None:
    """Copy with conversion; a finite value that becomes infinite is an error."""
    try:
        with np.errstate(over="raise", invalid="ignore"):
            copy_values(values, out)
    except FloatingPointError:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} has values that {out.dtype.name} cannot hold; "
            "use --dtype bfloat16 or float32"
        ) from None


def copy_values(values: np.ndarray, out: np.ndarray) -> None:
    """`out[...] = values`, several times as fast where `out` is a transposed matrix.

    numpy walks down the columns of `values`. Where rows are a power of two long, as weights' are,
    a column's entries compete for the same few places of the cache. So tiles are converted into
    rows of an odd number of cache lines, and transposed from there while the cache holds them.
    """
    if not _is_turned(out):
        out[...] = values
        return
    num_rows, num_columns = out.shape
    itemsize = out.dtype.itemsize
    height = min(num_rows, _TURNED_ROWS)
    width = min(num_columns, max(_LINE, _TILE_BYTES // (height * itemsize)))
    pitch = (-(-width * itemsize // _LINE) | 1) * _LINE
    tile = np.empty((height, pitch // itemsize), out.dtype)
    bits = f"u{itemsize}"  # numpy copies its own types faster than those of extensions
    for row in range(0, num_rows, height):
        for column in range(0, num_columns, width):
            part = out[row : row + height, column : column + width]
            filled = tile[: part.shape[0], : part.shape[1]]
            filled[...] = values[row : row + height, column : column + width]
            part.view(bits)[...] = filled.view(bits)


def _is_turned(out: np.ndarray) -> bool:
    """Whether a matrix is stored column by column."""
    return out.ndim == 2 and out.size > 0 and 0 < out.strides[0] < out.strides[1]

"""Reader of a safetensors file's header: names, types, shapes and positions, never tensor data.

Follows the safetensors format (8 bytes of header length, a JSON header, then the tensors without
holes). The file is untrusted: the header is measured before it is parsed, because a small one can
otherwise demand gigabytes of Python objects.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import CheckpointError, UnsupportedError

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 512
MAX_DIMS = 16
MAX_DIM = 1 << 48
# Of the JSON text, before parsing. A tensor has 2 lists, 1 object and about 6 commas.
_MAX_BRACKETS = 3 * MAX_TENSORS + 100_000
_MAX_COMMAS = 10 * MAX_TENSORS

# safetensors type -> bytes of a value
ENCODINGS = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """Where one tensor lies. `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    offset: int
    nbytes: int


def read_safetensors(path: Path) -> dict[str, SafetensorsEntry]:
    """Read the header of a safetensors file.

    Raises:
        CheckpointError: The file is missing, truncated or damaged.
        UnsupportedError: A tensor has a type that is not known.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if prefix == b"version ":
                raise CheckpointError(
                    f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`"
                )
            if len(prefix) < 8:
                raise _damaged(path, f"it is truncated: it has only {size} bytes")
            length = struct.unpack("<Q", prefix)[0]
            if length > MAX_HEADER_BYTES:
                raise _damaged(
                    path, f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} is allowed"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path") from error
    if len(text) < length:
        raise _damaged(path, f"it is truncated: its header has {length} bytes, {len(text)} came")
    header = _parse(path, text)
    entries = [
        _entry(path, name, value, 8 + length)
        for name, value in header.items()
        if name != "__metadata__"
    ]
    _check_layout(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a valid safetensors file: {what}; download it again")


def _parse(path: Path, text: bytes) -> dict[str, object]:
    """The header as a dict, with its size bounded first and duplicate names refused."""
    if not text.startswith(b"{"):
        raise _damaged(path, "its header is not a JSON object")
    brackets = text.count(b"[") + text.count(b"{")
    if text.count(b'"data_offsets"') > MAX_TENSORS or brackets > _MAX_BRACKETS:
        raise _damaged(path, f"its header lists more than {MAX_TENSORS} tensors")
    if text.count(b",") > _MAX_COMMAS:
        raise _damaged(path, f"its header has more than {_MAX_COMMAS} values")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise _damaged(path, f"its header has {twice[:MAX_NAME_BYTES]!r} twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({str(error)[:200]})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    if len(header) > MAX_TENSORS + 1:
        raise _damaged(path, f"its header lists more than {MAX_TENSORS} tensors")
    return header


def _integers(value: object, limit: int) -> tuple[int, ...] | None:
    """A JSON list of integers from 0 to `limit`, or None."""
    if not isinstance(value, list):
        return None
    if not all(type(item) is int and 0 <= item <= limit for item in value):
        return None
    return tuple(value)


def _entry(path: Path, name: str, value: object, base: int) -> SafetensorsEntry:
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise _damaged(path, f"a tensor's name is longer than {MAX_NAME_BYTES} bytes")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r} needs dtype, shape and data_offsets")
    encoding = value["dtype"]
    if not isinstance(encoding, str) or encoding not in ENCODINGS:
        raise UnsupportedError(
            f"{path}: tensor {name!r} has the unknown dtype {str(encoding)[:40]!r}; "
            "use a checkpoint in BF16, F16 or F32"
        )
    shape = _integers(value["shape"], MAX_DIM)
    offsets = _integers(value["data_offsets"], 1 << 62)
    if shape is None or len(shape) > MAX_DIMS:
        raise _damaged(path, f"tensor {name!r} has an impossible shape")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"tensor {name!r} has impossible data_offsets")
    nbytes = math.prod(shape) * ENCODINGS[encoding]
    if offsets[1] - offsets[0] != nbytes:
        raise _damaged(
            path,
            f"tensor {name!r} of shape {shape} in {encoding} needs {nbytes} bytes, "
            f"its data_offsets hold {offsets[1] - offsets[0]}",
        )
    return SafetensorsEntry(name, shape, encoding, base + offsets[0], nbytes)


def _check_layout(path: Path, entries: list[SafetensorsEntry], base: int, size: int) -> None:
    """Tensors follow each other without holes or overlaps, and end where the file ends."""
    end, last = base, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            problem = "overlaps" if entry.offset < end else "leaves a hole after"
            raise _damaged(path, f"tensor {entry.name!r} {problem} {last}")
        end, last = entry.offset + entry.nbytes, f"tensor {entry.name!r}"
    if size < end:
        raise _damaged(path, f"it is truncated: its header promises {end} bytes, it has {size}")
    if size > end:
        raise _damaged(path, f"it has {size - end} bytes after the last tensor")

"""A converted model's folder: small files, an index of tensors, and Orbax checkpoints of arrays.

`jaxserve convert` writes it. The index comes last, so a folder that has one is whole. Its arrays
have Hugging Face's names and shapes; each Orbax checkpoint below `weights/` holds some of them.
Reading the index needs neither JAX nor Orbax.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.safetensors import ENCODINGS, MAX_DIM, MAX_DIMS, MAX_NAME_BYTES, MAX_TENSORS

INDEX = "jaxserve_weights.json"
VERSION = 1
WEIGHTS = "weights"  # folder of the Orbax checkpoints, which are named 00000, 00001, ...
MAX_INDEX_BYTES = 32 << 20
MAX_FILES = 100


@dataclass(frozen=True, slots=True)
class ConvertedEntry:
    """One tensor: its shape, its type by safetensors' name, and which checkpoint holds it."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    part: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ENCODINGS[self.encoding]


@dataclass(frozen=True, slots=True)
class ConvertedIndex:
    """What a converted folder holds."""

    files: tuple[str, ...]  # beside the index: configs, tokenizer
    entries: Mapping[str, ConvertedEntry]


def part_name(part: int) -> str:
    """The Orbax checkpoint's path in the folder."""
    return f"{WEIGHTS}/{part:05}"


def index_bytes(files: Sequence[str], entries: Sequence[ConvertedEntry]) -> bytes:
    """The index as it is written."""
    tensors = {e.name: {"shape": e.shape, "dtype": e.encoding, "part": e.part} for e in entries}
    value = {"version": VERSION, "files": list(files), "tensors": tensors}
    return json.dumps(value, separators=(",", ":")).encode()


def read_index(folder: Path) -> ConvertedIndex:
    """Read the index of a folder on this disk.

    Raises:
        CheckpointError, UnsupportedError: As `parse_index`, or it cannot be read.
    """
    path = folder / INDEX
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise _damaged(path, f"it is larger than {MAX_INDEX_BYTES} bytes")
        return parse_index(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path") from error


def parse_index(text: bytes, path: object) -> ConvertedIndex:
    """Check and read an index, which is not trusted.

    Raises:
        CheckpointError: It is damaged.
        UnsupportedError: A later version wrote it.
    """
    if len(text) > MAX_INDEX_BYTES or text.count(b"[") + text.count(b"{") > 3 * MAX_TENSORS:
        raise _damaged(path, "it is too large")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON ({str(error)[:200]})") from None
    version = value.get("version") if isinstance(value, dict) else None
    if type(version) is not int or version < 1:
        raise _damaged(path, "it has no version")
    if version > VERSION:
        raise UnsupportedError(
            f"{path} is of version {version}, this jaxserve reads up to {VERSION}; update "
            "jaxserve, or convert the model again"
        )
    files, tensors = value.get("files"), value.get("tensors")
    if not isinstance(files, list) or len(files) > MAX_FILES or not all(map(_is_plain, files)):
        raise _damaged(path, "its list of files is not one of plain names")
    if not isinstance(tensors, dict) or not tensors or len(tensors) > MAX_TENSORS:
        raise _damaged(path, "it lists no tensors, or too many")
    return ConvertedIndex(
        tuple(files), {name: _entry(path, name, entry) for name, entry in tensors.items()}
    )


def _is_plain(name: object) -> bool:
    """A file's name, which cannot lead out of its folder."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,254}", name) is not None


def _entry(path: object, name: str, value: Any) -> ConvertedEntry:
    shape = value.get("shape") if isinstance(value, dict) else None
    if (
        len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES
        or not isinstance(shape, list)
        or len(shape) > MAX_DIMS
        or not all(type(n) is int and 0 <= n <= MAX_DIM for n in shape)
        or value.get("dtype") not in ENCODINGS
        or type(value.get("part")) is not int
        or not 0 <= value["part"] < MAX_TENSORS
    ):
        raise _damaged(path, f"its entry of tensor {name[:200]!r} is impossible")
    return ConvertedEntry(name, tuple(shape), value["dtype"], value["part"])


def _damaged(path: object, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}; convert the model again")

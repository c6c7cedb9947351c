"""Reader of a GGUF file's header: metadata and tensor positions, never tensor data.

Follows the GGUF specification, versions 2 and 3, little-endian. A GGUF file is untrusted input:
every count, length and offset is checked against a hard limit and against the file's size before
anything is allocated, so a hostile header costs bounded time and memory. The one error that
leaves this module for a damaged file is `CheckpointError`.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxserve.errors import CheckpointError, UnsupportedError

MAX_TENSORS = 100_000
MAX_KEYS = 10_000
MAX_KEY_BYTES = 1 << 12  # also the limit of a tensor's name
MAX_STRING_BYTES = 1 << 24
MAX_ARRAY_ITEMS = 1 << 21  # of one array; vocabularies stay below 2**19
MAX_TOTAL_ARRAY_ITEMS = 1 << 22  # of all arrays of a file
MAX_METADATA_BYTES = 1 << 27
MAX_DIMS = 4  # what ggml can hold
MAX_DIM = 1 << 40
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_TENSOR_TAIL = struct.Struct("<IQ")  # encoding, offset
_BOOL, _STRING, _ARRAY = 7, 8, 9
# GGUF value type -> numpy dtype of a scalar
_SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
# ggml type id -> (name, values in a block, bytes of a block)
ENCODINGS: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

# A metadata value: a number, a string, a list of strings, or a numpy array of numbers.
type Metadata = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is outermost first, `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything before the tensor data of a GGUF file."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, GGUFTensor]
    chunks: tuple[Path, ...] = ()  # the files in which the bytes lie one after the other
    sizes: tuple[int, ...] = ()  # of the chunks


def read_gguf(path: Path, *chunks: Path) -> GGUFHeader:
    """Read the header of a GGUF file.

    Args:
        path: The file.
        chunks: Files in which its bytes go on, when it was cut; the header lies in the first.

    Raises:
        CheckpointError: The file is missing, truncated or damaged.
        UnsupportedError: A version, byte order or tensor type that is not implemented.
    """
    files = (path, *chunks)
    try:
        sizes = tuple(file.stat().st_size for file in files)
        with path.open("rb") as file:
            if sizes[0] == 0:
                raise CheckpointError(f"{path} is empty; download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Reader(path, data, sum(sizes)).header()
                return replace(header, chunks=files, sizes=sizes)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError | UnsupportedError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}; check the path") from error


class _Reader:
    """One pass over a header; `pos` is the next byte and never leaves the file."""

    def __init__(self, path: Path, data: mmap.mmap, file_size: int) -> None:
        self.path = path
        self.data = data
        self.size = len(data)  # what the header must lie in
        self.file_size = file_size  # with the chunks after this one
        self.pos = 0
        self.array_items = 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a valid GGUF file: {what} (at byte {self.pos}); download it again"
        )

    def take(self, nbytes: int, what: str) -> int:
        """Advance by `nbytes`; return where they start."""
        start = self.pos
        if nbytes > self.size - start:
            raise self.damaged(
                f"it is truncated: {what} needs {nbytes} bytes, {self.size - start} are left"
            )
        self.pos = start + nbytes
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.take(8, what))[0]

    def count(self, limit: int, what: str) -> int:
        number = self.u64(what)
        if number > limit:
            raise self.damaged(f"{what} is {number}, at most {limit} is allowed")
        return number

    def string(self, limit: int, what: str) -> str:
        length = self.count(limit, f"the length of {what}")
        start = self.take(length, what)
        try:
            return self.data[start : self.pos].decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8 text") from None

    def header(self) -> GGUFHeader:
        magic = self.data[self.take(min(4, self.size), "the magic number") : self.pos]
        if magic != b"GGUF":
            hint = "a git-lfs pointer; run `git lfs pull`" if magic == b"vers" else repr(magic)
            raise self.damaged(f"it starts with {hint}, not with b'GGUF'")
        version = self.u32("the version")
        if version not in (2, 3):
            if version in (2 << 24, 3 << 24):
                raise UnsupportedError(f"{self.path} is big-endian; use a little-endian GGUF file")
            raise UnsupportedError(
                f"{self.path} has GGUF version {version}; versions 2 and 3 are supported: "
                "convert the model again with a current converter"
            )
        num_tensors = self.count(MAX_TENSORS, "the number of tensors")
        num_keys = self.count(MAX_KEYS, "the number of metadata keys")
        metadata: dict[str, object] = {}
        for index in range(num_keys):
            key = self.string(MAX_KEY_BYTES, f"metadata key {index}")
            if key in metadata:
                raise self.damaged(f"metadata key {key!r} is there twice")
            metadata[key] = self.value(key)
            if self.pos > MAX_METADATA_BYTES:
                raise self.damaged(f"its metadata is larger than {MAX_METADATA_BYTES} bytes")
        tensors = self.tensors(num_tensors, self.alignment(metadata))
        return GGUFHeader(self.path, metadata, tensors)

    def value(self, key: str) -> object:
        kind = self.u32(f"the type of {key!r}")
        if kind == _STRING:
            return self.string(MAX_STRING_BYTES, f"the value of {key!r}")
        if kind == _ARRAY:
            return self.array(key)
        return self.scalars(kind, 1, key)[0].item()

    def scalars(self, kind: int, count: int, key: str) -> np.ndarray:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise self.damaged(f"{key!r} has type {kind}, which GGUF does not define")
        start = self.take(count * dtype.itemsize, f"the value of {key!r}")
        # A copy, because nothing may point into the map when it closes.
        raw = np.frombuffer(self.data[start : self.pos], np.uint8 if kind == _BOOL else dtype)
        return raw != 0 if kind == _BOOL else raw

    def array(self, key: str) -> list[str] | np.ndarray:
        kind = self.u32(f"the item type of {key!r}")
        count = self.count(MAX_ARRAY_ITEMS, f"the length of array {key!r}")
        self.array_items += count
        if self.array_items > MAX_TOTAL_ARRAY_ITEMS:
            raise self.damaged(f"its arrays hold more than {MAX_TOTAL_ARRAY_ITEMS} items")
        if kind == _ARRAY:
            raise self.damaged(f"{key!r} is an array of arrays, which no known key is")
        return self.strings(count, key) if kind == _STRING else self.scalars(kind, count, key)

    def strings(self, count: int, key: str) -> list[str]:
        """An array of strings: the hot loop (half a million merges), so written flat."""
        if count * 8 > self.size - self.pos:
            raise self.damaged(f"it is truncated: array {key!r} claims {count} strings")
        data, pos, unpack = self.data, self.pos, _U64.unpack_from
        end, items = min(self.size, MAX_METADATA_BYTES), []
        try:
            for _ in range(count):
                (length,) = unpack(data, pos)
                start = pos + 8
                pos = start + length
                if pos > end:
                    self.pos = start
                    raise self.damaged(f"a string of array {key!r} claims {length} bytes")
                items.append(data[start:pos].decode("utf-8"))
        except struct.error:
            self.pos = min(pos, self.size)
            raise self.damaged(f"it is truncated in array {key!r}") from None
        except UnicodeDecodeError:
            raise self.damaged(f"item {len(items)} of array {key!r} is not UTF-8 text") from None
        self.pos = pos
        return items

    def alignment(self, metadata: Metadata) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self.damaged(
                f"general.alignment is {value!r}; a power of two from 8 to {MAX_ALIGNMENT} is valid"
            )
        return value

    def tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        found: dict[str, GGUFTensor] = {}
        for index in range(count):
            tensor = self.tensor(index, alignment)
            if tensor.name in found:
                raise self.damaged(f"tensor {tensor.name!r} is there twice")
            found[tensor.name] = tensor
        # Offsets are stored relative to the end of the header, which is known only now.
        base = -(-self.pos // alignment) * alignment
        placed: dict[str, GGUFTensor] = {}
        end, last = base, "the header"
        for t in sorted(found.values(), key=lambda t: (t.offset, t.nbytes)):
            start = base + t.offset
            if start < end:
                raise self.damaged(f"tensor {t.name!r} overlaps {last}")
            end, last = start + t.nbytes, f"tensor {t.name!r}"
            if end > self.file_size:
                raise self.damaged(
                    f"it is truncated: tensor {t.name!r} ends at byte {end}, "
                    f"the file has {self.file_size}"
                )
            placed[t.name] = GGUFTensor(t.name, t.shape, t.encoding, start, t.nbytes)
        return placed

    def tensor(self, index: int, alignment: int) -> GGUFTensor:
        name = self.string(MAX_KEY_BYTES, f"the name of tensor {index}")
        num_dims = self.u32(f"the number of dimensions of {name!r}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.damaged(f"tensor {name!r} has {num_dims} dimensions, 1 to {MAX_DIMS} are")
        start = self.take(8 * num_dims, f"the shape of {name!r}")
        dims = struct.unpack_from(f"<{num_dims}Q", self.data, start)
        start = self.take(_TENSOR_TAIL.size, f"the type of {name!r}")
        kind, offset = _TENSOR_TAIL.unpack_from(self.data, start)
        if kind not in ENCODINGS:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} has the unknown ggml type {kind}; "
                "use a file quantised to Q8_0 or Q4_K_M"
            )
        encoding, block, block_bytes = ENCODINGS[kind]
        if not all(1 <= dim <= MAX_DIM for dim in dims):
            raise self.damaged(f"tensor {name!r} has shape {dims}; 1 to {MAX_DIM} is valid")
        if dims[0] % block:
            raise self.damaged(f"tensor {name!r}: {dims[0]} values are not whole {encoding} blocks")
        if offset % alignment:
            raise self.damaged(f"tensor {name!r}: offset {offset} is not a multiple of {alignment}")
        values = 1
        for dim in dims:
            values *= dim
        nbytes = values // block * block_bytes
        if offset + nbytes > self.file_size:
            raise self.damaged(f"it is truncated: tensor {name!r} needs {nbytes} bytes at {offset}")
        return GGUFTensor(name, tuple(reversed(dims)), encoding, offset, nbytes)

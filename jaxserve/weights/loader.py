"""Loading: checks that a checkpoint holds what a model wants, then places every parameter.

Parameters are made one after another, and shard after shard: the host holds at most one shard
beside what is already on the devices. A large parameter is filled on its device, a few layers or
rows at a time, by updates in place; so the host holds two such pieces, never the stack, and the
device transposes. On the CPU backend the finished host array *is* the device's (zero copy), so it
is 64-byte aligned and never touched again.
"""

import functools
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint import Checkpoint, Part, TensorInfo, WeightSource
from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.weights.dummy import dummy_weights
from jaxserve.weights.orbax import StoredArrays
from jaxserve.weights.reader import TensorFiles, copy_values, read_into, readable_encodings

MAX_PROBLEMS = 8  # named in an error; the others are counted
MAX_THREADS = 8
PIECE_BYTES = 64 << 20  # of a parameter that is filled on its device: read and sent at a time
SPLIT_BYTES = 4 << 20  # of a tensor that several threads read
_ALIGNMENT = 64  # what XLA wants to use a host buffer in place
_DERIVED = (r".*rotary_emb\.inv_freq",)  # buffers of old checkpoints; models compute them

type Progress = Callable[[int, int], None]
type Index = tuple[slice, ...]


def load_weights(
    checkpoint: Checkpoint,
    wanted: Mapping[str, WeightSource],
    *,
    dtype: np.typing.DTypeLike,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    load_format: str = "auto",
    seed: int = 0,
    ignored: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Read a model's parameters onto its devices.

    Args:
        checkpoint: Where the tensors are.
        wanted: Parameter name -> the tensors it is made of.
        dtype: Of every parameter whose source names no other.
        shardings: Of parameters; one without goes to the default device. Each process reads
            only the slices of its own devices.
        load_format: "dummy" makes random weights instead of reading.
        seed: Of dummy weights.
        ignored: Regular expressions: tensors of the checkpoint that no model reads.
        progress: Called with bytes done and bytes in all, in the parameters' dtype.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of the wrong shape: all in one error.
        UnsupportedError: Tensors are in an encoding that is not implemented.
    """
    target = np.dtype(dtype)
    places = shardings or {}
    if load_format == "dummy":
        return dummy_weights(wanted, dtype=target, shardings=places, seed=seed)
    check_weights(checkpoint, wanted, ignored)
    report = _Progress(wanted, target, progress)
    arrays = StoredArrays()
    weights = {}
    with TensorFiles() as files, ThreadPoolExecutor(_num_threads()) as pool:
        for name, source in wanted.items():
            wanted_dtype = np.dtype(source.dtype) if source.dtype else target
            maker = _Maker(checkpoint, source, wanted_dtype, files, arrays, pool, report)
            weights[name] = maker.place(places.get(name))
    report.finish()
    return weights


def check_weights(
    checkpoint: Checkpoint, wanted: Mapping[str, WeightSource], ignored: tuple[str, ...] = ()
) -> None:
    """Raise one error that names everything in which a checkpoint differs from a model."""
    skip = re.compile("|".join((*_DERIVED, *ignored)))
    used = {name for source in wanted.values() for name in source.names}
    # Where the config does not say, the model's own default decided whether a head is wanted.
    tied = bool(checkpoint.config.get("tie_word_embeddings", True))
    missing = sorted(used - checkpoint.tensors.keys())
    unexpected = sorted(
        name
        for name in checkpoint.tensors.keys() - used
        if not skip.fullmatch(name) and not (tied and name.endswith("lm_head.weight"))
    )
    problems = [
        *_listed("missing", missing),
        *_listed("unexpected", unexpected),
        *_listed("of the wrong shape", list(_wrong_shapes(checkpoint, wanted))),
    ]
    if problems:
        raise CheckpointError(
            f"model {checkpoint.name!r}: the weights do not fit its config: "
            f"{'; '.join(problems)}. Check that config.json belongs to these files"
        )
    encodings = readable_encodings()
    unknown = [
        f"{name} ({checkpoint.tensors[name].encoding})"
        for name in sorted(used)
        if not checkpoint.tensors[name].encodings.issubset(encodings)
    ]
    if unknown:
        listed = "".join(_listed("in an unsupported encoding", unknown))
        raise UnsupportedError(
            f"model {checkpoint.name!r}: {listed}. Supported: {', '.join(encodings)}"
        )


def _listed(problem: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - MAX_PROBLEMS} more" if len(names) > MAX_PROBLEMS else ""
        # Names come from a file: nothing in them may break the line or fill the screen.
        shown = (n[:200] if n.isprintable() else repr(n[:200]) for n in names[:MAX_PROBLEMS])
        yield f"{len(names)} {problem}: {', '.join(shown)}{more}"


def _wrong_shapes(checkpoint: Checkpoint, wanted: Mapping[str, WeightSource]) -> Iterator[str]:
    for source in wanted.values():
        expected = tensor_shape(source)
        for name in source.names:
            info = checkpoint.tensors.get(name)
            if info is not None and not _same_shape(info.shape, expected):
                yield f"{name} is {info.shape}, the config needs {expected}"


def _same_shape(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether they differ in leading axes of one at most."""
    depth = len(stored) - len(wanted)
    return depth >= 0 and stored[depth:] == wanted and math.prod(stored[:depth]) == 1


def tensor_shape(source: WeightSource) -> tuple[int, ...]:
    """The shape in the checkpoint of each tensor of a source."""
    depth = len(source.stack)
    if len(source.names) != math.prod(source.stack) or source.shape[:depth] != source.stack:
        raise ValueError(f"{len(source.names)} tensors cannot make {source}")
    shape = list(source.shape[depth:])
    if source.transpose:
        shape[-2:] = shape[:-3:-1]
    part = source.part
    if part is not None:
        axis = part_axis(part, shape)
        if shape[axis] != part.size:
            raise ValueError(f"{part} does not make {source}")
        shape[axis] = part.groups * part.group_size
    return tuple(shape)


def part_axis(part: Part, shape: Sequence[int]) -> int:
    """The axis of a tensor that a part is taken of; a vector has only one."""
    return part.axis if len(shape) > 1 else -1


class _Maker:
    """Makes one parameter."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: WeightSource,
        dtype: np.dtype,
        files: TensorFiles,
        arrays: StoredArrays,
        pool: ThreadPoolExecutor,
        report: "_Progress",
    ) -> None:
        shape = tensor_shape(source)
        self.infos = [replace(checkpoint.tensors[name], shape=shape) for name in source.names]
        self.source = source
        self.dtype = dtype
        self.files = files
        self.arrays = arrays
        self.pool = pool
        self.report = report

    def place(self, sharding: jax.sharding.Sharding | None) -> jax.Array:
        shape = self.source.shape
        if sharding is None:
            return self._shard(tuple(slice(0, n) for n in shape), None)
        shards: list[jax.Array] = []
        made: dict[tuple[tuple[int, int], ...], jax.Array] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            spans = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
            if spans in made:  # a replica: copy between devices instead of reading again
                shards.append(jax.device_put(made[spans], device))
                continue
            part = self._shard(tuple(slice(*span) for span in spans), device)
            # The transfer is finished before the next shard is allocated: that bounds the host.
            made[spans] = part.block_until_ready()
            shards.append(part)
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    def _shard(self, index: Index, device: Any) -> jax.Array:
        """One slice of the parameter on a device; None is the default one."""
        if not index or not fills_in_place(device):
            return jax.device_put(self.read(index), device)
        swap = self.source.transpose  # by the device: it is the host's slowest work
        axis = 0 if self.source.stack else self._row_axis(index)
        first = index[axis]
        shape = tuple(s.stop - s.start for s in index)
        row_bytes = math.prod(shape) // max(1, shape[axis]) * self.dtype.itemsize
        step = max(1, PIECE_BYTES // max(1, row_bytes))
        if step >= shape[axis] and not swap:
            return jax.device_put(self.read(index), device)
        filled = jnp.zeros(shape, self.dtype, device=device)
        sent: jax.Array | None = None
        for start in range(first.start, first.stop, step):
            span = slice(start, min(start + step, first.stop))
            piece = self.read((*index[:axis], span, *index[axis + 1 :]), as_stored=True)
            if sent is not None:  # its host buffer is free before the next but one is read
                sent.block_until_ready()
            sent = jax.device_put(piece, device)
            filled = _fill(filled, sent, np.int32(start - first.start), axis=axis, swap=swap)
        return filled

    def read(self, index: Index, *, as_stored: bool = False) -> np.ndarray:
        """One slice of the parameter as a new host array; `as_stored` leaves out the transpose."""
        shape = tuple(s.stop - s.start for s in index)
        swap = self.source.transpose
        if as_stored and swap:
            made = aligned_empty((*shape[:-2], shape[-1], shape[-2]), self.dtype)
            out = made.swapaxes(-1, -2)
        else:
            made = out = aligned_empty(shape, self.dtype)
        depth = len(self.source.stack)
        spans = self._spans(index[depth:])
        jobs = []
        for place in np.ndindex(shape[:depth]):
            number = 0
            for i, s, n in zip(place, index, self.source.stack, strict=False):
                number = number * n + i + s.start
            for part, target in spans:
                arguments = (self.infos[number], part, out[place][target])
                jobs.append(self.pool.submit(self._read_tensor, *arguments))
        for job in jobs:
            job.result()
        return made

    def _row_axis(self, index: Index) -> int:
        """The axis of a slice along which the tensor is stored row after row."""
        return max(0, len(index) - (1 if self.source.transpose else 2))

    def _spans(self, index: Index) -> list[tuple[Index, Index]]:
        """A tensor's slice in parts for several threads: of the tensor, and of the result."""
        shape = [s.stop - s.start for s in index]
        nbytes = math.prod(shape) * self.dtype.itemsize
        if len(shape) < 2 or nbytes <= SPLIT_BYTES:
            return [(index, (slice(None),) * len(shape))]
        axis = self._row_axis(index)
        # Many rows at a time, so that parts of a transposed array share few cache lines.
        step = -(-max(1, shape[axis] * SPLIT_BYTES // nbytes) // 128) * 128
        spans = []
        for start in range(0, shape[axis], step):
            stop = min(start + step, shape[axis])
            first = index[axis].start
            part = (*index[:axis], slice(first + start, first + stop), *index[axis + 1 :])
            spans.append((part, (slice(None),) * axis + (slice(start, stop),)))
        return spans

    def _read_tensor(self, info: TensorInfo, index: Index, out: np.ndarray) -> None:
        target = out
        if self.source.transpose:
            index, target = (*index[:-2], index[-1], index[-2]), out.swapaxes(-1, -2)
        part = self.source.part
        if part is None:
            self._read_into(info, index, target)
        else:
            self._read_part(info, part, index, target)
        self.report.add(out.nbytes)

    def _read_into(self, info: TensorInfo, index: Index, out: np.ndarray) -> None:
        if info.array is None:
            read_into(self.files, info, index, out)
        else:
            self.arrays.read_into(info, index, out)

    def _read_part(self, info: TensorInfo, part: Part, index: Index, out: np.ndarray) -> None:
        """Reads whole groups, then keeps what belongs to the part."""
        axis = part_axis(part, info.shape) + len(info.shape)
        wanted, width = index[axis], part.stop - part.start
        if part.groups == 1:
            span = slice(wanted.start + part.start, wanted.stop + part.start)
            self._read_into(info, (*index[:axis], span, *index[axis + 1 :]), out)
            return
        first, last = wanted.start // width, -(-wanted.stop // width)
        span = slice(first * part.group_size, last * part.group_size)
        shape = [*out.shape[:axis], span.stop - span.start, *out.shape[axis + 1 :]]
        whole = np.empty(shape, self.dtype)
        self._read_into(info, (*index[:axis], span, *index[axis + 1 :]), whole)
        grouped = whole.reshape(*shape[:axis], last - first, part.group_size, *shape[axis + 1 :])
        kept = np.moveaxis(grouped, axis + 1, 0)[part.start : part.stop]
        kept = np.moveaxis(kept, 0, axis + 1).reshape(
            *shape[:axis], (last - first) * width, *shape[axis + 1 :]
        )
        begin = wanted.start - first * width
        trim = slice(begin, begin + wanted.stop - wanted.start)
        copy_values(kept[(slice(None),) * axis + (trim,)], out)


def fills_in_place(device: Any) -> bool:
    """Whether a stack is filled on its device. On the CPU that would only be another copy."""
    return (jax.default_backend() if device is None else device.platform) != "cpu"


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("axis", "swap"))
def _fill(
    filled: jax.Array, piece: jax.Array, start: jax.typing.ArrayLike, *, axis: int, swap: bool
) -> jax.Array:
    piece = piece.swapaxes(-1, -2) if swap else piece
    return jax.lax.dynamic_update_slice_in_dim(filled, piece, start, axis)


class _Progress:
    """Counts bytes of parameters, from several threads."""

    def __init__(
        self, wanted: Mapping[str, WeightSource], dtype: np.dtype, call: Progress | None
    ) -> None:
        sizes = (int(np.prod(source.shape, dtype=np.int64)) for source in wanted.values())
        self.total = sum(sizes) * dtype.itemsize
        self.done = 0
        self.call = call
        self.lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        if self.call is not None:
            with self.lock:
                self.done += nbytes
                self.call(min(self.done, self.total), self.total)

    def finish(self) -> None:
        """Of several processes, each reads only its part: the end is reported all the same."""
        if self.call is not None and self.done < self.total:
            self.call(self.total, self.total)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that XLA's CPU backend can use without a copy."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT
    return raw[skip : skip + nbytes].view(dtype).reshape(shape)


def _num_threads() -> int:
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0))))

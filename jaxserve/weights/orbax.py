"""Arrays in Orbax checkpoints: written a part of a model at a time, read by the slice.

A checkpoint is an OCDBT store of Zarr v3 arrays, as `orbax.checkpoint` writes and restores it.
Reading goes through tensorstore, straight into the host buffer of one device's slice, and fetches
the chunks that the slice touches and no others, from a disk or a bucket.
"""

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.checkpoint import TensorInfo
from jaxserve.errors import CheckpointError
from jaxserve.weights.reader import store_values
from jaxserve.weights.safetensors import PLAIN

CHUNK_BYTES = 8 << 20  # what a read fetches at least; a device's slice is many of them
READ_VALUES = 1 << 22  # converted at a time, by each thread


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an Orbax checkpoint. `folder` must not exist; Orbax writes it whole or not at all."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=True,
        use_compression=False,  # weights hardly shrink, and unpacking would be slower than disks
    )
    options = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays}
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            folder.absolute(), args=ocp.args.PyTreeSave(dict(arrays), save_args=options)
        )


class StoredArrays:
    """The open arrays of a converted model; usable from several threads."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()
        self._context: Any = None

    def read_into(self, info: TensorInfo, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fill `out` with `array[index]`, converted to its dtype.

        Raises:
            CheckpointError: The array is not there, is damaged, or is not what the index says.
        """
        array = self._array(info)
        if out.dtype == PLAIN[info.encoding] or not out.ndim:
            self._copy(info, array[index], out)
            return
        rows = max(1, READ_VALUES // max(1, math.prod(out.shape[1:])))
        for start in range(0, len(out), rows):
            part = out[start : start + rows]
            first = index[0].start + start
            raw = np.empty(part.shape, PLAIN[info.encoding])
            self._copy(info, array[(slice(first, first + len(part)), *index[1:])], raw)
            store_values(raw, part, info)

    def _copy(self, info: TensorInfo, view: Any, out: np.ndarray) -> None:
        import tensorstore

        target = tensorstore.array(out, copy=False, write=True)
        if out.ndim:
            view = view[tensorstore.d[:].translate_to[0]]
        with _told(info):
            target.write(view.astype(target.dtype)).result()

    def _array(self, info: TensorInfo) -> Any:
        import tensorstore

        key = (info.array or "", info.stored_name)
        with self._lock:
            if key not in self._open:
                if self._context is None:
                    # No cache: every byte is read once.
                    self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
                with _told(info):
                    array = tensorstore.open(
                        {
                            "driver": "zarr3",
                            "kvstore": {
                                "driver": "ocdbt",
                                "base": info.array,
                                "path": f"{info.stored_name}/",
                            },
                        },
                        open=True,
                        read=True,
                        context=self._context,
                    ).result()
                # A model may see a tensor without its leading axes of one.
                lead = max(0, array.rank - len(info.shape))
                if set(array.shape[:lead]) <= {1}:
                    array = array[(0,) * lead]
                found = (tuple(array.shape), array.dtype.numpy_dtype)
                if found != (info.shape, PLAIN.get(info.encoding)):
                    raise CheckpointError(
                        f"{info.array}: array {info.name!r} is {found[0]} of {found[1]}, the index "
                        f"says {info.shape} in {info.encoding}; convert the model again"
                    )
                self._open[key] = array
            return self._open[key]


@contextmanager
def _told(info: TensorInfo) -> Iterator[None]:
    """Turns what tensorstore raises into one sentence about the array."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{info.array}: array {info.name!r} cannot be read "
            f"({str(error).partition(' [')[0][:300]}); check the place, or convert again"
        ) from None

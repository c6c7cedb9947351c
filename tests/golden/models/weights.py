"""Writes a checkpoint whose weights follow from a rule, so that no weights need be committed.

A case is a JSON file: `config` is the checkpoint's config.json, and `tensors` says of each tensor
its encoding, shape and two numbers. A float tensor is `a + b * u`, with u uniform in [-1, 1); a
tensor of bytes is uniform in [a, b). The stream of u depends on the case's seed and the tensor's
name only: raw integers of PCG64, whose output NumPy never changes.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# One tensor of a case: safetensors' name of its encoding, its shape, and the rule's two numbers.
Tensor = tuple[str, list[int], float, float]


def raw_integers(seed: int, name: str, count: int) -> np.ndarray:  # [count] uint64
    """Integers that depend on the seed and the name only."""
    return np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(count)


def tensor_bytes(seed: int, name: str, tensor: Tensor) -> bytes:
    """What the file holds for a tensor."""
    encoding, shape, a, b = tensor
    raw = raw_integers(seed, name, math.prod(shape))
    if encoding == "U8":
        return (int(a) + raw % np.uint64(b - a)).astype(np.uint8).tobytes()
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    values = (a + b * uniform).astype("<f4")
    if encoding == "F32":
        return values.tobytes()
    if encoding == "BF16":  # rounded to nearest, ties to even
        bits = values.view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    raise ValueError(f"no rule for encoding {encoding}")


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Writes name -> (encoding, shape, bytes) as one file (huggingface.co/docs/safetensors)."""
    header: dict[str, Any] = {}
    end = 0
    for name, (encoding, shape, data) in tensors.items():
        offsets = [end, end + len(data)]
        header[name] = {"dtype": encoding, "shape": shape, "data_offsets": offsets}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            file.write(data)


def write_checkpoint(case: dict[str, Any], folder: Path) -> None:
    """Writes config.json and model.safetensors of a case."""
    (folder / "config.json").write_text(json.dumps(case["config"], indent=2) + "\n")
    tensors = {
        name: (tensor[0], tensor[1], tensor_bytes(case["seed"], name, tensor))
        for name, tensor in case["tensors"].items()
    }
    write_safetensors(folder / "model.safetensors", tensors)

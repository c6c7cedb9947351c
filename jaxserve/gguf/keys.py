"""Typed access to a GGUF file's metadata: each error names the file and the key."""

import math

import numpy as np

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.gguf.header import GGUFHeader

MAX_LAYERS = 1 << 16  # of a per-layer list; more blocks than any file's tensors


class GGUFKeys:
    """The keys of one file; `key` is without the architecture's prefix."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self.values = header.metadata
        self.arch = str(header.metadata.get("general.architecture"))

    def __contains__(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.values

    def get(self, key: str) -> object:
        return self.values.get(f"{self.arch}.{key}")

    def integer(self, key: str, *, default: int | None = None, least: int = 1) -> int:
        """A whole number; a list with one number per layer counts if they are all the same."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, np.ndarray):
            raise UnsupportedError(
                f"{self.header.path}: {self.arch}.{key} differs from layer to layer, which is "
                "not supported; use a model with equal layers"
            )
        if type(value) is not int or not least <= value < 1 << 31:
            wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise self.wrong(key, value, wanted)
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type]
            raise self.wrong(key, value, "a positive number")
        return rounded(value)  # type: ignore[arg-type]

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def layer_flags(self, key: str, num_layers: int) -> list[bool] | None:
        """A list with one flag per layer, or None when there is none."""
        value = self.get(key)
        if not isinstance(value, np.ndarray):
            return None
        if value.dtype != np.bool_ or value.size != num_layers:
            raise self.wrong(key, value.tolist()[:8], f"a list of {num_layers} flags")
        return value.tolist()

    def wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        came = "is missing" if value is None else f"is {str(value)[:80]!r}"
        return CheckpointError(
            f"{self.header.path}: the key {self.arch}.{key} {came}, not {wanted}; "
            "convert the model again"
        )


def rounded(value: float) -> float:
    """Numbers are stored as float32: 9.999999747378752e-06 was 1e-05."""
    return float(f"{value:.7g}")

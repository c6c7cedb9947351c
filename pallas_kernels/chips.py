"""The chips that kernels are compiled for, by name: no device is asked while a step is traced."""

from dataclasses import dataclass
from typing import Any, Self

PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}  # jax names a device's platform by its vendor

# What jax calls each TPU generation: (device_kind, name of the generation).
_TPU_GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """A device as kernels know it. Static, hashable."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # jax's device_kind: "TPU v6 lite", "NVIDIA H100 80GB HBM3"
    compute_capability: str | None = None  # NVIDIA's, as "9.0"

    @classmethod
    def of(cls, device: Any) -> Self:
        """The chip of a jax device."""
        platform = str(device.platform)
        return cls(
            platform=PLATFORMS.get(platform, platform),
            kind=str(device.device_kind),
            compute_capability=getattr(device, "compute_capability", None),
        )

    @property
    def tpu_generation(self) -> str | None:
        """ "v5e", "v6e", "v5p", "tpu7x" or "v4"; None for another chip."""
        return _TPU_GENERATIONS.get(self.kind)

    @property
    def sm(self) -> int | None:
        """The compute capability as a number, 90 for "9.0"; None for a chip without one."""
        if self.compute_capability is None:
            return None
        major, _, minor = self.compute_capability.partition(".")
        return 10 * int(major) + int(minor or 0)

    def __str__(self) -> str:
        return f"{self.kind} ({self.platform})"


CPU = Chip(platform="cpu", kind="cpu")

"""The one device that an engine runs on, what it can hold, and the defaults that follow."""

import os
from dataclasses import dataclass
from typing import Any

import jax
import psutil

from jaxserve.errors import ConfigError

GIB = 1 << 30
CPU_KV_SHARE = 0.4  # of the free host memory
CPU_KV_LIMIT_BYTES = 4 * GIB


def prepare_backend(memory_utilization: float) -> None:
    """Sets what XLA reads when its backend starts; without effect once it has started."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{memory_utilization:.2f}")


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device, and how large steps on it are by default."""

    device: Any  # jax.Device, which type checkers do not know
    platform: str  # "cpu", "gpu" or "tpu"
    kind: str
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    scan_layers: bool  # see `benchmarks/layer_loop.py`

    @property
    def label(self) -> str:
        return f"{self.platform} ({self.kind})"

    def memory_limit_bytes(self, utilization: float) -> int | None:
        """Bytes that the engine may use in all; None on the CPU, where only KV is limited."""
        stats = None if self.platform == "cpu" else self.device.memory_stats()
        if stats is None or "bytes_limit" not in stats:
            return None
        # The GPU allocator's limit is already the fraction that `prepare_backend` asked for.
        share = 1.0 if self.platform == "gpu" else utilization
        return int(stats["bytes_limit"] * share)


def detect() -> DeviceInfo:
    """The first device that JAX sees."""
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        raise ConfigError(
            f"no device could be opened ({error}). Is another process using it? "
            "Set JAX_PLATFORMS=cpu to run on the CPU"
        ) from error
    name = str(device.platform)
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(name, name)
    if platform == "cpu":
        # Unrolled: a scan copies each layer's weights out of the stack at every step.
        return DeviceInfo(device, platform, device.device_kind, 16, 64, 512, False)
    if platform == "gpu":
        return DeviceInfo(device, platform, device.device_kind, 16, 256, 8192, True)
    tokens = 2048 if "v6" in device.device_kind.lower() else 1024
    return DeviceInfo(device, platform, device.device_kind, 32, 256, tokens, True)


def cpu_kv_bytes() -> int:
    """What the KV cache takes on a CPU by default: a share of the free memory, up to a limit."""
    return min(CPU_KV_LIMIT_BYTES, int(CPU_KV_SHARE * psutil.virtual_memory().available))

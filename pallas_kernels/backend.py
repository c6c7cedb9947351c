"""Which implementation of attention runs: chosen once, at start-up, and never in silence."""

import os
from dataclasses import dataclass
from typing import Literal

from pallas_kernels.chips import CPU, Chip
from pallas_kernels.types import AttentionSpec

AUTO_ORDER = ("tpu", "gpu", "xla")  # auto takes the first of these that does not refuse
BACKENDS = (*AUTO_ORDER, "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An implementation and the chip that it is compiled for. Static, hashable."""

    name: Literal["tpu", "gpu", "xla", "reference"]
    chip: Chip = CPU
    interpret: bool = False  # run a kernel of `chip` in Pallas' interpreter: slow, on any machine

    @property
    def is_kernel(self) -> bool:
        """Whether it runs a compiled Pallas kernel."""
        return self.name in ("tpu", "gpu") and not self.interpret


XLA = Backend(name="xla")
REFERENCE = Backend(name="reference")
# By name only, on any machine: to debug a kernel without its chip.
INTERPRETED = {
    "tpu-interpret": Backend(name="tpu", chip=Chip(platform="tpu", kind="TPU v6e"), interpret=True),
    "gpu-interpret": Backend(
        name="gpu",
        chip=Chip(platform="gpu", kind="NVIDIA H100", compute_capability="9.0"),
        interpret=True,
    ),
}

_INTERPRETER_THREADS = 4  # three warpgroups at most, and the program around them


class BackendRefused(ValueError):
    """A backend that was asked for by name cannot run here; the message says why."""


def why_not(name: str, spec: AttentionSpec, *, chip: Chip) -> str | None:
    """Why the backend cannot run this kind of layer on this chip, or None if it can.

    Raises BackendRefused for a name that is no backend's.
    """
    if name not in BACKENDS:
        allowed = ", ".join((*BACKENDS, *INTERPRETED))
        raise BackendRefused(f"no attention backend {name!r}: choose one of {allowed}")
    kv = spec.kv
    if kv.num_kv_heads < 1 or spec.num_heads % kv.num_kv_heads:
        return f"{spec.num_heads} query heads are not a multiple of {kv.num_kv_heads} kv heads"
    if kv.kind == "latent" and (kv.num_kv_heads != 1 or not 0 < kv.out_dim <= kv.head_dim):
        return (
            f"a latent cache has one kv head and a value within its row, not {kv.num_kv_heads} "
            f"heads and {kv.value_dim} of {kv.head_dim} columns"
        )
    if name in ("tpu", "gpu"):
        if chip.platform != name:
            return f"it needs a {name.upper()}, this is {chip}"
        if spec.chunked:
            return "attention within chunks"
        return _why_not_kernel(name, spec, chip)
    if name == "xla" and kv.head_dim % 8:
        return f"head_dim={kv.head_dim} is not a multiple of 8"
    return None


def _why_not_all(name: str, specs: tuple[AttentionSpec, ...], chip: Chip) -> str | None:
    """The first reason that speaks against one of the layers."""
    return next((why for spec in specs if (why := why_not(name, spec, chip=chip))), None)


def _why_not_kernel(name: str, spec: AttentionSpec, chip: Chip) -> str | None:
    if spec.alibi is not None:
        return "it knows no biases by distance (ALiBi)"
    if name == "tpu":
        from pallas_kernels import attention_tpu as kernels
    else:
        from pallas_kernels import attention_gpu as kernels
    return kernels.why_not(spec, chip)


def _why_not_interpreted(backend: Backend) -> str | None:
    """Why the interpreter could hang here: a GPU kernel's warpgroups wait for each other.

    Each blocks a thread of XLA's CPU client, and so does the program that runs the kernel.
    """
    num_threads = int(os.environ.get("NPROC") or len(os.sched_getaffinity(0)))
    if backend.name == "gpu" and num_threads < _INTERPRETER_THREADS:
        return (
            f"the interpreter of GPU kernels needs {_INTERPRETER_THREADS} threads of XLA, here are "
            f"{num_threads}: set NPROC={_INTERPRETER_THREADS} in the environment"
        )
    return None


def choose_backend(
    requested: str, *specs: AttentionSpec, chip: Chip
) -> tuple[Backend, dict[str, str]]:
    """The backend that can run all of a model's kinds of layers, and why others cannot.

    `requested` is "auto" or a backend's name. "reference" and the interpreted kernels,
    "tpu-interpret" and "gpu-interpret", run only when they are named.
    Raises BackendRefused if the named backend, or every one auto considers, cannot run.
    """
    reasons: dict[str, str] = {}
    for name in AUTO_ORDER if requested == "auto" else (requested,):
        backend = INTERPRETED.get(name)
        if backend is None:
            reason = _why_not_all(name, specs, chip)
            backend = Backend(name=name, chip=chip)  # pyright: ignore[reportArgumentType]
        else:
            reason = _why_not_interpreted(backend)
            reason = reason or _why_not_all(backend.name, specs, backend.chip)
        if reason is None:
            return backend, reasons
        reasons[name] = reason
    told = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
    raise BackendRefused(f"attention backend refused: {told}")

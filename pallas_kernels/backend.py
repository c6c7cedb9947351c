"""Which implementation of attention runs: chosen once, at start-up, and never in silence."""

from pallas_kernels.types import AttentionSpec

AUTO_ORDER = ("tpu", "gpu", "xla")  # auto takes the first of these that does not refuse
BACKENDS = (*AUTO_ORDER, "reference")


class BackendRefused(ValueError):
    """A backend that was asked for by name cannot run here; the message says why."""


def why_not(backend: str, spec: AttentionSpec, *, platform: str, device_kind: str) -> str | None:
    """Why `backend` cannot run this kind of layer on this device, or None if it can.

    `platform` is jax's name ("cpu", "gpu", "tpu"), `device_kind` the chip's ("NVIDIA H100").
    Raises BackendRefused for a name that is no backend's.
    """
    if backend not in BACKENDS:
        raise BackendRefused(f"no attention backend {backend!r}: choose one of {BACKENDS}")
    kv = spec.kv
    if kv.num_kv_heads < 1 or spec.num_heads % kv.num_kv_heads:
        return f"{spec.num_heads} query heads are not a multiple of {kv.num_kv_heads} kv heads"
    if backend in ("tpu", "gpu"):
        if platform != backend:
            return f"it needs a {backend.upper()}, this is {device_kind} ({platform})"
        return "no kernel in this version"
    if backend == "xla" and kv.head_dim % 8:
        return f"head_dim={kv.head_dim} is not a multiple of 8"
    return None


def choose_backend(
    requested: str, spec: AttentionSpec, *, platform: str, device_kind: str
) -> tuple[str, dict[str, str]]:
    """The backend to use, and why each one passed over refused.

    `requested` is "auto" or a backend's name; "reference" runs only when it is named.
    Raises BackendRefused if the named backend, or every one auto considers, cannot run.
    """
    reasons: dict[str, str] = {}
    for backend in AUTO_ORDER if requested == "auto" else (requested,):
        reason = why_not(backend, spec, platform=platform, device_kind=device_kind)
        if reason is None:
            return backend, reasons
        reasons[backend] = reason
    told = "; ".join(f"{backend!r}: {reason}" for backend, reason in reasons.items())
    raise BackendRefused(f"attention backend refused: {told}")

"""Tokens by their experts (MoE): shapes are checked here, the chosen backend computes."""

import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct

from pallas_kernels import quantized_matmul_gpu, quantized_matmul_tpu
from pallas_kernels.backend import AUTO_ORDER, BACKENDS, Backend, BackendRefused
from pallas_kernels.chips import Chip
from pallas_kernels.grouped_matmul_gpu import grouped_matmul_gpu
from pallas_kernels.grouped_matmul_reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul_tpu import grouped_matmul_tpu
from pallas_kernels.grouped_matmul_xla import grouped_matmul_xla
from pallas_kernels.quantized import QuantizedArray


def grouped_matmul(
    x: Array, weights: Array | QuantizedArray, group_sizes: Array, *, backend: Backend
) -> Array:
    """x [T, D], rows sorted by expert, each by its expert of weights [E, D, F] -> [T, F].

    The first group_sizes[0] rows go to expert 0, the next group_sizes[1] to expert 1, and so on
    (group_sizes [E] int32, any of them may be 0, sum at most T). No row is dropped; rows beyond
    the sum are padding, may hold anything, NaN included, and give zeros.
    Sums are float32, the output has x's type.

    Raises ValueError if shapes or dtypes do not fit, BackendRefused if the backend cannot run it.
    """
    if isinstance(weights, QuantizedArray):
        weights.check()
    elif weights.dtype != x.dtype:
        raise ValueError(f"weights of {weights.dtype} by x of {x.dtype}: expected the same")
    if x.ndim != 2 or len(weights.shape) != 3 or x.shape[1] != weights.shape[1]:
        raise ValueError(f"x {x.shape} by weights {weights.shape}: expected [T, D] by [E, D, F]")
    if x.dtype.name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"x of {x.dtype}: expected bfloat16, float16 or float32")
    if group_sizes.shape != weights.shape[:1] or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"group_sizes {group_sizes.dtype}{group_sizes.shape} of {weights.shape[0]} experts: "
            f"expected int32 [{weights.shape[0]}]"
        )
    reason = why_not(backend.name, weights, chip=backend.chip, x=x)
    if reason is not None:
        raise BackendRefused(f"grouped matmul backend {backend.name!r} refused: {reason}")
    if backend.name == "reference":
        return grouped_matmul_reference(x, weights, group_sizes)
    if backend.name == "gpu":
        return grouped_matmul_gpu(x, weights, group_sizes, backend=backend)
    if backend.name == "tpu":
        return grouped_matmul_tpu(x, weights, group_sizes, backend=backend)
    return grouped_matmul_xla(x, weights, group_sizes)


def why_not(
    name: str,
    weights: Array | QuantizedArray,
    *,
    chip: Chip,
    x: Array | ShapeDtypeStruct | None = None,
) -> str | None:
    """Why the backend cannot multiply by such experts on this chip, or None if it can.

    Looks at shapes and dtypes only; without `x` it is taken to be bfloat16.
    Raises BackendRefused for a name that is no backend's.
    """
    if name not in BACKENDS:
        raise BackendRefused(f"no matmul backend {name!r}: choose one of {BACKENDS}")
    if name in ("tpu", "gpu"):
        if chip.platform != name:
            return f"it needs a {name.upper()}, this is {chip}"
        if name == "tpu":
            return quantized_matmul_tpu.why_not(weights, chip=chip)
        return quantized_matmul_gpu.why_not(weights, chip=chip, x=x)
    return None


def choose_grouped_backend(
    requested: str,
    weights: Array | QuantizedArray,
    *,
    chip: Chip,
    x: Array | ShapeDtypeStruct | None = None,
) -> tuple[Backend, dict[str, str]]:
    """The backend to use for such experts, and why each one passed over refused.

    `requested` is "auto" or a backend's name. Raises BackendRefused if none can.
    """
    reasons: dict[str, str] = {}
    for name in AUTO_ORDER if requested == "auto" else (requested,):
        reason = why_not(name, weights, chip=chip, x=x)
        if reason is None:
            return Backend(name=name, chip=chip), reasons  # pyright: ignore[reportArgumentType]
        reasons[name] = reason
    told = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
    raise BackendRefused(f"grouped matmul backend refused: {told}")

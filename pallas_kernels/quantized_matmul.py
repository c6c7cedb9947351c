"""Activations by a quantized weight: shapes are checked here, the chosen backend computes."""

from typing import Literal

from jax import Array, ShapeDtypeStruct

from pallas_kernels import quantized_matmul_gpu, quantized_matmul_tpu
from pallas_kernels.backend import AUTO_ORDER, BACKENDS, Backend, BackendRefused
from pallas_kernels.chips import Chip
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.quantized_matmul_reference import quantized_matmul_reference
from pallas_kernels.quantized_matmul_xla import quantized_matmul_xla

Activations = Literal["keep", "dynamic"]


def quantized_matmul(
    x: Array,
    weight: QuantizedArray,
    *,
    backend: Backend,
    activations: Activations = "keep",
) -> Array:
    """x [T, D] @ weight [D, F] -> [T, F] in x's type, with sums in float32 (int32 for int8 x int8).

    x is bfloat16, float16 or float32. `activations` "keep" converts the weight to x's type;
    "dynamic" rounds x to 8 bits with a scale a token, to multiply 8 bits by 8 bits.
    A row of x that is not finite spoils its own row of the output only.

    Raises ValueError if shapes or dtypes do not fit, BackendRefused if the backend cannot run it.
    """
    weight.check()
    if x.ndim != 2 or len(weight.shape) != 2 or x.shape[1] != weight.in_dim:
        raise ValueError(f"x {x.shape} by a weight {weight.shape}: expected [T, D] by [D, F]")
    if x.dtype.name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"x of {x.dtype}: expected bfloat16, float16 or float32")
    if activations not in ("keep", "dynamic"):
        raise ValueError(f"activations {activations!r}: expected 'keep' or 'dynamic'")
    dynamic = activations == "dynamic"
    reason = why_not(backend.name, weight, chip=backend.chip, x=x, activations=activations)
    if reason is not None:
        raise BackendRefused(f"quantized matmul backend {backend.name!r} refused: {reason}")
    if backend.name == "reference":
        return quantized_matmul_reference(x, weight, dynamic_activations=dynamic)
    if backend.name == "gpu":
        return quantized_matmul_gpu.quantized_matmul_gpu(x, weight, backend=backend)
    if backend.name == "tpu":
        return quantized_matmul_tpu.quantized_matmul_tpu(
            x, weight, backend=backend, dynamic_activations=dynamic
        )
    return quantized_matmul_xla(x, weight, dynamic_activations=dynamic)


def why_not(
    name: str,
    weight: QuantizedArray,
    *,
    chip: Chip,
    x: Array | ShapeDtypeStruct | None = None,
    activations: Activations = "keep",
) -> str | None:
    """Why the backend cannot multiply by such a weight on this chip, or None if it can.

    Looks at shapes and dtypes only: `x` and `weight` may be made of ShapeDtypeStructs. The Hopper
    kernel is for few rows, so its answer depends on `x`; without, it is that of a few in bfloat16.
    Raises BackendRefused for a name that is no backend's.
    """
    if name not in BACKENDS:
        raise BackendRefused(f"no matmul backend {name!r}: choose one of {BACKENDS}")
    if name in ("tpu", "gpu"):
        if chip.platform != name:
            return f"it needs a {name.upper()}, this is {chip}"
        if name == "tpu":
            return quantized_matmul_tpu.why_not(weight, chip=chip)
        dynamic = activations == "dynamic"
        return quantized_matmul_gpu.why_not(weight, chip=chip, x=x, dynamic_activations=dynamic)
    return None


def choose_matmul_backend(
    requested: str,
    weight: QuantizedArray,
    *,
    chip: Chip,
    x: Array | ShapeDtypeStruct | None = None,
    activations: Activations = "keep",
) -> tuple[Backend, dict[str, str]]:
    """The backend to use for such x and weight, and why each one passed over refused.

    `requested` is "auto" or a backend's name. Raises BackendRefused if none can.
    """
    reasons: dict[str, str] = {}
    for name in AUTO_ORDER if requested == "auto" else (requested,):
        reason = why_not(name, weight, chip=chip, x=x, activations=activations)
        if reason is None:
            return Backend(name=name, chip=chip), reasons  # pyright: ignore[reportArgumentType]
        reasons[name] = reason
    told = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
    raise BackendRefused(f"quantized matmul backend refused: {told}")

"""Attention on NVIDIA GPUs: which kernels a chip gets, and whether there are any for a layer.

Hopper (compute capability 9.0) has kernels of its own, for TMA and wgmma: decode rows by
`attention_gpu_decode`. Mosaic GPU would compile them for any chip without a word and they would
fail there, so the architecture is checked here.
"""

from jax import Array

from pallas_kernels.attention_gpu_decode import attend_decode, why_not_decode
from pallas_kernels.backend import Backend, BackendRefused
from pallas_kernels.chips import Chip
from pallas_kernels.types import AttentionSpec, PageMetadata

_HOPPER = 90
_AMPERE = 80  # the first with bfloat16 mma.sync and cp.async


def why_not(spec: AttentionSpec, chip: Chip) -> str | None:
    """Why no GPU kernel can run this kind of layer on this chip, or None if one can."""
    if chip.sm is None:
        return f"it needs an NVIDIA GPU of known compute capability, this is {chip}"
    if chip.sm < _AMPERE:
        return (
            f"{chip} has compute capability {chip.compute_capability}, the kernels need 8.0 "
            "(Ampere) for bfloat16 tensor cores and asynchronous copies"
        )
    if chip.sm == _HOPPER:
        return why_not_decode(spec)
    return f"no kernel yet for compute capability {chip.compute_capability}"


def attend_gpu(
    q: Array,  # [T, N, H]
    kv_pages: Array,  # [L * num_pages, page_size, 2K, H], with this step's tokens written
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N]
) -> Array:
    """Attention of every token to its row's tokens up to itself: [T, N, H]. Padding gets zeros.

    Raises BackendRefused where `why_not` has a reason.
    """
    reason = why_not(spec, backend.chip)
    if reason is not None:
        raise BackendRefused(f"attention backend 'gpu' refused: {reason}")
    return attend_decode(q, kv_pages, pages, layer, spec=spec, backend=backend, sinks=sinks)

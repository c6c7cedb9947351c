"""Attention on NVIDIA GPUs: which kernels a chip gets, and whether there are any for a layer.

Hopper (compute capability 9.0) has kernels of its own, for TMA and wgmma: one of decode rows
(`attention_gpu_decode`) and one of all others (`attention_gpu_prefill`); of a latent cache the
first serves all rows (`attention_gpu_latent`). All rows on Ampere, Ada and Blackwell, and on Hopper
the others of a layer which the prefill kernel refuses, go by `mma.sync` (`attention_gpu_mma`).
Mosaic GPU would compile the Hopper kernels for any chip without a word and they would fail there,
so the architecture is checked here.

Caches of 8 bits are read as they are stored and widened to 16 bits on the multiprocessor
(`gpu_widen`); their scales are the caller's to fold in.

A step of decode rows alone launches the prefill kernel, too, which finds nothing to do: XLA would
have to bring a condition to the host to leave it out.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_gpu_decode import attend_decode, why_not_decode
from pallas_kernels.attention_gpu_latent import attend_latent
from pallas_kernels.attention_gpu_mma import attend_mma, why_not_mma
from pallas_kernels.attention_gpu_prefill import attend_prefill, why_not_prefill
from pallas_kernels.backend import Backend, BackendRefused
from pallas_kernels.chips import Chip
from pallas_kernels.gpu_widen import as_operand, hopper_operand_dtype
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
        reason = why_not_decode(spec)
        alone = spec.kv.kind == "latent"  # no other kernel has a part in it
        if reason is not None or alone or why_not_prefill(spec) is None:
            return reason
    return why_not_mma(spec, chip=chip)


def attend_gpu(
    q: Array,  # [T, N, H]
    kv_pages: Array,  # as `kv_pages_shape` says, with this step's tokens written
    pages: PageMetadata,
    layer: int | Array,
    *,
    spec: AttentionSpec,
    backend: Backend,
    sinks: Array | None = None,  # [N]
) -> Array:
    """Attention of every token to its row's tokens up to itself: [T, N, out_dim]; padding's is 0.

    Raises BackendRefused where `why_not` has a reason.
    """
    reason = why_not(spec, backend.chip)
    if reason is not None:
        raise BackendRefused(f"attention backend 'gpu' refused: {reason}")
    if backend.chip.sm != _HOPPER:
        return attend_mma(q, kv_pages, pages, layer, spec=spec, backend=backend, sinks=sinks)
    if spec.kv.kind == "latent":
        return attend_latent(q, kv_pages, pages, layer, spec=spec, backend=backend, sinks=sinks)
    if why_not_prefill(spec) is None:
        # Once for both, so that they hand on results of one type: XLA has the conversions beside
        # the scales of the cache.
        operand = as_operand(q, hopper_operand_dtype(spec.kv.dtype, q.dtype))
        out = attend_decode(
            operand, kv_pages, pages, layer, spec=spec, backend=backend, sinks=sinks
        )
        out = attend_prefill(
            operand, out, kv_pages, pages, layer, spec=spec, backend=backend, sinks=sinks
        )
        return out.astype(q.dtype)
    out = attend_decode(q, kv_pages, pages, layer, spec=spec, backend=backend, sinks=sinks)
    others = _without_decode_rows(pages)
    rest = attend_mma(q, kv_pages, others, layer, spec=spec, backend=backend, sinks=sinks)
    is_decode = jnp.arange(q.shape[0]) < pages.num_decode_rows
    return jnp.where(is_decode[:, None, None], out, rest)


def _without_decode_rows(pages: PageMetadata) -> PageMetadata:
    """The batch with decode rows that own no token: theirs, the first ones, are nobody's."""
    return dataclasses.replace(
        pages,
        query_starts=jnp.maximum(pages.query_starts, pages.num_decode_rows),
        num_decode_rows=jnp.zeros_like(pages.num_decode_rows),
    )

"""The one door to `pallas_kernels`: everything above sees this module and never a kernel."""

from dataclasses import dataclass

from jax import Array

from pallas_kernels.attention import paged_attention
from pallas_kernels.backend import XLA, Backend, choose_backend
from pallas_kernels.chips import Chip
from pallas_kernels.kv_write import kv_pages_shape
from pallas_kernels.self_check import verify
from pallas_kernels.types import AttentionSpec, KVSpec, PageMetadata

__all__ = [
    "XLA",
    "AttentionSpec",
    "Backend",
    "Chip",
    "KVSpec",
    "Kernels",
    "PageMetadata",
    "choose_backend",
    "kv_pages_shape",
    "verify",
]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The chosen implementation of each op, as static data that a layer holds."""

    attention_backend: Backend

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array | None,
        kv_pages: Array,
        pages: PageMetadata,
        layer: int | Array,
        spec: AttentionSpec,
        sinks: Array | None = None,  # [N] float32
    ) -> tuple[Array, Array]:
        """Writes k, v [T, K, H] into the cache, then attends with q [T, N, H].

        A latent cache has no v.

        Returns the attention output [T, N, H] and the cache, which is updated in place if donated.
        """
        return paged_attention(
            q,
            k,
            v,
            kv_pages,
            pages,
            layer,
            spec=spec,
            backend=self.attention_backend,
            sinks=sinks,
        )

    def grouped_matmul(self, x: Array, weights: Array, group_sizes: Array) -> Array:
        """x [T, D], sorted by expert, each row by its expert of weights [E, D, F] -> [T, F].

        The backend is chosen for the chip that attention was chosen for; beside interpreted
        kernels it is XLA, as no chip is there.
        """
        # Imported by who has experts: Pallas for TPU and GPU takes most of a second.
        from pallas_kernels.grouped_matmul import choose_grouped_backend, grouped_matmul

        backend = XLA
        if not self.attention_backend.interpret:
            backend, _ = choose_grouped_backend(
                "auto", weights, chip=self.attention_backend.chip, x=x
            )
        return grouped_matmul(x, weights, group_sizes, backend=backend)

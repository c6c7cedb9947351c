"""Grouped matmul on NVIDIA Hopper: visits of experts, by the kernel of `quantized_matmul_gpu`.

A group is cut into visits of up to `columns` rows. Their rows of x are copied next to each other,
the kernel multiplies each visit by its expert's weights as they are stored, and each row takes its
sums from where its visit left them. An expert without rows costs nothing but empty thread blocks.
Temporaries are [T + E * columns] rows at most, never [E, T].
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.backend import Backend
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.quantized_matmul_gpu import (
    RowVisits,
    make_tile,
    scales_follow,
    visit_products,
)


def grouped_matmul_gpu(
    x: Array, weights: Array | QuantizedArray, group_sizes: Array, *, backend: Backend
) -> Array:
    """x [T, D] sorted by expert, by its expert of weights [E, D, F] -> [T, F] in x's type."""
    T, F = x.shape[0], weights.shape[-1]
    if T == 0:
        return jnp.zeros((0, F), x.dtype)
    tile = make_tile(weights, num_rows=T)
    visits, visit_of_row, place = plan_row_visits(x, group_sizes, columns=tile.columns)
    sums = visit_products(visits, weights, tile, backend=backend)  # [V, columns, F]
    rows = sums[visit_of_row, place]  # [T, F]
    if isinstance(weights, QuantizedArray) and scales_follow(weights):
        scales = weights.scales[visits.experts[visit_of_row], 0]  # [T, F]
        rows = rows * scales.astype(jnp.float32)
    used = jnp.arange(T) < group_sizes.sum()
    return jnp.where(used[:, None], rows, 0).astype(x.dtype)


def plan_row_visits(
    x: Array, group_sizes: Array, *, columns: int
) -> tuple[RowVisits, Array, Array]:
    """The visits of x [T, D], and each row's visit [T] and place in it [T]; padding rows: any.

    At most ceil(T / columns) + min(E, T) visits.
    """
    T, E = x.shape[0], group_sizes.shape[0]
    V = -(-T // columns) + min(E, T)
    counts = -(-group_sizes // columns)  # [E]
    visit_ends = jnp.cumsum(counts)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    visit = jnp.arange(V, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(visit_ends, visit, side="right"), E - 1)
    first_visit = visit_ends - counts
    start = starts[expert] + (visit - first_visit[expert]) * columns  # [V]
    row = jnp.minimum(start[:, None] + jnp.arange(columns), T - 1)  # [V, columns]
    t = jnp.arange(T, dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(ends, t, side="right"), E - 1)
    offset = t - starts[owner]
    visits = RowVisits(
        num_visits=visit_ends[-1:].astype(jnp.int32),
        experts=expert.astype(jnp.int32),
        x=x[jnp.maximum(row, 0)],
    )
    return visits, jnp.minimum(first_visit[owner] + offset // columns, V - 1), offset % columns

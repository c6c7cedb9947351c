"""Grouped matmul on TPU (Pallas, Mosaic TPU): each expert's weights are read from HBM once a call.

x is cut into tiles of rows. A *visit* is a group in a tile: a group that starts inside a tile
shares it with the one before, and both visit it. The list of visits is made outside of the kernel
and prefetched into SMEM, and its length is the grid's: an expert without rows costs nothing.
Visits of a group follow each other, and so the strip of its weights (all inputs, some columns)
stays in VMEM for all of them. A visit multiplies the whole tile and stores its group's rows.
MegaBlocks (arXiv 2211.15841) has the idea of a list of tiles instead of padded groups.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import Backend
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.quantized_matmul_tpu import (
    Plan,
    Strip,
    compiler_params,
    interpreter,
    make_plan,
    operands,
    strip_products,
)

_MIN_ROWS, _MAX_ROWS = 32, 256  # of a tile; 32 is one register of 8-bit values


class Visits(NamedTuple):
    """Which group in which tile, in order of both; of V entries the first `num_visits` count."""

    num_visits: Array  # [] int32: those in use
    tiles: Array  # [V] int32
    experts: Array  # [V] int32: whose weights; of a tile without rows: any that is there already
    starts: Array  # [V] int32: first row of the group
    ends: Array  # [V] int32: one past its last row; start = end: nothing to multiply


def plan_visits(group_sizes: Array, *, rows: int, num_tiles: int) -> Visits:
    """The visits of groups of group_sizes [E] rows in tiles of `rows` rows.

    Tiles that no group reaches are visited once, to be cleared. At most num_tiles + E - 1 visits.
    """
    E = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    used = group_sizes > 0
    first = starts // rows
    counts = jnp.where(used, (ends - 1) // rows - first + 1, 0)
    num_used_tiles = -(-ends[-1] // rows)
    first = jnp.append(first, num_used_tiles)  # one more group: the tiles without rows
    counts = jnp.append(counts, num_tiles - num_used_tiles)
    visit_ends = jnp.cumsum(counts)
    visit = jnp.arange(num_tiles + E, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(visit_ends, visit, side="right"), E)
    last_used = jnp.max(jnp.where(used, jnp.arange(E), 0))
    return Visits(
        num_visits=visit_ends[-1].astype(jnp.int32),
        tiles=(first[group] + visit - (visit_ends - counts)[group]).astype(jnp.int32),
        experts=jnp.where(group < E, group, last_used).astype(jnp.int32),
        starts=jnp.append(starts, 0)[group].astype(jnp.int32),
        ends=jnp.append(ends, 0)[group].astype(jnp.int32),
    )


def tile_rows(num_rows: int, num_experts: int) -> int:
    """Rows a tile: about a group's mean size, a power of two within bounds."""
    mean = max(num_rows // num_experts, 1)
    return min(max(1 << (mean - 1).bit_length(), _MIN_ROWS), _MAX_ROWS)


def grouped_matmul_tpu(
    x: Array, weights: Array | QuantizedArray, group_sizes: Array, *, backend: Backend
) -> Array:
    """x [T, D] sorted by expert, by its expert of weights [E, D, F] -> [T, F] in x's type."""
    T, E, F = x.shape[0], weights.shape[0], weights.shape[-1]
    if T == 0:
        return jnp.zeros((0, F), x.dtype)
    rows = tile_rows(T, E)
    plan = make_plan(weights, num_rows=T, chip=backend.chip, dtype=x.dtype, tile_rows=rows)
    strip = Strip.of(weights)
    num_tiles = -(-T // rows)
    visits = plan_visits(group_sizes, rows=rows, num_tiles=num_tiles)
    parts, specs = operands(
        jnp.pad(x, ((0, num_tiles * rows - T), (0, 0))),
        weights,
        plan,
        tile=lambda f, v, tiles, *_: tiles[v],
        expert=lambda f, v, _tiles, experts, *_: experts[v],
    )
    out = pl.pallas_call(
        functools.partial(_kernel, plan=plan, strip=strip),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(-(-F // plan.columns), visits.num_visits),
            in_specs=specs,
            out_specs=pl.BlockSpec((rows, plan.columns), lambda f, v, tiles, *_: (tiles[v], f)),
        ),
        out_shape=jax.ShapeDtypeStruct((num_tiles * rows, F), x.dtype),
        compiler_params=compiler_params(backend.chip, ("parallel", "arbitrary")),
        interpret=interpreter(backend),
        name="grouped_matmul",
    )(visits.tiles, visits.experts, visits.starts, visits.ends, *parts)
    return out[:T]


def _kernel(
    tiles_ref: Any,
    experts_ref: Any,
    starts_ref: Any,
    ends_ref: Any,
    *refs: Any,
    plan: Plan,
    strip: Strip,
) -> None:
    del experts_ref  # for the index maps
    *inputs, out_ref = refs
    visit = pl.program_id(1)
    tile = tiles_ref[visit]
    start, end = starts_ref[visit], ends_ref[visit]

    @pl.when((visit == 0) | (tile != tiles_ref[jnp.maximum(visit - 1, 0)]))
    def clear() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(end > start)
    def multiply() -> None:
        for columns, product in strip_products(
            tuple(inputs), plan=plan, strip=strip, columns=out_ref.shape[1]
        ):
            row = tile * plan.rows + jax.lax.broadcasted_iota(jnp.int32, product.shape, 0)
            own = (row >= start) & (row < end)
            out_ref[:, columns] = jnp.where(own, product.astype(out_ref.dtype), out_ref[:, columns])

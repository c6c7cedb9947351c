"""Grouped matmul by XLA: a loop over tiles of rows, so that nothing is as large as [E, T, F].

`jax.lax.ragged_dot` is not used: XLA:CPU multiplies every row by every expert (jax 0.11.2: 16 times
the operations with 16 experts, and temporaries of [E, T, D] and twice [E, T, F]).

Two cores of a busy machine, float32, ms, least of 7: D x F of E experts and rows of x.

                        one row a tile    8 a tile    ragged_dot    every expert
    1024 x 512 of 64
             8 rows           3              11           378            310
           128 rows          30              37           499            315
    1024 x 2048 of 8
             2 rows           4              36           264            291
            32 rows          43             166           345            267
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.quantized_matmul_xla import quantized_matmul_xla

_ALONE = 4  # rows of an expert up to which each is multiplied alone, at a vector's speed
_MIN_ROWS, _MAX_ROWS = 8, 256


def grouped_matmul_xla(x: Array, weights: Array | QuantizedArray, group_sizes: Array) -> Array:
    """x [T, D] sorted by expert, by its expert of weights [E, D, F]. -> [T, F] in x's type.

    A group's tiles start at its first row. The last may reach into the next groups, whose own
    tiles come later and replace what it wrote there; rows of no group are cleared at the end.
    An expert without rows costs nothing, and a quantized expert is dequantized alone.
    """
    T, E, F = x.shape[0], weights.shape[0], weights.shape[-1]
    if T == 0:
        return jnp.zeros((0, F), x.dtype)
    rows = tile_rows(T, E)
    tiles = -(-group_sizes // rows)  # [E]
    tile_ends = jnp.cumsum(tiles)
    starts = jnp.cumsum(group_sizes) - group_sizes
    padded = jnp.pad(x, ((0, rows), (0, 0)))  # so that no slice is pushed back from the end

    def step(tile: Array, out: Array) -> Array:
        expert = jnp.searchsorted(tile_ends, tile, side="right")
        start = starts[expert] + (tile - (tile_ends - tiles)[expert]) * rows
        x_tile = jax.lax.dynamic_slice_in_dim(padded, start, rows)
        weight = jax.tree.map(lambda part: part[expert], weights)
        if isinstance(weight, QuantizedArray):
            product = quantized_matmul_xla(x_tile, weight)
        else:
            product = jnp.matmul(x_tile, weight, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(x.dtype), start, 0)

    out = jnp.zeros((T + rows, F), x.dtype)
    out = jax.lax.fori_loop(0, tile_ends[-1], step, out)[:T]
    return jnp.where((jnp.arange(T) < group_sizes.sum())[:, None], out, 0)


def tile_rows(num_rows: int, num_experts: int) -> int:
    """Rows a tile: one, or about a group's mean size, a power of two within bounds."""
    mean = num_rows // num_experts
    if mean <= _ALONE:
        return 1
    return min(max(1 << (mean - 1).bit_length(), _MIN_ROWS), _MAX_ROWS)

"""Random weights, for trying a model's config or speed without its checkpoint."""

import functools
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint import WeightSource


def dummy_weights(
    wanted: Mapping[str, WeightSource],
    *,
    dtype: np.dtype,
    shardings: Mapping[str, jax.sharding.Sharding],
    seed: int,
) -> dict[str, jax.Array]:
    """Norm weights of 1 and normal random weights of deviation 0.02, made on the devices.

    A parameter's values depend on the seed and its name only, not on how it is sharded.
    """
    weights = {}
    for name, source in wanted.items():
        sharding = shardings.get(name)
        own = np.dtype(source.dtype) if source.dtype else dtype
        if name.endswith("norm.weight"):
            weights[name] = jnp.ones(source.shape, own, device=sharding)
        else:
            salt = zlib.crc32(name.encode())
            make = _normal(source.shape, own, sharding)
            weights[name] = make(np.uint32(seed & 0xFFFFFFFF), np.uint32(salt))
    return weights


@functools.lru_cache(maxsize=64)
def _normal(
    shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> jax.stages.Wrapped:
    def make(seed: jax.Array, salt: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), salt)
        return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

    return jax.jit(make, out_shardings=sharding)

"""A decoder, split once into its structure and a plain list of arrays.

Walking a module's tree in every step would cost milliseconds of host time for a few hundred
leaves, so executables take the list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import Array

from jaxserve.checkpoint import WeightSource
from jaxserve.layers.kernels import Kernels
from jaxserve.models import registry
from jaxserve.models.decoder import Decoder
from jaxserve.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class SplitModel:
    """A decoder without its weights."""

    graph: nnx.GraphDef
    treedef: Any  # PyTreeDef
    names: tuple[str, ...]  # dotted path of each weight, in the order of the list
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    def merge(self, weights: list[Array]) -> Decoder:
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, weights))

    def sources(self, architecture: str, num_layers: int) -> dict[str, WeightSource]:
        """Where the checkpoint keeps each weight."""
        source: Callable[[str, tuple[int, ...], int], WeightSource]
        source = registry.FAMILIES[architecture].weight_source
        return {
            name: source(name, shape.shape, num_layers)
            for name, shape in zip(self.names, self.shapes, strict=True)
        }


def split_model(
    spec: DecoderSpec,
    *,
    page_size: int,
    kernels: Kernels,
    dtype: jax.typing.DTypeLike,
    scan_layers: bool,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> SplitModel:
    """Builds a decoder abstractly: no array is made. `kv_dtype` None stores `dtype`."""
    attention = spec.attention(page_size=page_size, dtype=kv_dtype or dtype)
    model = nnx.eval_shape(
        lambda: Decoder(
            spec, attention=attention, kernels=kernels, dtype=dtype, scan_layers=scan_layers
        )
    )
    graph, state = nnx.split(model)
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = tuple(
        ".".join(str(getattr(key, "key", key)) for key in path if hasattr(key, "key"))
        for path, _ in paths
    )
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in paths)
    return SplitModel(graph, treedef, names, shapes)

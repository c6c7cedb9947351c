"""A decoder, split once into its structure and a plain list of arrays.

Walking a module's tree in every step would cost milliseconds of host time for a few hundred
leaves, so executables take the list.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax import Array

from jaxserve.checkpoint import WeightSource
from jaxserve.layers.kernels import Kernels
from jaxserve.models.decoder import Decoder
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec, Section


@dataclass(frozen=True, slots=True)
class SplitModel:
    """A decoder without its weights."""

    graph: nnx.GraphDef
    sections: tuple[Section, ...]
    treedef: Any  # PyTreeDef
    names: tuple[str, ...]  # dotted path of each weight, in the order of the list
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    def merge(self, weights: list[Array]) -> Decoder:
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, weights))

    def sources(self, names: WeightNames, tensors: Collection[str]) -> dict[str, WeightSource]:
        """Where a checkpoint with these tensors keeps each weight."""
        prefix = names.prefix(tensors)
        found = {}
        for path, shape in zip(self.names, self.shapes, strict=True):
            source = names.source(path, shape.shape, sections=self.sections, prefix=prefix)
            found[path] = replace(source, dtype=shape.dtype.name)
        return found

    @property
    def num_parameters(self) -> int:
        """Weights, biases included; a tied head counts once."""
        return sum(shape.size for shape in self.shapes)


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
    model = nnx.eval_shape(
        lambda: Decoder(
            spec,
            page_size=page_size,
            kernels=kernels,
            dtype=dtype,
            kv_dtype=kv_dtype or dtype,
            scan_layers=scan_layers,
        )
    )
    graph, state = nnx.split(model)
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = tuple(
        ".".join(str(getattr(key, "key", key)) for key in path if hasattr(key, "key"))
        for path, _ in paths
    )
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in paths)
    return SplitModel(graph, spec.sections(scan=scan_layers), treedef, names, shapes)

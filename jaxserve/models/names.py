"""Where each weight of a decoder lies in a checkpoint: tables of Hugging Face's names."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from jaxserve.checkpoint import Part, WeightSource
from jaxserve.models.spec import Section


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One weight as a checkpoint keeps it."""

    name: str  # {e} stands for the expert's number, where each has a tensor of its own
    transpose: bool = False  # stored [out, in]: our matrices are [in, out]
    part: Part | None = None  # of a tensor that holds several weights
    prefixed: bool = True  # False: a top weight beside the base model, as heads are


def matrix(name: str, part: Part | None = None, *, prefixed: bool = True) -> Stored:
    """A projection that is stored [out, in], as torch.nn.Linear's are."""
    return Stored(name=name, transpose=True, part=part, prefixed=prefixed)


def plain(name: str, part: Part | None = None, *, prefixed: bool = True) -> Stored:
    """A vector, or a matrix that is stored as it is used."""
    return Stored(name=name, part=part, prefixed=prefixed)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """A family's tables: our dotted names -> the checkpoint's.

    A table may hold more than a model has: what its spec leaves out is never asked for.
    """

    top: Mapping[str, Stored]
    layer: Mapping[str, Stored]
    layers: str = "model.layers.{}."
    prefixes: tuple[str, ...] = ("",)  # that checkpoints of this family put before every name
    ignored: tuple[str, ...] = ()  # regular expressions: tensors that are not the decoder's

    def prefix(self, tensors: Collection[str]) -> str:
        """The first prefix under which the embedding is there; the first of all if none is."""
        name = self.top["embedding.weight"].name
        return next((p for p in self.prefixes if p + name in tensors), self.prefixes[0])

    def source(
        self, path: str, shape: tuple[int, ...], *, sections: tuple[Section, ...], prefix: str
    ) -> WeightSource:
        """Where the parameter `path` of the decoder comes from.

        `path` is dotted; that of a layer is "layers.{section}.{place in its period}.NAME", and its
        shape begins with the section's repeats if there are several.
        """
        if not path.startswith("layers."):
            stored = self.top[path]
            return _source(stored, shape, (prefix if stored.prefixed else "",), ())
        _, number, place, name = path.split(".", 3)
        section = sections[int(number)]
        numbers = range(section.first + int(place), section.stop, section.period)
        starts = tuple(prefix + self.layers.format(i) for i in numbers)
        stack = (section.repeats,) if section.is_stacked else ()
        return _source(self.layer[name], shape, starts, stack)


def _source(
    stored: Stored, shape: tuple[int, ...], starts: tuple[str, ...], stack: tuple[int, ...]
) -> WeightSource:
    names = tuple(start + stored.name for start in starts)
    if "{e}" in stored.name:
        num_experts = shape[len(stack)]
        stack = (*stack, num_experts)
        names = tuple(n.replace("{e}", str(e)) for n in names for e in range(num_experts))
    if len(names) != math.prod(stack):
        raise ValueError(f"{len(names)} tensors cannot make {stored} of shape {shape}")
    return WeightSource(
        names=names, stack=stack, shape=shape, transpose=stored.transpose, part=stored.part
    )

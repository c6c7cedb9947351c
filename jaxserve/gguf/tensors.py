"""The tensors of a GGUF model as Hugging Face tensors: names, slices and joins, no data."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError
from jaxserve.gguf.header import GGUFTensor
from jaxserve.gguf.names import Entry, Join, Names, names_of
from jaxserve.gguf.rope import ROPE_FACTORS
from jaxserve.model_index import Part, Piece, TensorInfo

MAX_TENSORS = 1 << 18  # that a checkpoint's tensors may become; DeepSeek-V3's are 46,000
MAX_SLICES = 4096  # experts or heads of one tensor
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_]+)(?:\.([0-9]{1,4}))?\.(weight|bias)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A GGUF tensor and the file, or the end of a chain of files, in which it lies."""

    tensor: GGUFTensor
    file: Path
    offset: int  # in `file`
    tail: tuple[Path, ...] = ()


def hf_tensors(placed: Iterable[Placed], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The Hugging Face tensors of a model.

    A GGUF tensor that the tables do not know keeps its name, so that loading reports it.

    Raises:
        CheckpointError: A shape contradicts the config, or two tensors have one name.
    """
    index = _Index(names_of(config), config)
    for item in placed:
        if item.tensor.name not in ROPE_FACTORS:
            index.add(item)
    index.join()
    return index.found


class _Index:
    """The tensors found so far."""

    def __init__(self, names: Names, config: Mapping[str, Any]) -> None:
        self.names = names
        self.config = config
        self.found: dict[str, TensorInfo] = {}
        self.sources: dict[tuple[str, str, str], TensorInfo] = {}  # (block, stem, kind), to join
        self.joined = {stem for join in names.joins for stem in join.sources}

    def put(self, info: TensorInfo) -> None:
        if info.name in self.found:
            raise CheckpointError(
                f"{info.file}: tensors {self.found[info.name].stored_name!r} and "
                f"{info.stored_name!r} are both {info.name!r}; download it again"
            )
        if len(self.found) >= MAX_TENSORS:
            raise CheckpointError(f"{info.file} makes more than {MAX_TENSORS} tensors")
        self.found[info.name] = info

    def add(self, item: Placed) -> None:
        tensor = item.tensor
        info = TensorInfo(
            name=tensor.name,
            shape=tensor.shape,
            file=item.file,
            offset=item.offset,
            nbytes=tensor.nbytes,
            encoding=tensor.encoding,
            tail=item.tail,
            stored_name=tensor.name,
        )
        match = _BLOCK.fullmatch(tensor.name)
        if match is None:
            stem, _, kind = tensor.name.rpartition(".")
            entry = self.names.top.get(stem)
            if entry is not None and kind in ("weight", "bias"):
                info = replace(_changed(info, entry, kind, self.config), name=_named(entry, kind))
            self.put(info)
            return
        block, stem, expert, kind = match.groups()
        if expert is not None:
            stem += "_exps"  # files of 2023: one tensor an expert
        entry = self.names.layer.get(stem)
        if entry is None and stem not in self.joined:
            self.put(info)
            return
        if entry is not None:
            info = _changed(info, entry, kind, self.config)
        if stem in self.joined and expert is None:
            self.sources[block, stem, kind] = info
        elif entry is not None:
            name = self.names.layers.format(block) + _named(entry, kind)
            if expert is None and "{e}" in name:
                for number, one in enumerate(_slices(info)):
                    self.put(replace(one, name=name.replace("{e}", str(number))))
            else:
                self.put(replace(info, name=name.replace("{e}", str(expert))))

    def join(self) -> None:
        """Make what is joined of the sources that are there."""
        for block, kind in dict.fromkeys((b, k) for b, _, k in self.sources):
            for join in self.names.joins:
                used = [(block, stem, kind) for stem in join.sources]
                if all(key in self.sources for key in used):
                    self.put(self._join(join, [self.sources[key] for key in used], block, kind))
                    continue
                for key in used:  # a source without the others: loading reports it
                    if key in self.sources:
                        self.put(self.sources[key])

    def _join(self, join: Join, sources: list[TensorInfo], block: str, kind: str) -> TensorInfo:
        groups, sizes = join.sizes(self.config)
        name = self.names.layers.format(block) + _named(join.to, kind)
        size, first = sum(sizes), sources[0]
        ndim = len(first.shape)
        axis = max(join.axis, -ndim)
        pieces: list[Piece] = []
        begins: dict[str, int] = {}  # where a source goes on that is named again
        start = 0
        for info, width in zip(sources, sizes, strict=True):
            part = Part(start=start, stop=start + width, group_size=size, groups=groups, axis=axis)
            start += width
            heads = len(info.shape) == 3 and join.axis == -2 and join.to.weight == ".weight"
            if heads and groups > 1:  # one matrix for each group
                pieces.extend(_one_a_group(info, part))
                continue
            if ndim == 1:
                part = replace(part, axis=-1)
            begin = begins.get(info.stored_name, 0)
            begins[info.stored_name] = begin + part.size
            if sources.count(info) > 1:
                info = _rows(info, begin, part.size)
            pieces.append(Piece(info=info, part=part))
        shape = _joined_shape(pieces, name)
        return TensorInfo(
            name=name,
            shape=shape,
            file=first.file,
            offset=first.offset,
            nbytes=sum(info.nbytes for info in {i.stored_name: i for i in sources}.values()),
            encoding=first.encoding,
            pieces=tuple(pieces),
            stored_name=first.stored_name,
        )


def _named(entry: Entry, kind: str) -> str:
    return entry.name + (entry.weight if kind == "weight" else entry.bias)


def _changed(info: TensorInfo, entry: Entry, kind: str, config: Mapping[str, Any]) -> TensorInfo:
    """With what the converter did to it, as its entry says."""
    shape = info.shape
    if entry.row and len(shape) == 1:
        info = replace(info, shape=(1, *shape))
    if entry.permuted is not None:
        heads = config[entry.permuted]
        if shape[0] % (2 * heads):
            raise CheckpointError(
                f"{info.file}: {info.stored_name!r} has {shape[0]} rows, which {heads} heads "
                "cannot share; download it again"
            )
        info = replace(info, permute_heads=heads)
    if kind == "bias":
        return info
    if entry.transposed and len(shape) > 1:
        info = replace(info, shape=(*shape[:-2], shape[-1], shape[-2]), transposed=True)
    return replace(info, shift=entry.shift) if entry.shift else info


def _slices(info: TensorInfo) -> Iterator[TensorInfo]:
    """One tensor for each entry of the first axis; rows are whole blocks, so each is a range."""
    if len(info.shape) < 2:
        raise CheckpointError(
            f"{info.file}: {info.stored_name!r} has one axis, several tensors were to lie on it; "
            "download it again"
        )
    if info.shape[0] > MAX_SLICES:
        raise CheckpointError(
            f"{info.file}: {info.stored_name!r} has {info.shape[0]} experts or heads, at most "
            f"{MAX_SLICES} are allowed; download it again"
        )
    nbytes = info.nbytes // info.shape[0]
    for number in range(info.shape[0]):
        offset = info.offset + number * nbytes
        yield replace(info, shape=info.shape[1:], offset=offset, nbytes=nbytes)


def _rows(info: TensorInfo, begin: int, count: int) -> TensorInfo:
    """A range of the rows of a matrix, or of a vector's entries."""
    total = info.shape[0]
    if begin + count > total:
        raise CheckpointError(
            f"{info.file}: {info.stored_name!r} has {total} rows, {begin + count} are needed by "
            "the file's own sizes; download it again"
        )
    nbytes = info.nbytes // total
    return replace(
        info,
        shape=(count, *info.shape[1:]),
        offset=info.offset + begin * nbytes,
        nbytes=count * nbytes,
    )


def _one_a_group(info: TensorInfo, part: Part) -> Iterator[Piece]:
    """The pieces of a stacked tensor whose every matrix makes the part in one group."""
    if info.shape[0] != part.groups:
        raise CheckpointError(
            f"{info.file}: {info.stored_name!r} has {info.shape[0]} matrices, {part.groups} are "
            "needed by the file's own sizes; download it again"
        )
    whole = part.groups * part.group_size
    for group, one in enumerate(_slices(info)):
        start, stop = (group * part.group_size + edge for edge in (part.start, part.stop))
        yield Piece(
            info=one, part=replace(part, start=start, stop=stop, group_size=whole, groups=1)
        )


def _joined_shape(pieces: list[Piece], name: str) -> tuple[int, ...]:
    """The shape of the whole; all pieces agree in it."""
    shapes = set()
    for piece in pieces:
        part, shape = piece.part, list(piece.info.shape)
        if shape[part.axis] != part.size:
            raise CheckpointError(
                f"{piece.info.file}: {piece.info.stored_name!r} has {shape[part.axis]} rows or "
                f"columns for {name}, {part.size} are needed by the file's own sizes; "
                "download it again"
            )
        shape[part.axis] = part.groups * part.group_size
        shapes.add(tuple(shape))
    if len(shapes) > 1:
        raise CheckpointError(
            f"{pieces[0].info.file}: the tensors that make {name} do not fit together "
            f"({sorted(shapes)}); download it again"
        )
    return shapes.pop()

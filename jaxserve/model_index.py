"""What a model on the disk consists of, in Hugging Face's terms: config, tensors, tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which rows (or columns) of a tensor that holds several weights make one of them.

    The axis is seen as `groups` groups of `group_size`; of each group, `start` to `stop` counts.
    Fused projections of queries, keys and values are one group, or one a (kv) head; gate and up
    that take turns are as many groups of 2 as there are columns.
    """

    start: int
    stop: int
    group_size: int
    groups: int = 1
    axis: int = -2  # of the stored tensor, from its end

    @property
    def size(self) -> int:
        """Rows of the weight."""
        return self.groups * (self.stop - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and how it is encoded; its name and shape are Hugging Face's."""

    name: str
    shape: tuple[int, ...]  # outermost first
    file: Path
    offset: int  # from the file's start
    nbytes: int
    encoding: str  # "F32", "F16", "BF16", "Q4_1", ...
    permute_heads: int | None = None  # rows are stored as rotated pairs of so many heads
    transposed: bool = False  # its last two axes are stored in the other order
    shift: float = 0.0  # to be added to the stored values
    tail: tuple[Path, ...] = ()  # files in which the bytes go on where `file` ends
    pieces: tuple["Piece", ...] = ()  # what it is joined of, instead of bytes of its own
    scales: "TensorInfo | None" = None  # where the scales of its values lie
    scale_block: tuple[int, int] = (1, 1)  # rows and columns that share a scale; not of MXFP4
    stored_name: str = ""  # in the file
    array: str | None = None  # URL of the Orbax checkpoint that has it, instead of bytes of `file`

    @property
    def encodings(self) -> set[str]:
        """All that must be known to read it."""
        return {piece.info.encoding for piece in self.pieces} or {self.encoding}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stored tensor, and the part of the joined one that it is."""

    info: TensorInfo
    part: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSource:
    """Where the tokenizer comes from: a folder, or the metadata of a GGUF file."""

    folder: Path | None = None
    gguf: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model as it lies on the disk, in Hugging Face's terms."""

    name: str
    config: dict[str, Any]  # config.json, with hf_overrides applied
    generation_config: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)  # empty: load_format "dummy"
    tokenizer: TokenizerSource | None = None
    chat_template: str | None = None

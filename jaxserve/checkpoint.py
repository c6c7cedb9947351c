"""A model reference (demo, folder, GGUF file, hub name) -> config, tokenizer source, tensor index.

Reads headers only and never tensor data, and never unpickles. `jaxserve.weights` turns the index
into arrays.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxserve import bucket, hub
from jaxserve.config import EngineConfig
from jaxserve.converted import INDEX, part_name, read_index
from jaxserve.errors import CheckpointError
from jaxserve.gguf.checkpoint import (
    PACKAGED,
    gguf_template,
    only_gguf,
    open_gguf,
    packaged_chunks,
    packaged_files,
    read_headers,
)
from jaxserve.hub_files import parse_name
from jaxserve.model_index import Checkpoint, Part, TensorInfo, TokenizerSource
from jaxserve.overrides import overridden, with_rope
from jaxserve.safetensors import read_safetensors
from jaxserve.scaled_tensors import with_scales

MAX_JSON_BYTES = 32 << 20  # of an index.json; everything else is smaller
MAX_JSON_ITEMS = 2_000_000  # lists, objects and commas: what a text can cost as Python objects
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


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


def open_configured(config: EngineConfig) -> Checkpoint:
    """`open_checkpoint` for an engine: fetched if need be, with the config's changes laid over it.

    Raises:
        CheckpointError, UnsupportedError: As `open_checkpoint`.
    """
    found = open_checkpoint(
        config.model,
        load_format=config.load_format,
        tokenizer=config.tokenizer,
        revision=config.revision,
        tokenizer_revision=config.tokenizer_revision,
        download_dir=config.download_dir,
        show_progress=config.show_progress,
    )
    changed = with_rope(found.config, scaling=config.rope_scaling, theta=config.rope_theta)
    return replace(found, config=overridden(changed, config.hf_overrides))


def open_checkpoint(
    model: str,
    *,
    load_format: str = "auto",
    hf_overrides: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    download_dir: str | None = None,
    show_progress: bool = False,
) -> Checkpoint:
    """Read the headers of a model.

    Args:
        model: "demo" or another packaged model, a Hugging Face or converted folder, a .gguf file
            (of a split model, any part), or (dummy weights) a config.json; the URL of a converted
            folder (gs://...); else a name on the hub, `org/name` or `org/name:Q4_K_M`, which is
            fetched.
        load_format: "auto", "safetensors", "gguf", "orbax", or "dummy" (config only, no tensors).
        hf_overrides: Values laid over config.json; sub-configs are merged.
        tokenizer: A folder, GGUF file or name on the hub to take the tokenizer and chat template
            from instead.
        revision: Of a model on the hub.
        tokenizer_revision: Of a tokenizer on the hub; None: `revision`, if it is the same name.
        download_dir: The hub's cache.
        show_progress: Whether to show how a download goes.

    Raises:
        CheckpointError: Something is missing or damaged.
        UnsupportedError: Something is well formed but not implemented.
    """
    path, name = _existing(model), parse_name(model)
    weights_url = None
    if bucket.is_bucket(model):
        path, name, weights_url = bucket.fetch(model), None, model
    elif path is None and name is not None:
        path = hub.fetch(
            name,
            revision=revision,
            download_dir=download_dir,
            load_format=load_format,
            show_progress=show_progress,
        )
    elif path is None:
        raise CheckpointError(
            f"model {model!r} does not exist; pass 'demo', a folder with config.json and "
            "safetensors files, a .gguf file, the name of a model on the hub (org/name), or "
            "gs:// and the folder of a converted model"
        )
    else:
        name = None
    try:
        found = _open_path(path, load_format, weights_url, packaged_chunks(model))
    except CheckpointError as error:
        if name is None:
            raise
        raise CheckpointError(f"{error} (from the hub's cache: delete it there first)") from None
    source, template = found.tokenizer, found.chat_template
    if tokenizer is not None:
        if tokenizer_revision is None and tokenizer == model:
            tokenizer_revision = revision
        source, template = _open_tokenizer(
            tokenizer, tokenizer_revision, download_dir, show_progress=show_progress
        )
    return Checkpoint(
        name=model if model in PACKAGED or name is not None else found.name,
        config=overridden(found.config, hf_overrides or {}),
        generation_config=found.generation_config,
        tensors={} if load_format == "dummy" else found.tensors,
        tokenizer=source,
        chat_template=template,
    )


def _open_path(
    path: Path, load_format: str, weights_url: str | None, chunks: tuple[Path, ...]
) -> Checkpoint:
    if load_format == "orbax" and not (path / INDEX).is_file():
        raise CheckpointError(
            f"{path} is not a converted model, which --load-format orbax needs; make one with "
            "`jaxserve convert`, or use --load-format auto"
        )
    if path.is_dir():
        path = only_gguf(path, load_format) or path
    if path.is_dir() or path.name == "config.json":
        return _open_folder(path, load_format, weights_url)
    return open_gguf(path, load_format, chunks)


def demo_path() -> Path:
    """The GGUF file of the packaged demo model, found without importing its package."""
    return packaged_files("demo")[0]


def _existing(reference: str) -> Path | None:
    """The file or folder that a user names, or None."""
    if reference in PACKAGED:
        return packaged_files(reference)[0]
    try:
        path = Path(reference).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # no such user, too long, no permission
        return None


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


def _open_folder(path: Path, load_format: str, weights_url: str | None) -> Checkpoint:
    folder = path.parent if path.name == "config.json" else path
    if load_format == "gguf":
        raise CheckpointError(f"{folder} holds no GGUF file; use --load-format auto")
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; pass a Hugging Face model folder or a .gguf file"
        )
    config = _read_json(config_path)
    tensors: Mapping[str, TensorInfo] = {}
    if load_format in ("auto", "orbax") and (folder / INDEX).is_file():
        tensors = _converted_tensors(
            folder, weights_url or f"file://{quote(str(folder.absolute()))}"
        )
    elif load_format != "dummy":
        tensors = with_scales(config, _folder_tensors(folder))
    generation = folder / "generation_config.json"
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return Checkpoint(
        name=folder.resolve().name,
        config=config,
        generation_config=_read_json(generation) if generation.is_file() else {},
        tensors=tensors,
        tokenizer=TokenizerSource(folder=folder) if has_tokenizer else None,
        chat_template=_folder_template(folder),
    )


def _converted_tensors(folder: Path, url: str) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(
            name=name,
            shape=entry.shape,
            file=folder / INDEX,
            offset=0,
            nbytes=entry.nbytes,
            encoding=entry.encoding,
            stored_name=name,
            array=f"{url.rstrip('/')}/{part_name(entry.part)}/",
        )
        for name, entry in read_index(folder).entries.items()
    }


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
        # Regular files only: opening a pipe would wait for ever.
        found = (path for path in sorted(folder.glob("*.safetensors")) if path.is_file())
        files = [single] if single.is_file() else list(found)
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


def _open_tokenizer(
    tokenizer: str, revision: str | None, download_dir: str | None, *, show_progress: bool
) -> tuple[TokenizerSource, str | None]:
    path, name = _existing(tokenizer), parse_name(tokenizer)
    if path is None and name is not None:
        path = hub.fetch(
            name,
            revision=revision,
            download_dir=download_dir,
            tokenizer_only=True,
            show_progress=show_progress,
        )
    if path is not None and path.is_file():
        header = read_headers(path, packaged_chunks(tokenizer))[0]
        return TokenizerSource(gguf=header.metadata), gguf_template(header)
    if path is not None and any((path / name).is_file() for name in _TOKENIZER_FILES):
        return TokenizerSource(folder=path), _folder_template(path)
    raise CheckpointError(
        f"tokenizer {tokenizer!r} does not exist; pass a folder with tokenizer.json, a .gguf file, "
        "or a name on the hub (org/name)"
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

"""Small files of a converted model in a bucket (gs://), brought to this disk.

The weights stay where they are: `jaxserve.weights.orbax` reads the slices that a device needs.
tensorstore, which comes with Orbax, does the transfer; it is imported when a bucket is named.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from jaxserve.converted import INDEX, parse_index
from jaxserve.errors import CheckpointError

SCHEMES = ("gs://", "s3://", "file://")
MAX_FILE_BYTES = 256 << 20  # tokenizer.json is the largest
TIMEOUT_S = 60.0


def is_bucket(reference: str) -> bool:
    """Whether a model's name is the URL of a folder in a bucket."""
    return reference.startswith(SCHEMES)


def fetch(url: str) -> Path:
    """Bring the index, configs and tokenizer of a converted model here, and return their folder.

    Raises:
        CheckpointError: The bucket cannot be read, or holds no converted model.
    """
    url = url.rstrip("/") + "/"
    store = _open(url)
    text = _read(store, INDEX, url)
    if text is None:
        raise CheckpointError(
            f"{url} holds no {INDEX}; only what `jaxserve convert` wrote is read from a bucket: "
            "convert the model, then copy the whole folder there"
        )
    index = parse_index(text, url + INDEX)
    folder = _cache() / hashlib.sha256(url.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.is_file() and old.name not in index.files:
            old.unlink()
    for name in index.files:
        data = _read(store, name, url)
        if data is None:
            raise CheckpointError(f"{url} lacks {name}, which its index lists; copy it again")
        _write(folder / name, data)
    _write(folder / INDEX, text)
    return folder


def _open(url: str) -> Any:
    try:
        import tensorstore
    except ImportError:
        raise CheckpointError(
            f"{url} needs the package tensorstore, which is not installed; "
            "`pip install tensorstore`, or copy the model to this disk"
        ) from None
    try:
        return tensorstore.KvStore.open(url).result(timeout=TIMEOUT_S)
    except (ValueError, TimeoutError, OSError) as error:
        raise _unreadable(url, error) from None


def _read(store: Any, name: str, url: str) -> bytes | None:
    """A file's bytes; None if it is not there."""
    try:
        found = store.read(name).result(timeout=TIMEOUT_S)
    except (ValueError, TimeoutError, OSError) as error:
        raise _unreadable(url, error) from None
    if found.state == "missing":
        return None
    if len(found.value) > MAX_FILE_BYTES:
        raise CheckpointError(f"{url}{name} is larger than {MAX_FILE_BYTES} bytes; check the file")
    return found.value


def _unreadable(url: str, error: Exception) -> CheckpointError:
    what = str(error).partition(" [")[0][:300] or type(error).__name__
    return CheckpointError(
        f"{url} cannot be read ({what}); check the URL, the network, and that this machine may "
        "read the bucket (for gs://: a service account, or `gcloud auth application-default login`)"
    )


def _cache() -> Path:
    root = os.environ.get("JAXSERVE_CACHE_DIR") or Path.home() / ".cache" / "jaxserve"
    return Path(root).expanduser() / "buckets"


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}; set JAXSERVE_CACHE_DIR to another folder"
        ) from error

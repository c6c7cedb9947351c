"""A model on the Hugging Face hub -> its files on this disk.

Only what is served is fetched (`hub_files`). `huggingface_hub` does the transfer, and reads
HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE; it is imported when something is fetched.
"""

import errno
import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from jaxserve.errors import CheckpointError
from jaxserve.hub_files import INDEX, HubName, Wanted, indexed_shards

MAX_FILES = 100_000  # of a repository
TIMEOUT_S = 30.0  # of the request for the list of files
WORKERS = 8
_HASH_BLOCK = 8 << 20
logger = logging.getLogger("jaxserve.hub")


def fetch(
    name: HubName,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    load_format: str = "auto",
    tokenizer_only: bool = False,
    show_progress: bool = True,
) -> Path:
    """Fetch what is missing of a model, and return its folder or its GGUF file.

    Without a network, or with HF_HUB_OFFLINE=1, what is in the cache is used.

    Args:
        name: Of the repository.
        revision: Branch, tag or commit; None: main.
        download_dir: The cache's folder; None: $HF_HUB_CACHE, else ~/.cache/huggingface/hub.
        load_format: As of `EngineConfig`; "dummy" fetches no weights.
        tokenizer_only: Fetch no weights and do not ask for any.
        show_progress: Whether to draw progress bars.

    Raises:
        CheckpointError: It cannot be had; the message says why and what to do.
    """
    from huggingface_hub import constants

    wanted = Wanted(name, load_format, tokenizer_only)
    source = _Source(name, revision, download_dir, show_progress)
    if constants.HF_HUB_OFFLINE:
        return _from_cache(source, wanted, "HF_HUB_OFFLINE is set")
    try:
        with _translated(name, revision):
            files = source.list()
    except _UnreachableError as error:
        logger.warning("%s; taking %s from the cache", error, name)
        return _from_cache(source, wanted, str(error))
    chosen = wanted.choose(files)
    with _translated(name, revision):
        folder = source.download([file for file in chosen if not file.endswith(".safetensors")])
        if INDEX in chosen:
            chosen = [*chosen, *indexed_shards(folder / INDEX, name)]
        folder = source.download(chosen)
    return _entry(folder, chosen)


class _UnreachableError(CheckpointError):
    """The hub does not answer, or not now."""


@dataclass(frozen=True, slots=True)
class _Source:
    """The transfer itself."""

    name: HubName
    revision: str | None
    download_dir: str | None
    show_progress: bool

    def list(self) -> list[str]:
        """The names of all files of the revision."""
        from huggingface_hub import HfApi

        api = HfApi(library_name="jaxserve")
        info = api.model_info(self.name.repo, revision=self.revision, timeout=TIMEOUT_S)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        if len(names) > MAX_FILES:
            raise CheckpointError(
                f"{self.name.repo} lists {len(names)} files, at most {MAX_FILES} are allowed; "
                "is this the right repository?"
            )
        return names

    def download(self, files: Sequence[str]) -> Path:
        """Fetch files into the cache; what is there stays. What is new is checked."""
        before = self._blobs()
        folder = self._snapshot(allow_patterns=[glob.escape(file) for file in files])
        _check_blobs(sorted(self._blobs() - before), self.name)
        absent = [file for file in files if not (folder / file).is_file()]
        if absent:
            raise CheckpointError(
                f"{self.name.repo} changed while it was fetched: {absent[0]} is gone; try again"
            )
        return folder

    def cached(self) -> Path:
        """The folder of the revision in the cache, complete or not."""
        return self._snapshot(allow_patterns=[], local_files_only=True)

    def _snapshot(self, **options: Any) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import tqdm

        class Silent(tqdm):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **(options | {"disable": True}))

        folder = snapshot_download(
            self.name.repo,
            revision=self.revision,
            cache_dir=self.download_dir,
            library_name="jaxserve",
            max_workers=WORKERS,
            tqdm_class=None if self.show_progress else Silent,
            **options,
        )
        return Path(folder)

    def _blobs(self) -> set[Path]:
        from huggingface_hub import constants

        cache = Path(self.download_dir or constants.HF_HUB_CACHE).expanduser()
        folder = cache / f"models--{self.name.repo.replace('/', '--')}" / "blobs"
        return {path for path in folder.glob("*") if not path.name.endswith(".incomplete")}


def _entry(folder: Path, chosen: Sequence[str]) -> Path:
    """What `open_checkpoint` is to open."""
    gguf = next((file for file in chosen if file.lower().endswith(".gguf")), None)
    return folder if gguf is None else folder / gguf


def _from_cache(source: _Source, wanted: Wanted, why: str) -> Path:
    """The same from the cache alone, if it has everything."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    at = "" if source.revision is None else f" at revision {source.revision!r}"
    remedy = "connect, unset HF_HUB_OFFLINE, or pass a folder"
    try:
        folder = source.cached()
    except (LocalEntryNotFoundError, OSError):
        raise CheckpointError(
            f"model {str(source.name)!r}{at} is not in the hub's cache, and {why}; {remedy}"
        ) from None
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    try:
        chosen = wanted.choose(files)
        if INDEX in chosen:
            chosen = [*chosen, *indexed_shards(folder / INDEX, source.name)]
        absent = [file for file in chosen if file not in files]
    except CheckpointError as error:
        raise CheckpointError(
            f"model {str(source.name)!r}{at} is in the hub's cache only in part ({error}), and "
            f"{why}; {remedy}"
        ) from None
    if absent:
        raise CheckpointError(
            f"model {str(source.name)!r}{at} is in the hub's cache only in part: {absent[0]} is "
            f"missing ({len(absent)} such files), and {why}; {remedy}"
        )
    return _entry(folder, chosen)


def _check_blobs(blobs: Sequence[Path], name: HubName) -> None:
    """The hub names a file by its digest (SHA-256, or git's SHA-1): what came must have it."""
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        for blob, sound in zip(blobs, pool.map(_is_sound, blobs), strict=True):
            if not sound:
                blob.unlink(missing_ok=True)
                raise CheckpointError(
                    f"a file of {name.repo} was damaged on its way: its digest is not "
                    f"{blob.name}; it was deleted, try again"
                )


def _is_sound(blob: Path) -> bool:
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", blob.name):
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    else:
        return True  # another server's own kind of name
    with blob.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest() == blob.name


@contextmanager
def _translated(name: HubName, revision: str | None) -> Iterator[None]:
    """What the hub's client raises, as one sentence that says what to do; never with a token."""
    from huggingface_hub import constants, errors

    # The client's HTTP library has changed its name before; this base class has not.
    bases: tuple[type[Any], ...] = errors.HfHubHTTPError.__mro__
    http_error: type[Exception] = next(c for c in bases if c.__name__ == "HTTPError")
    repo, hub = name.repo, _without_password(constants.ENDPOINT)
    token = "HF_TOKEN (or `hf auth login`)"
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its terms at {hub}/{repo}, then set {token} to a token of "
            "that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"model {repo!r} is neither a folder here nor a repository at {hub}; check the "
            f"spelling, and for a private one set {token}"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{repo} has no revision {revision!r}; pass a branch, tag or commit that {hub}/{repo} "
            "lists, or leave --revision out"
        ) from None
    except errors.HfHubHTTPError as error:
        raise _of_status(error.response.status_code, repo, hub, token) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, http_error) as error:
        cause = error.__cause__ or error
        if isinstance(cause, errors.HfHubHTTPError):
            raise _of_status(cause.response.status_code, repo, hub, token) from None
        kind = type(cause).__name__
        raise _UnreachableError(f"{hub} cannot be reached ({kind})") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"the disk is full while {repo} was fetched; free some space, or name another "
                "place with --download-dir (or HF_HOME)"
            ) from None
        if "onsistency check" in str(error):
            raise CheckpointError(
                f"a file of {repo} came with another size than the hub announced; try again"
            ) from None
        raise CheckpointError(
            f"{repo} cannot be stored ({error.strerror or type(error).__name__}"
            f"{f': {error.filename}' if error.filename else ''}); check --download-dir or HF_HOME"
        ) from None


def _of_status(status: int, repo: str, hub: str, token: str) -> CheckpointError:
    if status == 401:
        return CheckpointError(f"{hub} wants a valid token for {repo} (401); set {token}")
    if status == 403:
        return CheckpointError(
            f"{hub} denies access to {repo} (403): the token's account may not read it; set "
            f"{token} to one that may, with permission to read repositories"
        )
    if status == 429:
        return _UnreachableError(
            f"{hub} answers too many requests (429); wait, or set {token} for a higher limit"
        )
    if status >= 500:
        return _UnreachableError(f"{hub} is in trouble ({status}); try again later")
    return CheckpointError(f"{hub} answered {status} for {repo}; check the name and HF_ENDPOINT")


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

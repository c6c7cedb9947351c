"""JAX's persistent compilation cache, on by default, private and checked.

XLA runs what it finds there, so the folder is readable by its owner only, is keyed by versions and
CPU features, and each entry has a digest beside it: a damaged one is dropped and compiled anew.
"""

import hashlib
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import jax

UNSEALED_LIFETIME_S = 600.0  # an entry without a digest may be another process's, just written


def default_folder() -> Path:
    """$JAXSERVE_CACHE_DIR, else $XDG_CACHE_HOME/jaxserve, else ~/.cache/jaxserve."""
    given = os.environ.get("JAXSERVE_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve"


def enable(folder: str | None) -> Path | None:
    """Turns the cache on and drops damaged entries; returns its folder.

    A cache that the user has set up through JAX stays as it is. None if no folder can be made.
    """
    if folder is None and jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    root = Path(folder) if folder else default_folder() / "xla"
    path = root / f"{jax.__version__}-{version('jaxlib')}-{_cpu_key()}"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError:
        return None  # a read-only home: compile every time
    _drop_damaged(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def seal(path: Path | None) -> None:
    """Writes the digests of entries that have none yet."""
    if path is None:
        return
    for entry in path.glob("*-cache"):
        digest = entry.with_suffix(".sha256")
        if not digest.exists():
            temporary = digest.with_suffix(f".{os.getpid()}")
            temporary.write_text(_digest(entry))
            temporary.replace(digest)


def _drop_damaged(path: Path) -> None:
    for entry in path.glob("*-cache"):
        digest = entry.with_suffix(".sha256")
        if digest.exists():
            damaged = digest.read_text() != _digest(entry)
        else:
            damaged = time.time() - entry.stat().st_mtime > UNSEALED_LIFETIME_S
        if damaged:
            entry.unlink(missing_ok=True)
            digest.unlink(missing_ok=True)


def _digest(entry: Path) -> str:
    return hashlib.sha256(entry.read_bytes()).hexdigest()


def _cpu_key() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return hashlib.sha256(features.encode()).hexdigest()[:12]

"""The compilation cache: private, keyed, and never trusted blindly."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.runner import compile_cache

PROGRAM = """
import sys
import jax, numpy as np
from jaxserve.runner import compile_cache
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
folder = compile_cache.enable(sys.argv[1])
print(jax.jit(lambda x: x * 3.25 + 1)(np.arange(4.0, dtype=np.float32))[3], len(hits))
compile_cache.seal(folder)
print(folder)
"""


def run(folder: Path) -> tuple[float, int, Path]:
    """A process with the cache in `folder`: its result, the hits, the cache's own folder."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env={**env, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result, inner = done.stdout.splitlines()
    value, hits = result.split()
    return float(value), int(hits), Path(inner)


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    value, hits, folder = run(tmp_path)
    assert (value, hits) == (10.75, 0)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.glob("*-cache"))
    assert run(tmp_path)[:2] == (10.75, len(list(folder.glob("*-cache"))))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_entry_means_a_recompile(tmp_path: Path, damage: str) -> None:
    _, _, folder = run(tmp_path)
    for entry in folder.glob("*-cache"):
        raw = bytearray(entry.read_bytes())
        if damage == "flipped":
            raw[len(raw) // 2] ^= 0x40
        entry.write_bytes(
            raw if damage == "flipped" else raw[: len(raw) // 2 * (damage != "empty")]
        )
    assert run(tmp_path)[:2] == (10.75, 0)
    assert run(tmp_path)[:2] == (10.75, len(list(folder.glob("*-cache"))))


def test_entries_that_nobody_vouches_for_are_dropped_when_old(tmp_path: Path) -> None:
    entry = tmp_path / "jit_f-cache"
    entry.write_bytes(b"?")
    compile_cache._drop_damaged(tmp_path)
    assert entry.exists()  # another process may just have written it
    os.utime(entry, (0, 0))
    compile_cache._drop_damaged(tmp_path)
    assert not entry.exists()


def test_a_folder_that_cannot_be_made_turns_the_cache_off(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert compile_cache.enable(str(file)) is None

"""The command line as a process, and small sizes that compile quickly."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Engine flags: few shapes to compile, a small KV cache."""
    return [
        *("--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "16"),
        *("--num-gpu-blocks-override", "80", "--layer-loop", "scan"),
    ]


@pytest.fixture(scope="session")
def jaxserve() -> Run:
    """Runs `jaxserve ARGUMENTS` to its end."""

    def run(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jaxserve", *arguments],
            cwd=ROOT,
            env=os.environ | env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run

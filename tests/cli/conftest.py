"""The command line as a process, and small sizes that compile quickly."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxserve.checkpoint import Checkpoint, open_checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.request import Request
from tests.server.running import RunningServer, scripted

ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Engine flags: few shapes to compile, a small KV cache."""
    return [
        *("--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "16"),
        *("--num-gpu-blocks-override", "80", "--layer-loop", "scan"),
        *("--cudagraph-capture-sizes", "4"),
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


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return open_checkpoint("demo", load_format="dummy")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="session")
def server(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[RunningServer]:
    """A server whose model tells the length of the prompt."""

    def counted(request: Request, choice: int) -> str:
        return f"You have {len(request.prompt_token_ids)} tokens."

    running = scripted(checkpoint, tokenizer, counted, delay_s=0.002)
    yield running
    running.stop()

"""What the server's tests share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxserve.checkpoint import Checkpoint, open_checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer
from tests.server.running import Answer, RunningServer, scripted


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return open_checkpoint("demo", load_format="dummy")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


type Start = Callable[..., RunningServer]


@pytest.fixture
def start(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[Start]:
    """Starts servers over a script; they are stopped at the end of the test."""
    running: list[RunningServer] = []

    def begin(answer: Answer | str = "Hello there.", **options: Any) -> RunningServer:
        server = scripted(checkpoint, tokenizer, answer, **options)
        running.append(server)
        return server

    yield begin
    for server in running:
        server.stop()

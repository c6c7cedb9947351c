"""What the server's tests share."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from jaxserve import AsyncLLM
from jaxserve.checkpoint import Checkpoint, open_checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.server_config import ServerConfig
from tests.demo import DEMO
from tests.server.running import LIMITS, Answer, RunningServer, scripted


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return open_checkpoint("demo", load_format="dummy")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="session")
def real() -> Iterator[RunningServer]:
    """The demo model on its real engine, which takes seconds to start: one for all tests."""
    llm = AsyncLLM("demo", **DEMO)
    config = ServerConfig(port=0, enable_auto_tool_choice=True, tool_call_parser="hermes")
    running = RunningServer(llm, config)
    yield running
    running.stop()


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


@pytest.fixture(scope="module")
def idle(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[RunningServer]:
    """For requests that must be refused: a context of 100 tokens, no parser of calls."""
    running = scripted(checkpoint, tokenizer, "Hello.", max_model_len=100)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def http(idle: RunningServer) -> Iterator[httpx.Client]:
    with idle.http() as client:
        yield client


@pytest.fixture(scope="module")
def busy(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[RunningServer]:
    """With eight endless streams in the background; none of them may break."""
    running = scripted(
        checkpoint,
        tokenizer,
        "word ",
        ends=False,
        delay_s=0.02,
        max_model_len=100_000,
        server=ServerConfig(port=0, limits=LIMITS),
    )
    counts = [0] * 8
    ended = threading.Event()

    def read(i: int) -> None:
        body = {"model": "demo", "prompt": "go", "max_tokens": 99_000, "stream": True}
        with running.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                counts[i] += line.startswith("data: {")
                assert '"error"' not in line
                if ended.is_set():
                    return

    threads = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    while not all(counts):
        ended.wait(0.01)
    yield running
    before = list(counts)
    ended.wait(0.3)
    assert all(now > then for now, then in zip(counts, before, strict=True))
    ended.set()
    for thread in threads:
        thread.join(10)
    running.stop()

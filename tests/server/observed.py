"""Requests, steps and tools for the tests of what the server shows of itself."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jaxserve.checkpoint import Checkpoint, open_checkpoint
from jaxserve.client import Client
from jaxserve.config import EngineConfig
from jaxserve.frontend.request_state import RequestState
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.request import FinishReason, Request, RequestTimes, TokenDelta
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import StepStats
from tests.frontend.fake_engine import FakeEngine

EOS = 2


@cache
def demo() -> tuple[Checkpoint, Tokenizer]:
    checkpoint = open_checkpoint("demo", load_format="dummy")
    return checkpoint, load_tokenizer(checkpoint)


def make_client(answer: str, **engine: Any) -> tuple[Client, FakeEngine]:
    """A client whose engine answers every request with the same text."""
    checkpoint, tokenizer = demo()
    tokens = [*tokenizer.encode(answer), EOS]
    fake = FakeEngine(lambda request, choice: tokens, vocab_size=49_152, **engine)
    return Client(EngineConfig(), fake, checkpoint, tokenizer), fake


def run(client: Client, engine: FakeEngine, states: Sequence[RequestState]) -> None:
    """Steps until the requests have ended."""
    while not all(state.finished for state in states):
        engine.step()
        message = client.next_message(timeout_s=1)
        assert message is not None
        client.handle(message)


class Clock:
    """Seconds that a test moves on."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def new_state(
    name: str, *, prompt: int = 4, arrival_s: float = 100.0, max_tokens: int = 64, **sampling: Any
) -> RequestState:
    """A request with `prompt` tokens."""
    request = Request(
        request_id=name,
        prompt_token_ids=tuple(range(prompt)),
        sampling=SamplingParams(**sampling),
        max_tokens=max_tokens,
        eos_token_id=EOS,
        arrival_s=arrival_s,
    )
    return RequestState(request, request_id=name, prompt=None, tokenizer=None)


def new_delta(
    state: RequestState,
    *times: float,
    tokens: int = 1,
    choice: int = 0,
    reason: FinishReason | None = None,
    cached: int = 0,
) -> tuple[RequestState, TokenDelta]:
    """`tokens` new tokens, already in the state; times: scheduled, first token, last token."""
    delta = TokenDelta(
        state.request.request_id,
        choice,
        (7,) * tokens,
        finish_reason=reason,
        num_cached_tokens=cached,
        times=RequestTimes(state.request.arrival_s, *times),
    )
    state.add(delta)
    return state, delta


def new_stats(**figures: float) -> StepStats:
    """A step's figures, 0 but for those given."""
    zeros = {field.name: 0 for field in dataclasses.fields(StepStats)}
    return StepStats(**{**zeros, **figures})  # pyright: ignore[reportArgumentType]


def promtool(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Prometheus's own checker; the test is skipped, but not in CI, where there is none."""
    found = shutil.which("promtool") or shutil.which(str(Path(sys.prefix) / "bin" / "promtool"))
    if found is None:
        reason = "promtool is not installed (Debian: apt-get install prometheus)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return subprocess.run(
        [found, *arguments], input=text, capture_output=True, text=True, timeout=30, check=False
    )

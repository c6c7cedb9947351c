"""Servers for tests: the real application on a real socket, over a scripted or a real engine."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import httpx
import pytest

from jaxserve.async_llm import AsyncLLM
from jaxserve.checkpoint import Checkpoint
from jaxserve.client import Client
from jaxserve.config import EngineConfig
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.request import Request
from jaxserve.server.app import Application, make_app
from jaxserve.server.serve import open_socket, serve
from jaxserve.server_config import RequestLimits, ServerConfig
from tests.frontend.fake_engine import FakeEngine

MODEL = "demo"
EOS = 2
LIMITS = RequestLimits(header_timeout_s=1.0, body_timeout_s=1.0)


class RunningServer:
    """Serves from a thread until `stop`."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self.llm = llm
        self.app: Application = make_app(llm, config)
        self._sock: socket.socket = open_socket(config)
        self.port = 0 if config.uds else self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if not self._ready.wait(30):
            raise TimeoutError("the server did not start")

    def _run(self) -> None:
        async def main() -> None:
            self._task = asyncio.current_task()
            await serve(self.app, self._sock, on_ready=self._ready.set, handle_signals=False)

        try:
            self._loop.run_until_complete(main())
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    def stop(self) -> None:
        task = self._task
        if self._thread.is_alive() and task is not None:
            self._loop.call_soon_threadsafe(task.cancel)
        self._thread.join(30)
        self.llm.shutdown()

    def http(self, **options: Any) -> httpx.Client:
        """A plain client; tests of OpenAI's semantics use the `openai` package."""
        return httpx.Client(base_url=self.url, timeout=30, **options)


type Answer = Callable[[Request, int], str]


def scripted(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    answer: Answer | str,
    *,
    server: ServerConfig | None = None,
    config: Mapping[str, Any] | None = None,
    ends: bool = True,
    **engine: Any,
) -> RunningServer:
    """A server whose model says what a test wants.

    Args:
        answer: The text, or a function of the engine's request and the choice.
        config: Of `EngineConfig`, such as chat_template.
        ends: With the EOS token; else its last token is repeated for ever.
        engine: Of `FakeEngine`: delay_s, refuse_after, tokens_per_step, max_model_len.
    """

    def script(request: Request, choice: int) -> Sequence[int]:
        text = answer if isinstance(answer, str) else answer(request, choice)
        ids = tokenizer.encode(text, add_special_tokens=False)
        return [*ids, EOS] if ends else ids * 1000

    fake = FakeEngine(script, vocab_size=len(tokenizer), **engine)
    settings = EngineConfig(model=MODEL, load_format="dummy", **(config or {}))
    client = Client(settings, fake, checkpoint, tokenizer)
    fake.start()
    return RunningServer(AsyncLLM.from_client(client), server or ServerConfig(port=0))


def engine_of(server: RunningServer) -> FakeEngine:
    """The engine behind a scripted server."""
    engine = server.llm.client.engine
    assert isinstance(engine, FakeEngine)
    return engine


def prompt_of(server: RunningServer) -> str:
    """The last prompt that the engine got."""
    ids = engine_of(server).requests[-1].prompt_token_ids
    return server.llm.get_tokenizer().decode(list(ids), skip_special_tokens=False)


def kinds_of(events: Iterable[Any]) -> list[str]:
    """Types of events in order, without repeated deltas."""
    types = [event.type.removeprefix("response.") for event in events]
    return [kind for i, kind in enumerate(types) if i == 0 or types[i - 1] != kind]


def forced_call(request: Request, choice: int) -> str:
    """An answer that the schema of a forced call allows: a list of calls, or one's arguments."""
    listed = "array" in str(request.sampling.structured_outputs)
    return '[{"name": "weather", "parameters": {"city": "Oslo"}}]' if listed else '{"city": "Oslo"}'


def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Waits for what must come true soon."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def check_leaving(server: RunningServer, route: str, body: dict[str, Any], word: str) -> None:
    """A client that leaves an endless answer ends its request, unary and streaming.

    Args:
        word: In the first line of a stream that shows that tokens come.
    """
    engine = engine_of(server)
    for stream in (True, False):
        with server.http() as http:
            if stream:
                with http.stream("POST", route, json=body | {"stream": True}) as answer:
                    lines = answer.iter_lines()  # kept: its end would close the answer
                    next(line for line in lines if word in line)
                    assert engine.num_running == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post(route, json=body, timeout=0.3)
        until(lambda: engine.num_running == 0 and server.llm.client.num_unfinished == 0)


def check(answer: httpx.Response, status: int, code: str | None, param: str | None = None) -> None:
    """The oracle: status, shape, bounds."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert len(answer.content) <= 4096
    body = answer.json()
    if answer.request.url.path.startswith("/v1/messages"):  # Anthropic's shape, without codes
        assert set(body) == {"type", "error", "request_id"}
        assert set(body["error"]) == {"type", "message"}
        assert body["error"]["message"]
        return
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert body["error"]["code"] == code, body
    if param is not None:
        assert body["error"]["param"] == param, body

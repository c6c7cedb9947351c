"""Servers for tests: the real application on a real socket, over a scripted or a real engine."""

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from jaxserve.async_llm import AsyncLLM
from jaxserve.checkpoint import Checkpoint
from jaxserve.client import Client
from jaxserve.config import EngineConfig
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.request import Request
from jaxserve.server.app import Application, make_app
from jaxserve.server.serve import open_socket, serve
from jaxserve.server_config import ServerConfig
from tests.frontend.fake_engine import FakeEngine

MODEL = "demo"
EOS = 2


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
    ends: bool = True,
    **engine: Any,
) -> RunningServer:
    """A server whose model says what a test wants.

    Args:
        answer: The text, or a function of the engine's request and the choice.
        ends: With the EOS token; else its last token is repeated for ever.
        engine: Of `FakeEngine`: delay_s, refuse_after, tokens_per_step, max_model_len.
    """

    def script(request: Request, choice: int) -> Sequence[int]:
        text = answer if isinstance(answer, str) else answer(request, choice)
        ids = tokenizer.encode(text, add_special_tokens=False)
        return [*ids, EOS] if ends else ids * 1000

    fake = FakeEngine(script, vocab_size=len(tokenizer), **engine)
    config = EngineConfig(model=MODEL, load_format="dummy")
    client = Client(config, fake, checkpoint, tokenizer)
    fake.start()
    return RunningServer(AsyncLLM.from_client(client), server or ServerConfig(port=0))

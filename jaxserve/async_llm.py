"""`AsyncLLM`: the asynchronous Python interface, one stream of outputs a request."""

import asyncio
import logging
import threading
import weakref
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any, Self

from jaxserve.client import Client, open_client, shut_down_with
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineDeadError
from jaxserve.frontend.engine_args import engine_config
from jaxserve.frontend.prompts import ParsedPrompt, Prompt
from jaxserve.frontend.request_state import RequestState
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import EngineOutput, StepStats

logger = logging.getLogger(__name__)

LONG_TEXT_CHARS = 20_000  # tokenized in a thread, for it would hold up the event loop


class _Mailbox:
    """Wakes the one consumer of a stream, in whichever event loop that runs."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.news = asyncio.Event()


class OutputStream:
    """The outputs of prompts that run, as they come: (index of the prompt, output).

    Iterate once; `close` aborts what still runs, and must be called at the end.
    """

    def __init__(self, llm: "AsyncLLM") -> None:
        self._llm = llm
        self._mailbox = _Mailbox()
        self._states: list[RequestState] = []

    def add(self, state: RequestState) -> None:
        """One more prompt. What came for it already is found by the first `take`."""
        self._states.append(state)
        self._llm._listen(state, self._mailbox)

    async def __aiter__(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        running = list(enumerate(self._states))
        while running:
            for entry in tuple(running):
                index, state = entry
                output = state.take()
                if output is None:
                    continue
                if output.finished:
                    running.remove(entry)
                yield index, output
            if running:
                await self._mailbox.news.wait()
                self._mailbox.news.clear()

    def close(self) -> None:
        """Abort what still runs; without effect after the last output."""
        for state in self._states:
            self._llm._unlisten(state)
            self._llm.client.cancel(state)


class AsyncLLM:
    """Loads a model and streams from it; requests run together.

    A reader thread takes the engine's messages and turns tokens into text; event loops are only
    woken, once a step. A consumer that is slow gets several tokens in one output.

    Args:
        model: "demo", a Hugging Face folder, or a .gguf file.
        arguments: As `LLM`'s.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: As `LLM`.
    """

    def __init__(self, model: str = "demo", **arguments: Any) -> None:
        self._bind(open_client(engine_config(model, arguments)))

    @classmethod
    def from_engine_args(cls, config: EngineConfig) -> Self:
        """The same from an `EngineConfig`."""
        return cls.from_client(open_client(config))

    @classmethod
    def from_client(cls, client: Client) -> Self:
        """The same over a client that runs already; `shutdown` stops it."""
        llm = cls.__new__(cls)
        llm._bind(client)
        return llm

    def _bind(self, client: Client) -> None:
        self.client = client
        shut_down_with(self, client)
        self.config = client.config
        self.vocab_size = client.vocab_size
        self.hidden_size = client.hidden_size
        self.max_model_len = client.max_model_len
        self._mailboxes: dict[str, _Mailbox] = {}  # by the engine's request id
        self._lock = threading.Lock()
        # The thread must not keep alive an AsyncLLM that nobody holds any more.
        self._reader = threading.Thread(
            target=_read, args=(weakref.ref(self), client), name="jaxserve-reader", daemon=True
        )
        self._reader.start()

    async def generate(
        self,
        prompt: Prompt | ParsedPrompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        lora_request: object | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Continue one prompt; outputs come as the tokens do.

        What each output holds follows `sampling_params.output_kind`. Closing the generator, or
        cancelling its task, aborts the request.

        Raises:
            RequestError: The request is refused.
            EngineDeadError: The engine stopped.
        """
        sampling = sampling_params or self.get_default_sampling_params()
        self.client.check_health()
        parsed = await self.parse(prompt)
        await self.prepare(sampling)
        stream = self.submit(
            [parsed],
            sampling,
            request_id=request_id,
            priority=priority,
            lora_request=lora_request,
        )
        try:
            async for _, output in stream:
                yield output
        finally:
            stream.close()

    async def parse(self, prompt: Prompt | ParsedPrompt, **options: Any) -> ParsedPrompt:
        """A prompt as tokens; a long text is tokenized in a thread, off the event loop.

        Raises:
            RequestError: As `Processor.parse`, whose options these are.
        """
        if isinstance(prompt, ParsedPrompt):
            return prompt
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if isinstance(text, str) and len(text) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self.client.processor.parse, prompt, **options)
        return self.client.processor.parse(prompt, **options)

    async def prepare(self, sampling: SamplingParams) -> None:
        """Does what `submit` would hold the event loop up with: it compiles a grammar, if any.

        Raises:
            RequestError: The grammar is refused.
        """
        compiling = self.client.begin_grammar(sampling)
        if compiling is not None:  # `submit` finds it done
            await asyncio.wrap_future(compiling)

    def submit(
        self,
        prompts: Sequence[ParsedPrompt],
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        lora_request: object | None = None,
        stream_interval: int = 1,
        pools: bool = False,
    ) -> "OutputStream":
        """Hand prompts to the engine at once; all of them, or none if one is refused.

        Raises:
            RequestError: A prompt is refused, or the queue is full.
            EngineDeadError: The engine stopped.
        """
        stream = OutputStream(self)
        try:
            for prompt in prompts:
                stream.add(
                    self.client.submit(
                        prompt,
                        sampling,
                        request_id=request_id,
                        priority=priority,
                        lora_request=lora_request,
                        stream_interval=stream_interval,
                        pools=pools,
                    )
                )
        except BaseException:
            stream.close()
            raise
        return stream

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput]:
        """Answer a conversation; as `generate` otherwise.

        Raises:
            RequestError: At once, when the template refuses the messages.
        """
        prompt = self.client.render_chat(
            messages, chat_template_kwargs, add_generation_prompt=add_generation_prompt, **options
        )
        return self.generate(prompt, sampling_params, request_id, priority=priority)

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """End requests; their streams get a last output with finish_reason "abort"."""
        self._wake(self.client.abort(request_id))

    def fail_all(self, error: Exception) -> int:
        """End every request with an error that its stream raises; returns how many there were."""
        failed = self.client.fail_all(error)
        self._wake(failed)
        return len(failed)

    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine has stopped."""
        self.client.check_health()

    @property
    def is_running(self) -> bool:
        return self.client.dead_error is None

    @property
    def dead_error(self) -> EngineDeadError | None:
        return self.client.dead_error

    def get_tokenizer(self) -> Tokenizer:
        """Raises RequestError with skip_tokenizer_init."""
        return self.client.require_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """A fresh copy of what `generate` uses without sampling_params."""
        return self.client.processor.default_sampling_params()

    async def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix."""
        return self.client.engine.reset_prefix_cache()

    def summary(self) -> dict[str, object]:
        """Facts about the engine: model, device, memory, sizes."""
        return self.client.engine.summary()

    def engine_stats(self) -> list[StepStats]:
        """Figures of the engine's latest steps (10,000 at most), oldest first."""
        return list(self.client.recent_stats)

    def shutdown(self) -> None:
        """Stop the engine; streams that run end with EngineDeadError. May be called again."""
        self.client.shutdown()
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _listen(self, state: RequestState, mailbox: _Mailbox) -> None:
        with self._lock:
            self._mailboxes[state.request.request_id] = mailbox

    def _unlisten(self, state: RequestState) -> None:
        with self._lock:
            self._mailboxes.pop(state.request.request_id, None)

    def _wake(self, states: Sequence[RequestState]) -> None:
        """Tell the consumers that there is something to take; one call a loop."""
        with self._lock:
            found = [self._mailboxes.get(state.request.request_id) for state in states]
        _ring(mailbox for mailbox in found if mailbox is not None)

    def _wake_all(self) -> None:
        with self._lock:
            found = list(self._mailboxes.values())
        _ring(found)


def _ring(mailboxes: Iterable[_Mailbox]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for mailbox in mailboxes:
        by_loop.setdefault(mailbox.loop, []).append(mailbox.news)
    for loop, events in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_all, events)
        except RuntimeError:  # that loop is closed, and its consumers with it
            logger.debug("the event loop of %d requests is closed", len(events))


def _set_all(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        event.set()


def _read(owner: "weakref.ref[AsyncLLM]", client: Client) -> None:
    """The reader thread: every message of the engine, until it ends."""
    while True:
        message = client.engine.outbox.get()
        try:
            states = client.handle(message)
        except Exception as error:  # else every consumer would wait for ever
            logger.exception("the reader of the engine's messages stopped")
            message = EngineOutput(deltas=(), error=f"{type(error).__name__}: {error}")
            states = client.handle(message)
        llm = owner()
        if llm is not None and message.error is not None:
            llm._wake_all()  # also those that a shutdown has failed already
        elif llm is not None:
            llm._wake(states)
        if message.error is not None:
            return
        del llm

"""Text in, text out: binds the frontend to the engine.

The engine's messages are read in one place only: by the caller's thread (`LLM`), or by a reader
thread (`AsyncLLM`). Either hands each message to `Client.handle`.
"""

import atexit
import itertools
import logging
import queue
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, EngineDeadError, RequestError, UnsupportedError
from jaxserve.frontend.chat import RESERVED_KWARGS
from jaxserve.frontend.matchers import MatcherFactory
from jaxserve.frontend.observers import Observers, notify
from jaxserve.frontend.processor import Processor, grammar_vocabulary
from jaxserve.frontend.prompts import ParsedPrompt, Prompt
from jaxserve.frontend.request_state import RequestState
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.request import Abort, Request, TokenDelta
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.step import EngineOutput, StepStats

if TYPE_CHECKING:
    from jaxserve.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

MAX_TEMPLATE_BYTES = 1 << 20
MAX_STATS = 10_000  # steps


class EngineLike(Protocol):
    """What the client needs of an engine."""

    vocab_size: int
    hidden_size: int
    max_model_len: int
    outbox: queue.SimpleQueue[EngineOutput]

    @property
    def num_late_compiles(self) -> int: ...

    def start(self) -> None: ...
    def submit(self, request: Request) -> None: ...
    def abort(self, command: Abort) -> None: ...
    def shutdown(self) -> None: ...
    def summary(self) -> dict[str, object]: ...
    def reset_prefix_cache(self) -> bool: ...


class Client:
    """Submits prompts and turns the engine's messages into outputs.

    Thread-safe, but for `handle`, which belongs to the one reader of the outbox.

    Attributes:
        recent_stats: Of the engine's latest steps, oldest first.
        observers: Told what happens to requests.
    """

    def __init__(
        self,
        config: EngineConfig,
        engine: EngineLike,
        checkpoint: "Checkpoint",
        tokenizer: Tokenizer | None,
        matchers: MatcherFactory | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self._matchers = matchers
        self.tokenizer = tokenizer
        self.vocab_size = engine.vocab_size
        self.hidden_size = engine.hidden_size
        self.max_model_len = engine.max_model_len
        self.processor = Processor(
            config, checkpoint, tokenizer, engine.vocab_size, engine.max_model_len
        )
        self.recent_stats: deque[StepStats] = deque(maxlen=MAX_STATS)
        self.observers = Observers()
        self._numbers = itertools.count()
        self._states: dict[str, RequestState] = {}  # by the engine's id
        self._lock = threading.Lock()
        self._dead: str | None = None
        self._closed = False

    def submit(
        self,
        prompt: Prompt | ParsedPrompt,
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        lora_request: object | None = None,
        output_kind: RequestOutputKind | None = None,
        stream_interval: int = 1,
        pools: bool = False,
    ) -> RequestState:
        """Check a request and hand it to the engine.

        Args:
            request_id: The user's; need not be unique. None: a number.
            output_kind: Overrules the sampling parameters'.
            stream_interval: See `RequestState`.
            pools: Give the last token's hidden state, and no new token.

        Raises:
            RequestError: It is refused; every other request goes on.
            EngineDeadError: The engine has stopped.
        """
        try:
            state = self._admit(
                prompt,
                sampling,
                request_id=request_id,
                priority=priority,
                lora_request=lora_request,
                output_kind=output_kind,
                stream_interval=stream_interval,
                pools=pools,
            )
        except Exception as error:
            notify(self.observers.refused, error, None)
            raise
        notify(self.observers.submitted, state)  # before the engine can answer
        try:
            self.engine.submit(state.request)
            self.check_health()  # it may have died between the check and the submission
        except BaseException as error:
            if self._forget(state):
                notify(self.observers.refused, error, state)
            raise
        return state

    def handle(self, message: EngineOutput) -> list[RequestState]:
        """Take one message of the engine; returns the requests that have something new."""
        if message.stats is not None:
            self.recent_stats.append(message.stats)
        changed: dict[str, RequestState] = {}
        events: list[tuple[RequestState, TokenDelta]] = []
        finished: list[RequestState] = []
        for delta in message.deltas:
            state = self._states.get(delta.request_id)
            if state is None:
                continue  # aborted here, while this was on its way
            self._add(state, delta)
            events.append((state, delta))
            changed[delta.request_id] = state
            if state.finished and self._forget(state):
                finished.append(state)
        notify(self.observers.step, message.stats, events)
        if finished:
            notify(self.observers.finished, finished)
        if message.error is not None:
            for state in self._die(message.error):
                changed[state.request.request_id] = state
        return list(changed.values())

    def next_message(self, timeout_s: float | None = None) -> EngineOutput | None:
        """Wait for the engine's next message; None: the time is over."""
        try:
            return self.engine.outbox.get(timeout=timeout_s)
        except queue.Empty:
            self.check_health()
            return None

    def prepare_structured_outputs(self) -> None:
        """Does now what the first request with structured outputs would wait for.

        That takes a second or more and holds the interpreter's lock, so servers call it before
        they serve.

        Raises:
            RequestError: The model has no tokenizer, or no token that ends outputs.
            UnsupportedError: llguidance is not installed, or cannot read the tokenizer.
        """
        self.processor.require_grammars().start()
        if self._matchers is not None:
            self._matchers.start()

    def begin_grammar(self, sampling: SamplingParams) -> "Future[str] | None":
        """Starts to compile the grammar of a request, if it has one, for `submit` to find.

        Raises:
            RequestError: It is refused at first sight; otherwise the future raises.
        """
        if not isinstance(sampling, SamplingParams) or sampling.structured_outputs is None:
            return None
        return self.processor.require_grammars().begin(sampling.structured_outputs)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ParsedPrompt:
        """A conversation as a prompt; `options` are `Tokenizer.apply_chat_template`'s.

        Raises:
            RequestError: There is no template, it refuses, or the prompt is too long.
        """
        text = self.render_text(messages, chat_template_kwargs, **options)
        # The template writes the begin token itself, where the model wants one.
        return self.processor.parse(text, add_special_tokens=False)

    def render_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """A conversation as the text of a prompt; as `render_chat`."""
        tokenizer = self.require_tokenizer()
        kwargs = dict(chat_template_kwargs or {})
        if reserved := sorted(RESERVED_KWARGS & kwargs.keys()):
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(reserved)}; use the argument of that "
                "name",
                param="chat_template_kwargs",
            )
        return tokenizer.apply_chat_template(messages, tokenize=False, **options, **kwargs)

    def abort(self, request_id: str | Sequence[str]) -> list[RequestState]:
        """End all requests that carry a user's id; returns those that were still running."""
        ids = {request_id} if isinstance(request_id, str) else set(request_id)
        with self._lock:
            states = [state for state in self._states.values() if state.request_id in ids]
        for state in states:
            self.cancel(state)
        return states

    def cancel(self, state: RequestState) -> None:
        """End one request, and free what it holds; without effect when it has ended."""
        if self._forget(state):
            state.end("abort")
            self.engine.abort(Abort(request_id=state.request.request_id))
            notify(self.observers.finished, [state])

    def fail_all(self, error: Exception) -> list[RequestState]:
        """End every request with an error, which its consumer gets; returns them."""
        with self._lock:
            states = list(self._states.values())
        failed = [state for state in states if self._forget(state)]
        for state in failed:
            state.fail(error)
            self.engine.abort(Abort(request_id=state.request.request_id))
        if failed:
            notify(self.observers.finished, failed)
        return failed

    @property
    def num_unfinished(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._states)

    @property
    def dead_error(self) -> EngineDeadError | None:
        """Why nothing more can be served."""
        return None if self._dead is None else EngineDeadError(self._dead)

    def check_health(self) -> None:
        """Raises EngineDeadError when the engine has stopped."""
        error = self.dead_error
        if error is not None:
            raise error

    def require_tokenizer(self) -> Tokenizer:
        """Raises RequestError when the engine was started without one."""
        if self.tokenizer is None:
            raise RequestError("there is no tokenizer, because skip_tokenizer_init is set")
        return self.tokenizer

    def shutdown(self) -> None:
        """Stop the engine; requests that run end with EngineDeadError. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self.processor.close()
            self.engine.shutdown()
        finally:
            self._die("it was shut down")
            # Wakes a reader, should the engine not have done so.
            self.engine.outbox.put(EngineOutput(deltas=(), error="it was shut down"))

    def _admit(
        self,
        prompt: Prompt | ParsedPrompt,
        sampling: SamplingParams,
        *,
        request_id: str | None,
        priority: int,
        lora_request: object | None,
        output_kind: RequestOutputKind | None,
        stream_interval: int,
        pools: bool,
    ) -> RequestState:
        """Check a request and enter it among those that run."""
        self.check_health()
        if lora_request is not None:
            raise UnsupportedError("lora_request is not supported; leave it out")
        if not isinstance(sampling, SamplingParams):
            raise RequestError(
                f"sampling_params is a {type(sampling).__name__}; use SamplingParams",
                param="sampling_params",
            )
        number = next(self._numbers)
        shown_id = str(number) if request_id is None else request_id
        parsed = prompt
        if not isinstance(parsed, ParsedPrompt):
            parsed = self.processor.parse(parsed, pools=pools)
        # The number makes the engine's id unique, so that users may repeat theirs.
        request = self.processor.process(
            f"{shown_id}-{number}", parsed, sampling, priority=priority, pools=pools
        )
        state = RequestState(
            request,
            request_id=shown_id,
            prompt=parsed.text,
            tokenizer=self.tokenizer,
            output_kind=output_kind,
            stream_interval=stream_interval,
        )
        with self._lock:
            self._states[request.request_id] = state
        return state

    def _add(self, state: RequestState, delta: TokenDelta) -> None:
        """Give a request its tokens. What fails in here ends this request and no other."""
        try:
            if state.add(delta):
                self.engine.abort(
                    Abort(request_id=delta.request_id, choice=delta.choice, finished=True)
                )
        except Exception:
            logger.exception("request %s ends: its output cannot be read", state.request_id)
            state.end("error")
            self.engine.abort(Abort(request_id=delta.request_id))

    def _forget(self, state: RequestState) -> bool:
        with self._lock:
            return self._states.pop(state.request.request_id, None) is not None

    def _die(self, why: str) -> list[RequestState]:
        with self._lock:
            states = list(self._states.values())
            self._states.clear()
            if self._dead is None:
                self._dead = f"the engine has stopped: {why}. Start a new one"
        for state in states:
            state.fail(EngineDeadError(self._dead))
        if states:
            notify(self.observers.finished, states)
        return states


def open_client(config: EngineConfig) -> Client:
    """Load a model and start its engine.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: See `Engine`.
    """
    from jaxserve.checkpoint import open_configured

    template = None if config.chat_template is None else read_template(config.chat_template)
    checkpoint = open_configured(config)
    # Before the weights, so that a mistake shows at once.
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(checkpoint)
    if tokenizer is not None and template is not None:
        tokenizer.chat_template = template
        tokenizer.chat_templates.clear()

    vocabulary = grammar_vocabulary(checkpoint, tokenizer)
    matchers = None if vocabulary is None else MatcherFactory(vocabulary)

    from jaxserve.engine.engine import Engine

    engine = Engine(config, checkpoint, matchers)
    try:
        client = Client(config, engine, checkpoint, tokenizer, matchers)
        engine.start()
    except BaseException:
        engine.shutdown()
        raise
    return client


def shut_down_with(owner: object, client: Client) -> None:
    """Stop a client when its owner is collected, and at the latest before the interpreter ends."""
    finalizer = weakref.finalize(owner, client.shutdown)
    # Not at weakref's own moment: that can be after JAX has let go of the device. atexit runs
    # backwards, so what is registered now runs before, while the engine's thread still can.
    finalizer.atexit = False
    atexit.register(finalizer)


def read_template(template: str) -> str:
    """A chat template, from a file or as it is.

    Raises:
        ConfigError: It looks like a file's name, but there is no such file.
    """
    if "{" in template or "\n" in template:
        return template
    path = Path(template).expanduser()
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ValueError(f"it is larger than {MAX_TEMPLATE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template={template!r} is neither a template (it has no braces) nor a readable "
            f"file ({error}); pass one of the two"
        ) from None

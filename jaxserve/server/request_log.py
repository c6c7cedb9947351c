"""What is logged of each request: one access line, and on demand its prompt and its output."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.frontend.observers import Observers
from jaxserve.frontend.request_state import RequestState
from jaxserve.server import logs

logger = logging.getLogger(__name__)

QUIET = frozenset({"/health", "/ready", "/ping", "/load", "/metrics"})  # polled, so not logged
MAX_PATH_CHARS = 256
_REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,128}")


@dataclass(slots=True)
class HTTPRequest:
    """What becomes known of one HTTP request; `states` are the engine requests it led to."""

    request_id: str
    trace_headers: dict[str, str] = field(default_factory=dict)  # traceparent, tracestate
    states: list[RequestState] = field(default_factory=list)


# The one that the running code serves; threads see it when they are started with the context.
current: ContextVar[HTTPRequest | None] = ContextVar("http_request", default=None)


class AccessLog:
    """ASGI middleware that names each request and logs its end. Outermost, so that it sees all.

    The id is the client's X-Request-Id, if it is 1 to 128 letters, digits, dots, dashes and
    underscores, else a new one. It is in `current`, in `scope["state"]["request_id"]`, in every log
    line of the request, and with `echo_id` in the answer's X-Request-Id. The query string is never
    logged: keys travel there.

    Args:
        enabled: Write the lines; without, the rest stays.
        quiet: Paths whose successful requests are not logged.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        enabled: bool = True,
        echo_id: bool = True,
        quiet: Collection[str] = QUIET,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app, self._enabled, self._echo_id = app, enabled, echo_id
        self._quiet, self._clock = frozenset(quiet), clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, start = _open(scope), self._clock()
        scope.setdefault("state", {})["request_id"] = request.request_id
        status: int | None = None

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._echo_id:
                    given = message.get("headers", ())
                    headers = [(k, v) for k, v in given if k.lower() != b"x-request-id"]
                    headers.append((b"x-request-id", request.request_id.encode()))
                    message = {**message, "headers": headers}
            await send(message)

        tokens = current.set(request), logs.request_id.set(request.request_id)
        try:
            await self._app(scope, receive, note)
        finally:
            if self._enabled:
                self._log(scope, request, status, self._clock() - start)
            current.reset(tokens[0])
            logs.request_id.reset(tokens[1])

    def _log(self, scope: Scope, request: HTTPRequest, status: int | None, seconds: float) -> None:
        path = scope["path"]
        if path in self._quiet and status is not None and status < 400:
            return
        shown = path if len(path) <= MAX_PATH_CHARS else path[:MAX_PATH_CHARS] + "..."
        facts: dict[str, object] = {
            "method": scope["method"][:16],
            "path": shown,
            "status": status,  # None: the client left, or the handler failed, before there was one
            "ms": round(seconds * 1e3, 1),
        }
        if request.states:
            facts["prompt_tokens"] = sum(len(s.request.prompt_token_ids) for s in request.states)
            facts["output_tokens"] = sum(
                choice.num_tokens for state in request.states for choice in state.summaries()
            )
        logger.info("request", extra=facts)


class RequestLog:
    """Ties the engine's requests to the HTTP request they belong to, and logs texts if asked.

    Args:
        log_requests: Log prompts and sampling parameters.
        log_outputs: Log outputs.
        max_log_len: Of a text, at most so many characters, or of a prompt of ids, so many ids.
            None: all.
    """

    def __init__(
        self,
        *,
        log_requests: bool = False,
        log_outputs: bool = False,
        max_log_len: int | None = None,
    ) -> None:
        self._log_requests, self._log_outputs = log_requests, log_outputs
        self._max_len = max_log_len

    def watch(self, observers: Observers) -> None:
        """Log what these see from now on."""
        observers.submitted.append(self._on_submitted)
        if self._log_outputs:
            observers.finished.append(self._on_finished)

    def _on_submitted(self, state: RequestState) -> None:
        http = current.get()
        if http is not None:
            http.states.append(state)
        if not self._log_requests:
            return
        request, sampling = state.request, state.request.sampling
        facts: dict[str, object] = {"prompt_tokens": len(request.prompt_token_ids)}
        if state.prompt is None:
            facts["prompt_token_ids"] = list(request.prompt_token_ids[: self._max_len])
        else:
            facts["prompt"] = state.prompt[: self._max_len]
        facts |= {
            "n": sampling.n,
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
        }
        logger.info("received", extra={"request_id": state.request_id, **facts})

    def _on_finished(self, states: Sequence[RequestState]) -> None:
        for state in states:
            for index, choice in enumerate(state.summaries()):
                facts = {
                    "choice": index,
                    "output_tokens": choice.num_tokens,
                    "finish_reason": choice.finish_reason,
                    "output": choice.text[: self._max_len],
                }
                logger.info("generated", extra={"request_id": state.request_id, **facts})


def _open(scope: Scope) -> HTTPRequest:
    found = {"x-request-id": "", "traceparent": "", "tracestate": ""}
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").lower()
        if name in found:
            found[name] = value.decode("latin-1")
    given = found.pop("x-request-id")
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return HTTPRequest(request_id, {name: value for name, value in found.items() if value})

"""The two ways to answer: one JSON body, or a stream of server-sent events.

Both end their work when the client leaves.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.async_llm import OutputStream
from jaxserve.server.context import Context
from jaxserve.server.errors import APIError, as_api_error, internal_error

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
CLIENT_LEFT = 499  # nginx's number; nobody is there to read it


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        msgspec.json.encode(value),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def event(value: object, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


async def unless_gone[T](
    request: Request, work: Awaitable[T], *, timeout_s: float | None
) -> T | None:
    """The result of `work`; None when the client left first. Either way `work` has ended.

    Raises:
        APIError: 504, when the time was over.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            return None
        raise _timed_out(timeout_s or 0)
    finally:
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


class Answer(Protocol):
    """What a route makes of the engine's outputs."""

    def whole(self, stream: OutputStream) -> Awaitable[msgspec.Struct]:
        """All of it."""
        ...

    def events(self, stream: OutputStream) -> AsyncGenerator[bytes]:
        """The same in encoded pieces."""
        ...


async def respond(
    request: Request,
    answer: Answer,
    stream: OutputStream,
    *,
    streamed: bool,
    headers: Mapping[str, str] | None = None,
    error_event: "ErrorEvent | None" = None,
) -> "Response | EventStream":
    """Answers a request whole or streamed; closes the engine's stream, whatever happens.

    Args:
        error_event: Makes the event for an error within the stream; the default is OpenAI's, with
            [DONE] behind it.
    """
    config = Context.of(request).config
    if streamed:
        return EventStream(
            answer.events(stream),
            stream,
            timeout_s=config.request_timeout_s,
            keep_alive_s=config.sse_keep_alive_interval_s,
            headers=headers,
            error_event=error_event,
        )
    try:
        whole = await unless_gone(request, answer.whole(stream), timeout_s=config.request_timeout_s)
    finally:
        stream.close()
    if whole is None:
        return Response(status_code=CLIENT_LEFT)
    return json_response(whole, headers=headers)


class EventStream:
    """An ASGI response that sends events until they end or the client leaves.

    Args:
        events: Encoded.
        stream: Where they come from. Closed in the end: a client may leave before the first event
            is asked for, and a generator that never began cannot clean up.
        timeout_s: For all of them.
        keep_alive_s: A comment is sent when nothing came for so long; 0: never.
        error_event: See `respond`.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        stream: OutputStream,
        *,
        timeout_s: float | None,
        keep_alive_s: float = 0.0,
        headers: Mapping[str, str] | None = None,
        error_event: "ErrorEvent | None" = None,
    ) -> None:
        self._events, self._stream = events, stream
        self._timeout_s = timeout_s
        self._keep_alive_s = keep_alive_s
        self._headers = headers or {}
        self._error_event = error_event or openai_error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(scope, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            for each in (writer, gone):
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await each
            await self._events.aclose()
            self._stream.close()

    async def _write(self, scope: Scope, send: Send) -> None:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold events back
            **self._headers,
        }
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        clock = asyncio.timeout(self._timeout_s)
        try:
            async with clock:
                async for piece in self._with_keep_alive():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError:
            if not clock.expired():
                raise
            await self._tell(send, _timed_out(self._timeout_s or 0))
        except Exception as error:
            answer = as_api_error(error)
            name = scope["state"].get("request_id", "-")
            if answer is None:
                logger.exception("the stream of request %s failed", name)
                answer = internal_error(name)
            await self._tell(send, answer)
        await send({"type": "http.response.body", "body": b""})

    async def _tell(self, send: Send, error: APIError) -> None:
        body = self._error_event(error)
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _with_keep_alive(self) -> AsyncGenerator[bytes]:
        if not self._keep_alive_s:
            async for piece in self._events:
                yield piece
            return
        source = aiter(self._events)
        pending: asyncio.Future[bytes] = asyncio.ensure_future(_next(source))
        try:
            while True:
                done, _ = await asyncio.wait({pending}, timeout=self._keep_alive_s)
                if not done:
                    yield KEEP_ALIVE
                    continue
                try:
                    piece = pending.result()
                except StopAsyncIteration:
                    return
                yield piece
                pending = asyncio.ensure_future(_next(source))
        finally:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending


type ErrorEvent = Callable[[APIError], bytes]


def openai_error_event(error: APIError) -> bytes:
    return event(error.body()) + DONE


async def _next(source: AsyncIterator[bytes]) -> bytes:
    return await anext(source)


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _timed_out(timeout_s: float) -> APIError:
    return APIError(504, f"the request took longer than {timeout_s:g} s", code="timeout")

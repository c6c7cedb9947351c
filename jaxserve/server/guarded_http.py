"""uvicorn's HTTP/1.1 protocol with bounds on headers: their bytes, their number and their time.

Without them a client can send headers for ever, or 200 MB of them, and each costs memory before
any of our code runs.
"""

import asyncio
import logging
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from jaxserve.server.errors import APIError
from jaxserve.server_config import RequestLimits

# Not warnings: uvicorn has one for each request that is no HTTP, and anyone can send those.
_logger = logging.getLogger("uvicorn.error.http")
_logger.setLevel(logging.ERROR)

LINGER_S = 5.0
LINGER_BYTES = 64 << 20


def guarded_protocol(limits: RequestLimits) -> type[HttpToolsProtocol]:
    """A protocol class for uvicorn's `http` setting."""

    class GuardedProtocol(_GuardedProtocol):
        bounds = limits

    return GuardedProtocol


class _GuardedProtocol(HttpToolsProtocol):
    bounds: RequestLimits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _logger
        self._num_header_bytes = 0  # of the request whose headers are on their way
        self._in_headers = False
        self._just_begun = False
        self._num_discarded = 0
        self._refusal: APIError | None = None
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return  # answered; what still comes is not read
        super().data_received(data)
        # A field that never ends reaches no callback: count what comes until the headers are whole.
        if self._in_headers and self._refusal is None:
            self._num_header_bytes += 0 if self._just_begun else len(data)
            self._just_begun = False
            if self._num_header_bytes > self.bounds.max_header_bytes:
                self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._just_begun = True  # this chunk may hold the body of the request before
        self._num_header_bytes = 0
        self._start_clock()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._check_size()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._check_size()

    def on_headers_complete(self) -> None:
        self._stop_clock()
        self._in_headers = False
        if self._refusal is None:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refusal is not None:
            return
        if self.cycle.response_complete:
            self._discard(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refusal is None:
            if self._num_discarded:
                self._num_discarded = 0
                self._stop_clock()
            super().on_message_complete()

    def _discard(self, body: bytes) -> None:
        """Reads on behind an early answer, within bounds: a client that is still sending would see
        a reset, and not the answer, if the connection closed under it."""
        if not self._num_discarded:
            self._stop_clock()
            self._clock = self.loop.call_later(LINGER_S, self.transport.close)
        self._num_discarded += len(body)
        if self._num_discarded > LINGER_BYTES:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self._refusal is None:
            self._refuse(APIError(400, "this is not an HTTP request", code="bad_request"))

    def _check_size(self) -> None:
        if self._refusal is not None:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.bounds.max_header_bytes or len(self.headers) > self.bounds.max_headers:
            self._refuse(self._too_large())

    def _too_large(self) -> APIError:
        b = self.bounds
        return APIError(
            431,
            f"the headers are too large; at most {b.max_headers} of {b.max_header_bytes} bytes "
            "together are allowed",
            code="headers_too_large",
        )

    def _refuse(self, error: APIError) -> None:
        """Answers without the application, and closes."""
        self._refusal = error
        self._stop_clock()
        body = msgspec.json.encode(error.body())
        self.transport.write(
            b"".join(
                [
                    STATUS_LINE[error.status],
                    b"content-type: application/json\r\nconnection: close\r\ncontent-length: ",
                    str(len(body)).encode(),
                    b"\r\n\r\n",
                    body,
                ]
            )
        )
        self.transport.close()

    def _start_clock(self) -> None:
        self._stop_clock()
        self._clock = self.loop.call_later(self.bounds.header_timeout_s, self._too_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        self._clock = None
        if self.transport.is_closing():
            return
        self._refuse(
            APIError(
                408,
                f"the headers did not come within {self.bounds.header_timeout_s:g} s",
                code="timeout",
            )
        )

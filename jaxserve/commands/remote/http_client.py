"""A small HTTP/1.1 client over asyncio that says when each piece of an answer arrived.

The pieces are handed over as the socket delivers them, without a queue or a task between: a load
generator must not measure itself. httptools, the parser of the server's side, reads the answers.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from jaxserve.commands.parser import UsageError
from jaxserve.errors import JaxserveError

CONNECT_TIMEOUT_S = 30.0

type OnPiece = Callable[[bytes, float], None]  # a piece of a body, and time.perf_counter()


class ConnectionFailed(JaxserveError):
    """No server answers, or it hung up before its answer was whole."""


@dataclass(slots=True)
class Answer:
    """Status, headers in small letters, and the body unless it went to an `OnPiece`."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class HttpClient:
    """Sends requests to one server; connections are kept and used again.

    Args:
        url: http://HOST[:PORT][/PREFIX], or https.
        headers: Of every request.

    Raises:
        UsageError: It is no such URL.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise UsageError(f"{url!r} is not a URL ({error})") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is not a URL; write it as http://127.0.0.1:8000")
        self._host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path
        self._headers = {"host": parts.netloc.rpartition("@")[2]} | dict(headers or {})
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> Answer:
        """The answer to a GET.

        Raises:
            ConnectionFailed: There is none.
        """
        return await self._send("GET", path, b"", {}, None)

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        on_piece: OnPiece | None = None,
    ) -> Answer:
        """The answer to a POST of JSON.

        Args:
            on_piece: Takes the body of an answer with status 200, piece by piece. What it raises
                ends the exchange and is raised here.

        Raises:
            ConnectionFailed: There is none, or it broke off.
        """
        more = {"content-type": "application/json"} | dict(headers or {})
        return await self._send("POST", path, body, more, on_piece)

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _send(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        on_piece: OnPiece | None,
    ) -> Answer:
        lines = [f"{method} {self._prefix}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (self._headers | dict(headers)).items()]
        if method == "POST":
            lines.append(f"content-length: {len(body)}")
        request = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        while True:
            connection = self._take_idle()
            kept = connection is not None
            connection = connection or await self._connect()
            try:
                answer = await connection.exchange(request, on_piece)
            except ConnectionFailed:
                if kept and not connection.began:
                    continue  # the server had closed it while it was idle
                raise
            finally:
                if connection.is_open:
                    self._idle.append(connection)
            return answer

    def _take_idle(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    _Connection, self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise ConnectionFailed(
                f"{self.url} did not accept a connection within {CONNECT_TIMEOUT_S:g} s"
            ) from None
        except OSError as error:
            raise ConnectionFailed(
                f"no server answers at {self.url} ({error.strerror or error})"
            ) from None
        return connection


class _Connection(asyncio.Protocol):
    """One connection, for one exchange at a time."""

    def __init__(self) -> None:
        self.is_open = False  # and free for another exchange
        self.began = False  # something came of the present answer
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer = Answer()
        self._done: asyncio.Future[None] | None = None
        self._on_piece: OnPiece | None = None
        self._pieces: list[bytes] = []
        self._now = 0.0

    async def exchange(self, request: bytes, on_piece: OnPiece | None) -> Answer:
        if self._transport is None:
            raise ConnectionFailed("the connection is closed")
        self.is_open = self.began = False
        self._answer = Answer()
        self._pieces = []
        self._on_piece = on_piece
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._done = None
            if not self.is_open:  # failed, cancelled, or the server wants to close
                self.abort()
        self._answer.body = b"".join(self._pieces)
        return self._answer

    def abort(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # pyright: ignore[reportAttributeAccessIssue]
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._done is None:  # nothing was asked
            self.abort()
            return
        self.began = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionFailed(f"the answer is not HTTP ({error})"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._transport = None
        headers = self._answer.headers
        if self._answer.status and not {"content-length", "transfer-encoding"} & headers.keys():
            self._end(None)  # HTTP/1.0: the end of the connection is the end of the body
            return
        what = "in the middle of" if self.began else "without"
        why = f" ({exc})" if exc else ""
        self._end(ConnectionFailed(f"the server closed the connection {what} an answer{why}"))

    # httptools calls these.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._on_piece is None or self._answer.status != 200:
            self._pieces.append(body)
            return
        if self._done is None or self._done.done():
            return
        try:
            self._on_piece(body, self._now)
        except Exception as error:  # the caller's, and raised to it: httptools would wrap it
            self._end(error)

    def on_message_complete(self) -> None:
        if self._answer.status < 200:  # 100 Continue and the like
            self._answer = Answer()
            return
        failed = self._done is None or self._done.done()
        self.is_open = self._parser.should_keep_alive() and not failed
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)

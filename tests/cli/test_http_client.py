"""The client of the commands against servers that answer byte for byte as a test says."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from jaxserve.commands.load.run import run_load
from jaxserve.commands.remote.api import AnswerError, Api, Chunk
from jaxserve.commands.remote.events import EventReader
from jaxserve.commands.remote.http_client import ConnectionFailed, HttpClient

type Handle = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def sized(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


class Served:
    """Counts connections and requests; a handler answers, and may close."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.heads: list[bytes] = []
        self.num_connections = 0
        self.hung_up = asyncio.Event()

    async def __aenter__(self) -> "Served":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                await reader.readexactly(int(length or 0))
                await self.handle(head, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.hung_up.set()
        finally:
            writer.close()


def answering(data: bytes, *, close: bool = False) -> Handle:
    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if close:
            writer.close()

    return handle


def test_a_connection_is_used_again_and_replaced_when_the_server_has_closed_it() -> None:
    async def scene() -> None:
        async with Served(answering(sized(b"{}"))) as served:
            client = HttpClient(served.url + "/", {"x-a": "b"})
            for _ in range(3):
                assert (await client.get("/x")).body == b"{}"
            assert served.num_connections == 1
            assert served.heads[0].startswith(b"GET /x HTTP/1.1\r\nhost: 127.0.0.1:")
            assert b"\r\nx-a: b\r\n" in served.heads[0]
            served.handle = answering(sized(b"{}"), close=True)
            await client.get("/x")
            assert (await client.get("/x")).status == 200
            assert served.num_connections == 2
            client.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\nto the end", b"to the end"),
        (HEAD + chunked(b"a", b"bc") + b"0\r\n\r\n", b"abc"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + sized(b"late"), b"late"),
    ],
)
def test_bodies_of_all_kinds(data: bytes, body: bytes) -> None:
    async def scene() -> None:
        async with Served(answering(data, close=True)) as served:
            client = HttpClient(served.url)
            assert (await client.post("/", b"{}")).body == body
            client.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "without an answer"),
        (HEAD + b"5\r\nab", "in the middle of an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "is not HTTP"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error(data: bytes, words: str) -> None:
    async def scene() -> None:
        async with Served(answering(data, close=True)) as served:
            with pytest.raises(ConnectionFailed, match=words):
                await HttpClient(served.url).post("/", b"{}")

    asyncio.run(scene())


def test_events_are_whole_however_they_are_cut() -> None:
    stream = b': hi\r\nevent: x\r\ndata: {"a":\r\ndata: 1}\r\n\r\ndata:2\n\ndata: [DONE]\n\n'
    for size in range(1, len(stream) + 1):
        reader = EventReader()
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert [data for piece in pieces for data in reader.feed(piece)] == [
            b'{"a":\n1}',
            b"2",
            b"[DONE]",
        ]


def stream_of(*events: str) -> bytes:
    return HEAD + chunked(*(f"data: {each}\n\n".encode() for each in events)) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (sized(b'{"error": {"message": "no"}}', "400 Bad"), AnswerError, "answered 400: no"),
        (sized(b"<html>", "502 Bad Gateway"), AnswerError, "answered 502: <html>"),
        (sized(b'{"error": {"message": "no key"}}', "401 No"), AnswerError, "JAXSERVE_API_KEY"),
        (stream_of('{"error": {"message": "died"}}', "[DONE]"), AnswerError, "died"),
        (stream_of('{"choices": [{"text": "a"}]}'), ConnectionFailed, "before the answer was"),
        (stream_of("{"), AnswerError, "no chunk"),
    ],
)
def test_errors_of_streams(data: bytes, error: type[Exception], words: str) -> None:
    async def scene() -> None:
        async with Served(answering(data)) as served:
            api = Api(served.url)
            with pytest.raises(error, match=words):
                await api.stream("/v1/completions", b"{}", lambda chunk: None)
            api.close()

    asyncio.run(scene())


def test_the_key_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    monkeypatch.setenv("JAXSERVE_API_KEY", "first,other")

    async def scene() -> None:
        async with Served(answering(sized(b'{"data": [{"id": "m"}]}'))) as served:
            api = Api(f"{served.url}/v1")
            assert await api.first_model() == "m"
            assert served.heads[0].startswith(b"GET /v1/models ")
            assert b"\r\nauthorization: Bearer first\r\n" in served.heads[0]
            api.close()

    asyncio.run(scene())


def test_a_cancelled_stream_hangs_up() -> None:
    async def scene() -> None:
        async with Served(answering(HEAD + chunked(b'data: {"choices": []}\n\n'))) as served:
            api = Api(served.url)
            came = asyncio.Event()
            task = asyncio.create_task(api.stream("/", b"{}", lambda chunk: came.set()))
            await came.wait()
            task.cancel()
            async with asyncio.timeout(5):
                await served.hung_up.wait()

    asyncio.run(scene())


class SlowApi:
    """Stands for an `Api` whose answers take a second."""

    def __init__(self) -> None:
        self.sent_s: list[float] = []

    async def stream(
        self, path: str, body: bytes, on_chunk: Callable[[Chunk], None], headers: object
    ) -> None:
        self.sent_s.append(time.perf_counter())
        await asyncio.sleep(0.5)
        on_chunk(Chunk(time.perf_counter(), "x", True, True, "length", None))


@pytest.mark.parametrize(("limit", "spread_s"), [(None, 0.1), (2, 0.5)])
def test_send_times_do_not_wait_for_answers_but_for_a_limit(
    limit: int | None, spread_s: float
) -> None:
    api = SlowApi()
    times = [0.0, 0.05, 0.1]
    records, duration_s = asyncio.run(
        run_load(
            api,  # pyright: ignore[reportArgumentType]
            "/",
            [b""] * 3,
            times,
            max_concurrency=limit,
            request_ids=["a", "b", "c"],
            on_done=lambda: None,
        )
    )
    assert api.sent_s[-1] - api.sent_s[0] == pytest.approx(spread_s, abs=0.09)
    assert [record.ttft_s for record in records] == pytest.approx([0.5] * 3, abs=0.1)
    assert records[-1].delay_s == pytest.approx(spread_s - 0.1, abs=0.09)
    assert duration_s == pytest.approx(spread_s + 0.5, abs=0.2)

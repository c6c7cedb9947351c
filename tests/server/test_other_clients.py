"""Other doors to the same server: LangChain, TLS, a reader that does not read, a Unix socket."""

import asyncio
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.messages import HumanMessage
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from jaxserve.errors import ConfigError
from jaxserve.server.serve import open_socket
from jaxserve.server_config import ServerConfig
from tests.server.conftest import Start

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def test_langchain_talks_streams_and_calls_tools(start: Start) -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    plain = start("Hello there, LangChain.", delay_s=0.002)
    config = ServerConfig(port=0, enable_auto_tool_choice=True, tool_call_parser="hermes")
    calling = start(CALL, server=config)

    def model(url: str) -> ChatOpenAI:
        return ChatOpenAI(model="demo", base_url=f"{url}/v1", api_key=SecretStr("-"))

    answer = model(plain.url).invoke([HumanMessage("Hi")])
    assert answer.content == "Hello there, LangChain."
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 3
    pieces = [chunk.content for chunk in model(plain.url).stream("Hi")]
    assert "".join(map(str, pieces)) == answer.content
    assert len([piece for piece in pieces if piece]) > 1
    found: Any = model(calling.url).bind_tools([convert_to_openai_tool(add)]).invoke("1 + 2?")
    assert found.tool_calls[0]["name"] == "add"
    assert found.tool_calls[0]["args"] == {"a": 1, "b": 2}


def test_langchain_embeds(start: Start) -> None:
    server = start()
    embeddings = OpenAIEmbeddings(
        model="demo",
        base_url=f"{server.url}/v1",
        api_key=SecretStr("-"),
        check_embedding_ctx_length=False,  # else it tokenizes for a model of OpenAI's
    )
    vectors = embeddings.embed_documents(["one", "two"])
    assert len(vectors) == 2
    assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-3)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert


def test_tls_serves_and_plain_http_gets_nothing(
    start: Start, certificate: tuple[Path, Path]
) -> None:
    key, cert = certificate
    config = ServerConfig(port=0, ssl_keyfile=str(key), ssl_certfile=str(cert))
    server = start(server=config)
    trusted = ssl.create_default_context(cafile=str(cert))
    with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=trusted) as http:
        body = {"model": "demo", "prompt": "a"}
        answer = http.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["text"] == "Hello there."
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
    with server.http() as plain, pytest.raises(httpx.TransportError):
        plain.get("/health")


def test_a_missing_certificate_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ssl_certfile"):
        ServerConfig(ssl_keyfile=str(tmp_path / "key.pem"))
    with pytest.raises(ConfigError, match="ssl_certfile"):
        ServerConfig(ssl_certfile=str(tmp_path / "no.pem"))


def test_a_host_that_is_not_here_is_told() -> None:
    with pytest.raises(ConfigError, match="host"):
        open_socket(ServerConfig(host="no.such.host.invalid", port=0))


def test_a_reader_that_does_not_read_slows_nobody(start: Start) -> None:
    server = start("word " * 20, ends=False, delay_s=0.001, max_model_len=200_000)
    body = b'{"model": "demo", "prompt": "a", "max_tokens": 100000, "stream": true}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    stuck = socket.socket()
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.connect(("127.0.0.1", server.port))
    stuck.sendall(head + body)
    time.sleep(1)  # until its buffers are full
    with server.http() as http:
        request = {"model": "demo", "prompt": "a", "max_tokens": 200, "stream": True}
        with http.stream("POST", "/v1/completions", json=request) as answer:
            assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"
        assert http.get("/health").status_code == 200
    assert server.llm.client.num_unfinished == 1  # the stuck one goes on, or waits
    stuck.close()
    deadline = time.monotonic() + 10
    while server.llm.client.num_unfinished:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_that_leaves_before_the_first_event_ends_its_request(start: Start) -> None:
    """Then the generator of events never begins, so it cannot clean up."""
    server = start("word ", ends=False, delay_s=0.01, max_model_len=200_000)

    async def gone_at_once() -> None:
        body = b'{"model": "demo", "prompt": "a", "max_tokens": 100000, "stream": true}'
        received = [
            {"type": "http.request", "body": body, "more_body": False},
            {"type": "http.disconnect"},
        ]

        async def receive() -> dict[str, object]:
            return received.pop(0) if len(received) > 1 else received[0]

        async def send(message: object) -> None:
            await asyncio.sleep(60)  # a socket that takes nothing

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "root_path": "",
            "query_string": b"", "http_version": "1.1", "scheme": "http", "state": {},
            "headers": [(b"host", b"a"), (b"content-type", b"application/json")],
        }  # fmt: skip
        await server.app(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(gone_at_once())
    assert server.llm.client.num_unfinished == 0


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"input": ""}, 400, "invalid_value"),
        ({"input": []}, 400, "empty_array"),
        ({"input": ["a", 1]}, 400, "invalid_type"),
        ({"input": [-1]}, 400, "invalid_value"),
        ({"input": "a " * 10_000}, 400, "context_length_exceeded"),
        ({"input": ["a"] * 1025}, 400, "array_above_max_length"),
        ({"model": "other"}, 404, "model_not_found"),
        ({"encoding_format": "int8"}, 400, "invalid_value"),
        ({"dimensions": 0}, 400, "integer_below_min_value"),
        ({"dimensions": 10**6}, 400, "invalid_value"),
        ({"inputs": "a"}, 400, "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_embedding_requests_are_refused(
    start: Start, change: dict[str, Any], status: int, code: str
) -> None:
    with start().http() as http:
        answer = http.post("/v1/embeddings", json={"model": "demo", "input": "a"} | change)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)

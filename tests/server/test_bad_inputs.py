"""Bad requests: each gets its status and its code, the engine never hears of it, others go on.

The tables are in `bad_requests`; routes beyond OpenAI's two are in `test_bad_inputs_elsewhere`.
"""

import contextlib
import json
import socket
from typing import Any

import openai
import pytest

from jaxserve.checkpoint import Checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.server_config import ServerConfig
from tests.server.bad_requests import AWAY, BOTH, OF_CHAT, OF_COMPLETIONS
from tests.server.running import LIMITS, RunningServer, check, engine_of, scripted

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ROUTES = (COMPLETIONS, CHAT, "/tokenize")


def good(route: str) -> dict[str, Any]:
    if route == CHAT:
        return {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
    return {"model": "demo", "prompt": "hi"}


JSON = {"content-type": "application/json"}
BODIES: list[tuple[str, bytes, str | None]] = [
    ("empty", b"", "invalid_json"),
    ("truncated", b"{", "invalid_json"),
    ("array", b"[1]", "invalid_json"),
    ("string", b'"x"', "invalid_json"),
    ("number", b"1", "invalid_json"),
    ("null", b"null", "invalid_json"),
    ("not UTF-8", b'{"model": "\xff"}', "invalid_json"),
    ("UTF-16", '{"model": "demo"}'.encode("utf-16"), "invalid_json"),
    ("deep", b"[" * 100_000 + b"]" * 100_000, "invalid_json"),
    ("deep in a field", b'{"prompt": ' + b"[" * 100_000 + b"}", "invalid_json"),
    ("many digits", b'{"seed": ' + b"9" * 5000 + b"}", "invalid_json"),
    ("NaN", b'{"temperature": NaN}', "invalid_json"),
    ("Infinity", b'{"temperature": Infinity}', "invalid_json"),
    ("1e999", b'{"temperature": 1e999}', "invalid_json"),
    ("lone surrogate", b'{"model": "demo", "prompt": "\\ud800"}', "invalid_json"),
    ("duplicate key", b'{"model": "demo", "n": 1, "n": 99}', "invalid_json"),
    ("trailing text", b'{"model": "demo"} x', "invalid_json"),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("body", "code"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_a_malformed_body_is_refused(
    busy: RunningServer, route: str, body: bytes, code: str
) -> None:
    with busy.http() as http:
        check(http.post(route, content=body, headers=JSON), 400, code)


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_of_another_type_or_size_is_refused(busy: RunningServer, route: str) -> None:
    body = json.dumps(good(route)).encode()
    with busy.http() as http:
        for headers in ({"content-type": "text/plain"}, {}):
            check(http.post(route, content=body, headers=headers), 415, "unsupported_media_type")
        zipped = JSON | {"content-encoding": "gzip"}
        check(http.post(route, content=body, headers=zipped), 415, "unsupported_media_type")
        large = b" " * (LIMITS.max_body_bytes + 1)
        check(http.post(route, content=large, headers=JSON), 413, "request_too_large")
        chunks = (b" " * 65536 for _ in range(LIMITS.max_body_bytes // 65536 + 2))
        check(http.post(route, content=chunks, headers=JSON), 413, "request_too_large")


def test_a_nul_character_is_text(busy: RunningServer) -> None:
    with busy.http() as http:
        body = good(COMPLETIONS) | {"prompt": "a\0b", "max_tokens": 1}
        assert http.post(COMPLETIONS, json=body).status_code == 200


def test_a_bom_is_not_in_the_way(busy: RunningServer) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(good(COMPLETIONS) | {"max_tokens": 1}).encode()
    with busy.http() as http:
        assert http.post(COMPLETIONS, content=body, headers=JSON).status_code == 200


FIELDS = [
    *((COMPLETIONS, *case) for case in BOTH + OF_COMPLETIONS),
    *((CHAT, *case) for case in BOTH + OF_CHAT),
]


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize(
    ("route", "change", "code", "param"),
    FIELDS,
    ids=[f"{r.rsplit('/')[-1]}-{str(c)[:40]}-{i}" for i, (r, c, *_) in enumerate(FIELDS)],
)
def test_a_bad_field_is_refused_before_the_engine_hears_of_it(
    busy: RunningServer,
    route: str,
    change: dict[str, Any],
    code: str,
    param: str | None,
    stream: bool,
) -> None:
    if stream and "stream" in change:
        pytest.skip("the case sets stream itself")
    body = good(route) | ({"stream": True} if stream else {}) | change
    body = {name: value for name, value in body.items() if value is not AWAY}
    num_before = len(engine_of(busy).requests)
    with busy.http() as http:
        check(http.post(route, json=body), 400, code, param)
    assert len(engine_of(busy).requests) == num_before


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", ["nope", "../../etc/passwd", "", "demo "])
def test_an_unknown_model_is_not_found(busy: RunningServer, route: str, name: str) -> None:
    with busy.http() as http:
        check(http.post(route, json=good(route) | {"model": name}), 404, "model_not_found", "model")


def test_unknown_paths_and_methods_are_told_in_the_same_shape(busy: RunningServer) -> None:
    with busy.http() as http:
        check(http.get("/v1/nothing"), 404, "unknown_url")
        check(http.post("/v1/completions/"), 404, "unknown_url")
        answer = http.get(CHAT)
        check(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"
        check(http.get("/v1/models/nope"), 404, "model_not_found")


def test_unknown_fields_pass_where_the_operator_allows_them(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    running = scripted(
        checkpoint, tokenizer, "Hi.", server=ServerConfig(port=0, allow_unknown_fields=True)
    )
    with running.http() as http:
        answer = http.post(COMPLETIONS, json=good(COMPLETIONS) | {"temprature": 1})
        assert answer.status_code == 200
        check(http.post(COMPLETIONS, json=good(COMPLETIONS) | {"n": "1"}), 400, "invalid_type", "n")
    running.stop()


def test_the_openai_client_raises_the_class_that_belongs_to_the_error(
    busy: RunningServer,
) -> None:
    client = openai.OpenAI(base_url=f"{busy.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="demo", prompt="")
    assert bad.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    client.close()


# Below JSON

REQUEST_LINE = b"POST /v1/completions HTTP/1.1\r\n"
HOST = b"Host: localhost\r\n"
TYPE = b"Content-Type: application/json\r\n"


def raw(busy: RunningServer, data: bytes, *, timeout_s: float = 10) -> tuple[int, dict[str, Any]]:
    """The answer to some bytes, read until the server closes."""
    with socket.create_connection(("127.0.0.1", busy.port), timeout=timeout_s) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)  # it may answer and close while we are sending
        received = b""
        while b"\r\n\r\n" not in received or not received.endswith(b"}"):
            piece = sock.recv(65536)
            if not piece:
                break
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body else {}


@pytest.mark.parametrize(
    "data",
    [
        REQUEST_LINE + HOST + TYPE + b"Content-Length: -1\r\n\r\n",
        REQUEST_LINE + HOST + TYPE + b"Content-Length: abc\r\n\r\n",
        REQUEST_LINE + HOST + TYPE + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        REQUEST_LINE + HOST + TYPE + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"nonsense\r\n\r\n",
        REQUEST_LINE + b"\r\n",  # no Host
        REQUEST_LINE + HOST + HOST + b"\r\n",
        REQUEST_LINE + b"Host: a/b?c\r\n\r\n",
        REQUEST_LINE + b"Host: a@b\r\n\r\n",
        REQUEST_LINE + b"Host: a#b\r\n\r\n",
        REQUEST_LINE + b"Host: a\\b\r\n\r\n",
    ],
    ids=lambda data: repr(data[-40:]),
)
def test_what_is_not_http_is_a_bad_request(busy: RunningServer, data: bytes) -> None:
    status, body = raw(busy, data)
    assert (status, body["error"]["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    "data",
    [
        REQUEST_LINE + HOST + b"X-Long: " + b"a" * 70_000 + b"\r\n\r\n",
        REQUEST_LINE + HOST + b"X-Endless: " + b"a" * 1_000_000,
        REQUEST_LINE + HOST + b"".join(b"X-%d: a\r\n" % i for i in range(200)) + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    ],
    ids=["one long", "never ends", "many", "long path"],
)
def test_headers_are_bounded(busy: RunningServer, data: bytes) -> None:
    status, body = raw(busy, data)
    assert (status, body["error"]["code"]) == (431, "headers_too_large")


def test_headers_and_bodies_that_never_come_are_given_up(busy: RunningServer) -> None:
    status, body = raw(busy, REQUEST_LINE + HOST)
    assert (status, body["error"]["code"]) == (408, "timeout")
    status, body = raw(busy, REQUEST_LINE + HOST + TYPE + b"Content-Length: 50\r\n\r\n{")
    assert (status, body["error"]["code"]) == (408, "timeout")


def test_a_large_body_behind_short_headers_in_one_packet_is_no_header(
    busy: RunningServer,
) -> None:
    body = json.dumps(good(COMPLETIONS) | {"max_tokens": 1, "user": "x" * 200_000}).encode()
    length = b"Content-Length: %d\r\n" % len(body)
    twice = (REQUEST_LINE + HOST + TYPE + length + b"\r\n" + body) * 2
    with socket.create_connection(("127.0.0.1", busy.port), timeout=10) as sock:
        sock.sendall(twice)
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 2:
            piece = sock.recv(65536)
            assert piece, received
            received += piece


# Keys


def test_every_route_but_the_watching_ones_needs_a_key(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    running = scripted(
        checkpoint, tokenizer, "Hi.", server=ServerConfig(port=0, api_keys=("sk-one", "sk-two"))
    )
    wrong: list[dict[str, str]] = [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer sk-three"},
        {"authorization": "Bearer sk-one sk-two"},
        {"authorization": "Basic c2stb25l"},
        {"authorization": "sk-one"},
        {"x-api-key": "sk-three"},
    ]
    with running.http() as http:
        for route in ("/v1/models", "/v1/models/demo", "/nothing"):
            for headers in wrong:
                answer = http.get(route, headers=headers)
                check(answer, 401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        for route in ROUTES:
            for headers in wrong:
                check(http.post(route, json=good(route), headers=headers), 401, "invalid_api_key")
        bytes_key = {b"authorization": b"Bearer \xff\xfe"}
        check(http.get("/v1/models", headers=bytes_key), 401, "invalid_api_key")
        check(http.options(CHAT), 401, "invalid_api_key")
        for key in ("sk-one", "sk-two"):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
                assert http.get("/v1/models", headers=headers).status_code == 200
        for route in ("/health", "/ready", "/ping", "/version"):
            assert http.get(route).status_code == 200
    running.stop()


def test_no_key_may_administer_the_server(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    running = scripted(checkpoint, tokenizer, "Hi.", server=ServerConfig(port=0, api_keys=("k",)))
    with running.http() as http:
        for route in ("/admin/reset_prefix_cache", "/admin/", "/admin/a/../b"):
            check(http.post(route), 401, "invalid_api_key")
            answer = http.post(route, headers={"authorization": "Bearer k"})
            check(answer, 403, "insufficient_permissions")
            assert answer.json()["error"]["type"] == "permission_error"
    client = openai.OpenAI(base_url=f"{running.url}/admin", api_key="k", max_retries=0)
    with pytest.raises(openai.PermissionDeniedError):
        client.models.list()
    client.close()
    running.stop()


def test_a_prompt_that_fits_the_context_but_not_the_cache_is_refused(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    running = scripted(checkpoint, tokenizer, "Hi.", max_model_len=4096, num_blocks=5)
    words = "word " * 100
    bodies: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": words},
        CHAT: {"messages": [{"role": "user", "content": words}], "max_tokens": 4},
        "/v1/responses": {"input": words, "max_output_tokens": 4},
    }
    with running.http() as http:
        for route, body in bodies.items():
            for stream in ({}, {"stream": True}):
                answer = http.post(route, json={"model": "demo", **body, **stream})
                check(answer, 400, "context_length_exceeded")
        assert not engine_of(running).requests
        small = {"model": "demo", "prompt": "word " * 40}
        assert http.post(COMPLETIONS, json=small).status_code == 200
    running.stop()


def test_a_megabyte_key_is_refused_as_a_header(busy: RunningServer) -> None:
    data = b"GET /v1/models HTTP/1.1\r\n" + HOST + b"Authorization: Bearer " + b"k" * 2**20
    status, _ = raw(busy, data + b"\r\n\r\n")
    assert status == 431

"""Bad requests: each gets its status and its code, the engine never hears of it, others go on."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from jaxserve.checkpoint import Checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.server_config import RequestLimits, ServerConfig
from tests.frontend.fake_engine import FakeEngine
from tests.server.running import RunningServer, scripted

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ROUTES = (COMPLETIONS, CHAT, "/tokenize")
LIMITS = RequestLimits(header_timeout_s=1.0, body_timeout_s=1.0)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[RunningServer]:
    """With eight endless streams in the background; none of them may break."""
    running = scripted(
        checkpoint,
        tokenizer,
        "word ",
        ends=False,
        delay_s=0.02,
        max_model_len=100_000,
        server=ServerConfig(port=0, limits=LIMITS),
    )
    counts = [0] * 8
    ended = threading.Event()

    def read(i: int) -> None:
        body = {"model": "demo", "prompt": "go", "max_tokens": 99_000, "stream": True}
        with running.http() as http, http.stream("POST", COMPLETIONS, json=body) as answer:
            for line in answer.iter_lines():
                counts[i] += line.startswith("data: {")
                assert '"error"' not in line
                if ended.is_set():
                    return

    threads = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    while not all(counts):
        ended.wait(0.01)
    yield running
    before = list(counts)
    ended.wait(0.3)
    assert all(now > then for now, then in zip(counts, before, strict=True))
    ended.set()
    for thread in threads:
        thread.join(10)
    running.stop()


def engine_of(server: RunningServer) -> FakeEngine:
    engine = server.llm.client.engine
    assert isinstance(engine, FakeEngine)
    return engine


def check(answer: httpx.Response, status: int, code: str | None, param: str | None = None) -> None:
    """The oracle: status, shape, bounds."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert len(answer.content) <= 4096
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert body["error"]["code"] == code, body
    if param is not None:
        assert body["error"]["param"] == param, body


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
    server: RunningServer, route: str, body: bytes, code: str
) -> None:
    with server.http() as http:
        check(http.post(route, content=body, headers=JSON), 400, code)


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_of_another_type_or_size_is_refused(server: RunningServer, route: str) -> None:
    body = json.dumps(good(route)).encode()
    with server.http() as http:
        for headers in ({"content-type": "text/plain"}, {}):
            check(http.post(route, content=body, headers=headers), 415, "unsupported_media_type")
        zipped = JSON | {"content-encoding": "gzip"}
        check(http.post(route, content=body, headers=zipped), 415, "unsupported_media_type")
        large = b" " * (LIMITS.max_body_bytes + 1)
        check(http.post(route, content=large, headers=JSON), 413, "request_too_large")
        chunks = (b" " * 65536 for _ in range(LIMITS.max_body_bytes // 65536 + 2))
        check(http.post(route, content=chunks, headers=JSON), 413, "request_too_large")


def test_a_nul_character_is_text(server: RunningServer) -> None:
    with server.http() as http:
        body = good(COMPLETIONS) | {"prompt": "a\0b", "max_tokens": 1}
        assert http.post(COMPLETIONS, json=body).status_code == 200


def test_a_bom_is_not_in_the_way(server: RunningServer) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(good(COMPLETIONS) | {"max_tokens": 1}).encode()
    with server.http() as http:
        assert http.post(COMPLETIONS, content=body, headers=JSON).status_code == 200


# Fields: route, change, code, param. A None value takes the field away.
AWAY = "<left out>"  # a constant: two test processes must agree on the names of cases
BOTH: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": AWAY}, "missing_required_parameter", "model"),
    ({"model": 1}, "invalid_type", "model"),
    ({"model": ["demo"]}, "invalid_type", "model"),
    ({"model": "x" * 1_000_000}, "string_above_max_length", "model"),
    ({"max_tokens": -1}, "integer_below_min_value", "max_tokens"),
    ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    ({"max_tokens": 200_000}, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": 2**63}, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": "10"}, "invalid_type", "max_tokens"),
    ({"max_tokens": True}, "invalid_type", "max_tokens"),
    ({"max_tokens": 1.5}, "invalid_type", "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "invalid_value", "min_tokens"),
    ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
    ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    ({"temperature": "1"}, "invalid_type", "temperature"),
    ({"top_p": 0}, "decimal_below_min_value", "top_p"),
    ({"top_p": -1}, "decimal_below_min_value", "top_p"),
    ({"top_p": 1.1}, "decimal_above_max_value", "top_p"),
    ({"min_p": 2}, "decimal_above_max_value", "min_p"),
    ({"top_k": -2}, "integer_below_min_value", "top_k"),
    ({"top_k": 1.5}, "invalid_type", "top_k"),
    ({"presence_penalty": 3}, "decimal_above_max_value", "presence_penalty"),
    ({"frequency_penalty": -3}, "decimal_below_min_value", "frequency_penalty"),
    ({"repetition_penalty": 0}, "decimal_below_min_value", "repetition_penalty"),
    ({"n": 0}, "integer_below_min_value", "n"),
    ({"n": -1}, "integer_below_min_value", "n"),
    ({"n": 129}, "integer_above_max_value", "n"),
    ({"n": 10**9}, "integer_above_max_value", "n"),
    ({"n": 2, "temperature": 0}, "invalid_value", "n"),
    ({"logit_bias": {"abc": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"49152": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": 101}}, "decimal_above_max_value", None),
    ({"logit_bias": {str(i): 1 for i in range(100_000)}}, "invalid_value", "logit_bias"),
    ({"stop": ["a"] * 5}, "array_above_max_length", "stop"),
    ({"stop": ["a"] * 1000}, "array_above_max_length", "stop"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": [""]}, "invalid_value", "stop"),
    ({"stop": "x" * 1_000_000}, "invalid_value", "stop"),
    ({"stop": [1]}, "invalid_type", "stop[0]"),
    ({"stop_token_ids": [-1]}, "integer_below_min_value", None),
    ({"stop_token_ids": [49152]}, "invalid_value", "stop_token_ids"),
    ({"allowed_token_ids": []}, "empty_array", "allowed_token_ids"),
    ({"allowed_token_ids": [49152]}, "invalid_value", "allowed_token_ids"),
    ({"seed": 2**70}, "integer_above_max_value", "seed"),
    ({"seed": -(2**70)}, "integer_below_min_value", "seed"),
    ({"seed": 1.5}, "invalid_type", "seed"),
    ({"stream": "yes"}, "invalid_type", "stream"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "invalid_value",
     "stream_options"),
    ({"stream": True, "prompt_logprobs": 1}, "invalid_value", "prompt_logprobs"),
    ({"temprature": 1}, "unknown_parameter", "temprature"),
    ({"guided_json": {"type": "object"}}, "unknown_parameter", "guided_json"),
    ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
    ({"kv_transfer_params": {"a": 1}}, "unsupported_parameter", "kv_transfer_params"),
    ({"cache_salt": "a/b"}, "invalid_value", "cache_salt"),
    ({"truncate_prompt_tokens": -2}, "integer_below_min_value", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 10**6}, "invalid_value", "truncate_prompt_tokens"),
    ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "missing_required_parameter", None),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
     "missing_required_parameter", None),
    ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "invalid_value",
     "structured_outputs"),
    ({"structured_outputs": {"json": {"enum": ["x" * 300_000]}}}, "invalid_json_schema", None),
]  # fmt: skip
OF_COMPLETIONS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": AWAY}, "missing_required_parameter", "prompt"),
    ({"prompt": ""}, "invalid_value", "prompt"),
    ({"prompt": []}, "empty_array", "prompt"),
    ({"prompt": [""]}, "invalid_value", "prompt"),
    ({"prompt": [[]]}, "invalid_value", "prompt"),
    ({"prompt": ["a", 1]}, "invalid_type", "prompt"),
    ({"prompt": [[1], "a"]}, "invalid_type", "prompt"),
    ({"prompt": {"a": 1}}, "invalid_type", "prompt"),
    ({"prompt": [-1]}, "invalid_value", "prompt"),
    ({"prompt": [49152]}, "invalid_value", "prompt"),
    ({"prompt": [2**32 + 3]}, "invalid_value", "prompt"),
    ({"prompt": [2**63]}, "invalid_value", "prompt"),
    ({"prompt": [True]}, "invalid_type", "prompt"),
    ({"prompt": [1.5]}, "invalid_type", "prompt"),
    ({"prompt": ["a"] * 1025}, "array_above_max_length", "prompt"),
    ({"prompt": ["a"] * 1024, "n": 64}, "integer_above_max_value", "n"),
    ({"prompt": [5] * 100_001}, "context_length_exceeded", "prompt"),
    ({"prompt": "a " * 1_500_000}, "context_length_exceeded", "prompt"),
    ({"logprobs": 21}, "integer_above_max_value", "logprobs"),
    ({"logprobs": True}, "invalid_type", "logprobs"),
    ({"best_of": 0, "n": 1}, "unsupported_parameter", "best_of"),
    ({"best_of": 2, "n": 1}, "unsupported_parameter", "best_of"),
    ({"suffix": "x"}, "unsupported_parameter", "suffix"),
]
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
IMAGES = [
    "file:///etc/passwd", "http://127.0.0.1:22/", "http://[::1]/", "http://a\\@b/",
    "http://localhost:8000/admin/", "https://example.com/404.png", "ftp://a/b", "", PIXEL,
    "data:image/png;base64,###", "data:text/html,<b>", "data:image/png;base64," + "A" * 1_000_000,
]  # fmt: skip
OF_CHAT: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": AWAY}, "missing_required_parameter", "messages"),
    ({"messages": []}, "empty_array", "messages"),
    ({"messages": "hi"}, "invalid_type", "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x"},
                   {"role": "tool", "content": "x", "tool_call_id": "call_1"}]},
     "invalid_value", "messages[1].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x"},
                   {"role": "tool", "content": "x", "tool_call_id": {}}]},
     "invalid_value", "messages[1].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x"}] * 10_001}, "array_above_max_length",
     "messages"),
    ({"messages": [{"role": "user", "content": "a " * 1_500_000}]}, "context_length_exceeded",
     "messages"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "max_tokens"),
    ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", None),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"audio": {"voice": "x"}}, "unsupported_parameter", "audio"),
    ({"store": True}, "unsupported_parameter", "store"),
    ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
    ({"chat_template": "{{ 1 }}"}, "unsupported_parameter", "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "unsupported_parameter", "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "invalid_value", "chat_template_kwargs"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "invalid_value",
     "continue_final_message"),
    ({"tools": []}, "empty_array", "tools"),
    ({"tools": [TOOL] * 129}, "array_above_max_length", "tools"),
    ({"tools": [TOOL, TOOL], "tool_choice": "none"}, "invalid_value", "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value",
     "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
     "invalid_type", "tools[0].function.parameters"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
     "invalid_value", "tool_choice"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "auto"}, "unsupported_parameter", "tool_choice"),
    ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]},
     "invalid_image_url", "messages[0].content[0].image_url.url"),
    *(({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}]}]},
       "invalid_image_url", "messages[0].content[0].image_url.url") for url in IMAGES),
    ({"messages": [{"role": "user", "content": [
        {"type": "text", "text": "a"}, *({"type": "image_url", "image_url": {"url": PIXEL}},) * 11
    ]}]}, "invalid_image_url", "messages[0].content[1].image_url.url"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "invalid_image_url", "messages[0].content[0].image_url.url"),
    ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": ""}}]}]},
     "unsupported_value", "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
     "unsupported_value", "messages[0].content[0].type"),
]  # fmt: skip
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
    server: RunningServer,
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
    num_before = len(engine_of(server).requests)
    with server.http() as http:
        check(http.post(route, json=body), 400, code, param)
    assert len(engine_of(server).requests) == num_before


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", ["nope", "../../etc/passwd", "", "demo "])
def test_an_unknown_model_is_not_found(server: RunningServer, route: str, name: str) -> None:
    with server.http() as http:
        check(http.post(route, json=good(route) | {"model": name}), 404, "model_not_found", "model")


def test_unknown_paths_and_methods_are_told_in_the_same_shape(server: RunningServer) -> None:
    with server.http() as http:
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
    server: RunningServer,
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
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


def raw(server: RunningServer, data: bytes, *, timeout_s: float = 10) -> tuple[int, dict[str, Any]]:
    """The answer to some bytes, read until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s) as sock:
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
def test_what_is_not_http_is_a_bad_request(server: RunningServer, data: bytes) -> None:
    status, body = raw(server, data)
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
def test_headers_are_bounded(server: RunningServer, data: bytes) -> None:
    status, body = raw(server, data)
    assert (status, body["error"]["code"]) == (431, "headers_too_large")


def test_headers_and_bodies_that_never_come_are_given_up(server: RunningServer) -> None:
    status, body = raw(server, REQUEST_LINE + HOST)
    assert (status, body["error"]["code"]) == (408, "timeout")
    status, body = raw(server, REQUEST_LINE + HOST + TYPE + b"Content-Length: 50\r\n\r\n{")
    assert (status, body["error"]["code"]) == (408, "timeout")


def test_a_large_body_behind_short_headers_in_one_packet_is_no_header(
    server: RunningServer,
) -> None:
    body = json.dumps(good(COMPLETIONS) | {"max_tokens": 1, "user": "x" * 200_000}).encode()
    length = b"Content-Length: %d\r\n" % len(body)
    twice = (REQUEST_LINE + HOST + TYPE + length + b"\r\n" + body) * 2
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
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


def test_a_megabyte_key_is_refused_as_a_header(server: RunningServer) -> None:
    data = b"GET /v1/models HTTP/1.1\r\n" + HOST + b"Authorization: Bearer " + b"k" * 2**20
    status, _ = raw(server, data + b"\r\n\r\n")
    assert status == 431

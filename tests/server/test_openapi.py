"""The OpenAPI document, and what a fuzzer that reads it finds over a real socket.

JAXSERVE_FUZZ_CASES is how many cases the fuzzer sends, at least; `make fuzz` sends 50,000.
"""

import os
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from schemathesis.specs.openapi.definitions import OPENAPI_31

from jaxserve.checkpoint import Checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.server.openapi_fields import MEANING, UNSUPPORTED
from jaxserve.server.openapi_routes import OPERATIONS
from jaxserve.server_config import RequestLimits, ServerConfig
from tests.server.conftest import Start
from tests.server.running import RunningServer, scripted

CASES = int(os.environ.get("JAXSERVE_FUZZ_CASES", "2000"))
REQUIRED = {"model", "prompt", "messages", "tokens"}
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
SMALL = RequestLimits(max_n=4, max_prompts=4, max_sequences=8)


def document(server: RunningServer) -> dict[str, Any]:
    with server.http() as http:
        answer = http.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def test_the_document_is_valid_and_knows_every_route(start: Start) -> None:
    server = start()
    found = document(server)
    jsonschema.validate(found, OPENAPI_31)
    listed = {
        (method.upper(), path) for path, methods in found["paths"].items() for method in methods
    }
    routes = {
        (method, route.path.replace(":path}", "}"))
        for route in server.app.routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert listed == routes <= set(OPERATIONS)


def test_every_field_of_a_request_is_explained(start: Start) -> None:
    found = document(start())
    for methods in found["paths"].values():
        for spec in methods.values():
            if "requestBody" not in spec:
                continue
            ref = spec["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            schema = found["components"]["schemas"][ref.rpartition("/")[2]]
            missing = [name for name, f in schema["properties"].items() if "description" not in f]
            assert not missing
    assert not MEANING.keys() & UNSUPPORTED.keys() - {"function_call"}


def test_limits_are_those_of_the_server(start: Start) -> None:
    found = document(start(server=ServerConfig(port=0, limits=SMALL)))
    assert found["x-request-limits"]["max_n"] == 4
    chat = found["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert chat["n"]["anyOf"][0]["maximum"] == 4
    assert "`max_prompts`: 4" in found["info"]["description"]


def test_keys_are_documented_where_they_are_needed(start: Start) -> None:
    found = document(start(server=ServerConfig(port=0, api_keys=("secret",))))
    chat = found["paths"]["/v1/chat/completions"]["post"]
    assert chat["security"] == [{"Bearer": []}]
    assert {"401", "429"} <= set(chat["responses"])
    health = found["paths"]["/health"]["get"]
    assert health["security"] == []
    assert "401" not in health["responses"]
    assert "secret" not in str(found)


def test_pages_can_be_turned_off(start: Start) -> None:
    server = start(server=ServerConfig(port=0, disable_docs=True, disable_playground=True))
    with server.http() as http:
        for path in ("/", "/docs", "/openapi.json"):
            assert http.get(path).status_code == 404


def test_nothing_foreign_can_run_in_the_pages(start: Start) -> None:
    server = start()
    with server.http() as http:
        for path in ("/", "/docs"):
            answer = http.get(path)
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy
            assert "innerHTML" not in answer.text
            assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
            assert len(answer.content) < 60_000


@pytest.fixture(scope="module")
def fuzzed(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[RunningServer]:
    running = scripted(
        checkpoint,
        tokenizer,
        "Hello there.",
        max_model_len=64,
        server=ServerConfig(port=0, limits=SMALL),
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def api(fuzzed: RunningServer) -> BaseSchema:
    schema = schemathesis.openapi.from_dict(document(fuzzed))
    schema.config.update(base_url=fuzzed.url)
    return schema


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as one:
        one.trust_env = False
        yield one


def settings(cases: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def thinned(draw: st.DrawFn, cases: st.SearchStrategy[Case]) -> Case:
    """Of a body's optional fields at most three: of fifty, two always exclude each other."""
    case = draw(cases)
    if isinstance(case.body, dict):
        needed = REQUIRED & case.body.keys()
        kept = draw(st.sets(st.sampled_from(sorted(case.body) or [""]), max_size=3))
        case.body = {name: case.body[name] for name in case.body if name in needed | kept}
    return case


FUZZED = [
    pytest.param(key, mode, id=f"{key[0]} {key[1]} {mode.value}")
    for key, operation in OPERATIONS.items()
    for mode in GenerationMode
    if operation.body is not None or mode is GenerationMode.POSITIVE  # else nothing is negative
]
NUM_VARIED = 2 * sum(each.body is not None for each in OPERATIONS.values())


@pytest.mark.timeout(max(300, CASES // 5))
@pytest.mark.parametrize(("key", "mode"), FUZZED)
def test_whatever_is_sent_the_answer_is_a_documented_one(
    api: BaseSchema, session: requests.Session, key: tuple[str, str], mode: GenerationMode
) -> None:
    method, path = key
    if path not in api.raw_schema["paths"]:
        pytest.skip(f"{path} is not served")
    answered: Counter[int] = Counter()
    cases = api[path][method].as_strategy(generation_mode=mode)

    @settings(-(-CASES // NUM_VARIED))
    @hypothesis.given(thinned(cases) if mode is GenerationMode.POSITIVE else cases)
    def fuzz(case: Case) -> None:
        answer = case.call(session=session, timeout=30)
        answered[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    fuzz()
    print(f"{method} {path} {mode.value}: {answered.total()} cases, answered {dict(answered)}")
    if OPERATIONS[key].body is None:
        assert answered
        return
    assert answered.total() >= CASES / NUM_VARIED
    if mode is GenerationMode.POSITIVE:  # the checks of input were passed, too
        assert answered[200] >= answered.total() / 10


ODD = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=20)
LINES = st.sampled_from(
    ["GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "PRI", "\0", "BREW"]
)
PATHS = st.sampled_from(
    [path for _, path in OPERATIONS] + ["*", "//", "/..", "/%2e%2e/v1/models", "/v1/models/%00"]
)
TYPES = st.sampled_from(
    ["application/json", "application/json; charset=utf-16", "application/vnd.api+json",
     "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "a", ""]
)  # fmt: skip
BODIES = st.sampled_from(
    [b"", b"\0", b"{}", b"[]", b"null", b"NaN", b'{"a":1,"a":2}', b'{"model": "\\ud800"}',
     b'{"model": "demo", "prompt": "\\u0000", "max_tokens": 1}',
     b'{"model": "demo", "prompt": "a", "seed": ' + b"9" * 400 + b"}",
     b'{"model": "demo", "prompt": "a", "temperature": 1e999}',
     b'{"model": "demo", "prompt": [' + b"9" * 60 + b"]}",
     b'{"model": "demo", "messages": [{"role": "user", "content": "\\u0000\\uffff"}]}',
     b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 5000, b"a=b&c=d"]
) | st.binary(max_size=40)  # fmt: skip


@settings(max(300, CASES // 10))
@hypothesis.given(LINES | ODD, PATHS | ODD, TYPES | ODD, st.tuples(ODD, ODD), BODIES)
def test_no_odd_bytes_break_the_server(
    fuzzed: RunningServer,
    method: str,
    path: str,
    kind: str,
    header: tuple[str, str],
    body: bytes,
) -> None:
    """Raw, for clients refuse to send most of it."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\n"
        f"{header[0]}: {header[1]}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", fuzzed.port), timeout=30) as connection:
        connection.sendall(head.encode("latin-1") + body)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    if not answer:  # the client has left before its body was whole
        return
    version, status, *_ = answer.split(b" ", 2)
    assert version == b"HTTP/1.1"
    assert int(status) in {200, 204, 400, 404, 405, 408, 413, 415, 431, 499}, answer

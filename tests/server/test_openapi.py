"""The OpenAPI document, and what a fuzzer that reads it finds over a real socket.

JAXSERVE_FUZZ_CASES is how many cases the fuzzer sends, at least; `make fuzz` sends 50,000.
"""

import copy
import itertools
import math
import os
import random
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
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from schemathesis.specs.openapi.definitions import OPENAPI_31

from jaxserve.checkpoint import Checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.server.openapi_routes import OPERATIONS
from jaxserve.server_config import RequestLimits, ServerConfig
from tests.server.conftest import Start
from tests.server.running import RunningServer, scripted

CASES = int(os.environ.get("JAXSERVE_FUZZ_CASES", "2000"))
FIELDS = 6  # optional ones at a time
REQUIRED = {"model", "prompt", "messages", "tokens", "input", "max_tokens"}
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
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
        max_model_len=256,
        server=ServerConfig(port=0, limits=SMALL),
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def raw(fuzzed: RunningServer) -> dict[str, Any]:
    return document(fuzzed)


def views(raw: dict[str, Any], key: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """The document with a few of an operation's optional fields at a time; all have their turn.

    With all fifty at once two always exclude each other, so nothing gets beyond the first checks;
    and it is slow.
    """
    body = OPERATIONS[key].body
    if body is None:
        yield raw
        return
    fields = raw["components"]["schemas"][body.__name__]["properties"]
    needed = [name for name in fields if name in REQUIRED]
    optional = [name for name in fields if name not in REQUIRED]
    random.Random(0).shuffle(optional)
    for few in itertools.batched(optional or [""], FIELDS):
        view = copy.deepcopy(raw)
        schema = view["components"]["schemas"][body.__name__]
        schema["properties"] = {name: fields[name] for name in fields if name in {*needed, *few}}
        yield view


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
        suppress_health_check=SLOW,
    )


def mended(value: Any) -> Any:
    """A body as it should be where JSON schema cannot say it: 1.0 is no integer here, prompt and
    messages exclude each other, a message has content and an answer to a call follows the call."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [mended(each) for each in value]
        case {"prompt": _, "messages": _}:
            return mended({name: each for name, each in value.items() if name != "messages"})
        case {"role": str(role), **rest}:
            rest.pop("tool_calls", None)
            content = rest.pop("content", None) or "a"
            return {**rest, "role": "user" if role == "tool" else role, "content": mended(content)}
        case dict():
            return {name: mended(each) for name, each in value.items()}
    return value


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
    fuzzed: RunningServer,
    raw: dict[str, Any],
    session: requests.Session,
    key: tuple[str, str],
    mode: GenerationMode,
) -> None:
    (method, path), operation = key, OPERATIONS[key]
    if path not in raw["paths"]:
        pytest.skip(f"{path} is not served")
    answered: Counter[int] = Counter()

    def check(case: Case) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = mended(case.body)
        answer = case.call(session=session, timeout=30)
        answered[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    documents = list(views(raw, key))
    for view in documents:
        schema = schemathesis.openapi.from_dict(view)
        schema.config.update(base_url=fuzzed.url)
        cases = schema[path][method].as_strategy(generation_mode=mode)
        fuzz = hypothesis.given(cases)(check)
        settings(math.ceil(CASES / NUM_VARIED / len(documents)))(fuzz)()
    print(f"{method} {path} {mode.value}: {answered.total()} cases, answered {dict(answered)}")
    if operation.body is None:
        assert answered
        return
    assert answered.total() >= CASES / NUM_VARIED
    if mode is GenerationMode.POSITIVE:  # the checks of input were passed, too
        assert answered[200] >= answered.total() / 20


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

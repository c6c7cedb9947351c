"""Bad inputs on the routes beyond completions and chat, unary and streamed, while others stream.

The bad fields are those of OpenAI's two routes, in the names of each API; what only one API knows
stands here.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jaxserve.checkpoint import Checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.server_config import ServerConfig
from tests.server.bad_requests import AWAY, BOTH, IMAGES, OF_CHAT, OF_COMPLETIONS
from tests.server.conftest import Start
from tests.server.running import LIMITS, RunningServer, check, engine_of, scripted

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
EMBEDDINGS, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/tokenize", "/detokenize"
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "demo", "prompt": "hi"},
    CHAT: {"model": "demo", "messages": [{"role": "user", "content": "hi"}]},
    RESPONSES: {"model": "demo", "input": "hi"},
    MESSAGES: {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    COUNT: {"model": "demo", "messages": [{"role": "user", "content": "hi"}]},
    EMBEDDINGS: {"model": "demo", "input": "hi"},
    TOKENIZE: {"model": "demo", "prompt": "hi"},
    DETOKENIZE: {"model": "demo", "tokens": [5]},
}
STREAMS = (COMPLETIONS, CHAT, RESPONSES, MESSAGES)
NAMES: dict[str, dict[str, str]] = {  # OpenAI's field: this API's
    RESPONSES: {"messages": "input", "max_tokens": "max_output_tokens"},
    MESSAGES: {"stop": "stop_sequences"},
    COUNT: {},
    EMBEDDINGS: {"prompt": "input"},
    TOKENIZE: {},
    DETOKENIZE: {"prompt": "tokens"},
}
type Row = tuple[dict[str, Any], str, str | None]


@pytest.fixture(scope="module")
def http(busy: RunningServer) -> Iterator[httpx.Client]:
    with busy.http() as client:
        yield client


def rows_of(route: str) -> list[Row]:
    """The rows of OpenAI's tables that are bad on this route, too."""
    prompts = [row for row in OF_COMPLETIONS if "prompt" in row[0]]
    messages = [row for row in OF_CHAT if "messages" in row[0]]
    rows: list[Row] = list(BOTH)
    match route:
        case "/v1/responses":
            # A string is an input, and what a model is to answer may come from an assistant.
            rows += [row for row in OF_CHAT if row[0] != {"messages": "hi"} and not _tools(row)]
        case "/v1/messages" | "/v1/messages/count_tokens":
            rows += [row for row in OF_CHAT if not _tools(row)]
        case "/v1/embeddings":
            rows += prompts
        case "/tokenize":
            rows += [row for row in prompts if row[0]["prompt"] not in ("", AWAY)] + messages
        case _:
            rows += [row for row in prompts if _is_no_list_of_ids(row[0]["prompt"])]
    if route in (TOKENIZE, DETOKENIZE):  # these need no model
        rows = [row for row in rows if row[0] not in ({"model": AWAY}, {"messages": AWAY})]
    if route == RESPONSES:  # where nothing is stored, though a client may ask for it
        rows = [row for row in rows if row[0] != {"store": True}]
    names = NAMES[route]
    # Texts of a million tokens take seconds, and all routes read them by the same code.
    rows = [row for row in rows if len(str(row[0])) < 2_000_000]
    return [({names.get(k, k): v for k, v in row[0].items()}, *row[1:]) for row in rows]


def _tools(row: Row) -> bool:
    """Tools are written in another way by each API."""
    return "tools" in row[0]


def _is_no_list_of_ids(value: Any) -> bool:
    """Bad for /detokenize, too: not an empty list, which is an empty text, nor a long one."""
    if not isinstance(value, list):
        return True
    return bool(value) and not all(type(i) is int and 0 <= i < 49152 for i in value)


def send(http: httpx.Client, route: str, change: dict[str, Any]) -> list[httpx.Response]:
    """The answers, whole and where there is one streamed."""
    body = GOOD[route] | change
    if route == TOKENIZE and "messages" in change and "prompt" not in change:
        del body["prompt"]
    body = {name: value for name, value in body.items() if value is not AWAY}
    answers = [http.post(route, json=body)]
    if route in STREAMS and "stream" not in change:
        answers.append(http.post(route, json=body | {"stream": True}))
    return answers


@pytest.mark.parametrize("route", NAMES)
def test_bad_fields_are_refused_on_every_route(
    busy: RunningServer, http: httpx.Client, route: str
) -> None:
    num_before = len(engine_of(busy).requests)
    for change, _, _ in rows_of(route):
        for answer in send(http, route, change):
            assert answer.status_code in (400, 404), (change, answer.text[:300])
            error = answer.json()["error"]
            check(answer, answer.status_code, error.get("code"))
            assert error["type"] == "invalid_request_error"
            # The field at fault is one that was sent.
            told = error["message"] if "/messages" in route else str(error["param"])
            assert any(name.rstrip("s") in told or told in name for name in change), (change, told)
    assert len(engine_of(busy).requests) == num_before


F = {"name": "f", "parameters": {"type": "object"}}
OF_RESPONSES = [{"type": "function"} | F]
OF_MESSAGES = [{"name": "f", "input_schema": {"type": "object"}}]
ELSEWHERE: list[tuple[str, dict[str, Any], str]] = [  # the last: what the message speaks of
    (RESPONSES, {"tools": OF_RESPONSES * 129}, "tools has 129"),
    (RESPONSES, {"tools": OF_RESPONSES * 2, "tool_choice": "required"}, "comes twice"),
    (RESPONSES, {"tools": [{"type": "function", "name": "a", "parameters": []}]}, "parameters"),
    (RESPONSES, {"input": [{"role": "user", "content": "a"}] * 10_001}, "input has 10001"),
    (RESPONSES, {"truncation": 5}, "truncation"),
    (RESPONSES, {"max_output_tokens": 2**63}, "max_output_tokens"),
    *((RESPONSES, {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": url}]}]}, "input[0].content[0].type")
      for url in IMAGES),
    (MESSAGES, {"tools": OF_MESSAGES * 129}, "tools has 129"),
    (MESSAGES, {"tools": OF_MESSAGES * 2, "tool_choice": {"type": "any"}}, "comes twice"),
    (MESSAGES, {"tools": [{"name": "a", "input_schema": []}]}, "input_schema"),
    (MESSAGES, {"messages": [{"role": "user", "content": "a"}] * 10_001}, "messages has 10001"),
    (MESSAGES, {"max_tokens": 200_000}, "max_tokens"),
    *((MESSAGES, {"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "url", "url": url}}]}]}, "messages[0].content[0].type")
      for url in IMAGES),
    (TOKENIZE, {"messages": GOOD[CHAT]["messages"], "prompt": "a"}, "either prompt or messages"),
    (TOKENIZE, {"messages": GOOD[CHAT]["messages"], "tools": []}, "tools"),
    (TOKENIZE, {"return_token_strs": "yes"}, "return_token_strs"),
    (EMBEDDINGS, {"dimensions": "8"}, "dimensions"),
    (EMBEDDINGS, {"dimensions": 0}, "dimensions"),
    (EMBEDDINGS, {"encoding_format": "int8"}, "encoding_format"),
    (EMBEDDINGS, {"inputs": "a"}, "inputs"),
    (EMBEDDINGS, {"priority": 2**70}, "priority"),
    (DETOKENIZE, {"tokens": AWAY}, "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("route", "change", "words"),
    ELSEWHERE,
    ids=[f"{route}-{str(change)[:40]}-{i}" for i, (route, change, _) in enumerate(ELSEWHERE)],
)
def test_what_only_this_api_knows_is_refused(
    busy: RunningServer, http: httpx.Client, route: str, change: dict[str, Any], words: str
) -> None:
    num_before = len(engine_of(busy).requests)
    for answer in send(http, route, change):
        error = answer.json()["error"]
        check(answer, 400, error.get("code"))
        assert words in error["message"]
    assert len(engine_of(busy).requests) == num_before


CYCLE = {"$ref": "#"}
DEEP: dict[str, Any] = {"type": "object"}
for _ in range(40):  # two levels each; 64 are allowed
    DEEP = {"type": "object", "properties": {"a": DEEP}}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "nonsense"}, CYCLE, {"$ref": "http://169.254.169.254/x.json"}, DEEP,
    {"enum": [str(i) for i in range(100_000)]}, {"const": "x" * 1_000_000},
]  # fmt: skip
FORMS: list[dict[str, Any]] = [
    *({"regex": regex} for regex in ("(", "(?<=a)b", "((a{1,1000}){1,1000}){1,1000}", "a\0b")),
    {"grammar": "start: ("}, {"grammar": ""}, {"choice": []}, {"json": ""}, {"choice": [1]},
]  # fmt: skip


def test_forms_that_cannot_be_are_refused_on_every_route_that_takes_them(
    busy: RunningServer, http: httpx.Client
) -> None:
    num_before = len(engine_of(busy).requests)
    for schema in SCHEMAS:
        spec = {"name": "a", "schema": schema}
        form = {"type": "json_schema", "json_schema": spec}
        text = {"format": {"type": "json_schema"} | spec}
        output = {"format": {"type": "json_schema", "schema": schema}}
        for route, change in (
            (COMPLETIONS, {"response_format": form}),
            (CHAT, {"response_format": form}),
            (RESPONSES, {"text": text}),
            (MESSAGES, {"output_config": output}),
        ):
            for answer in send(http, route, change):
                check(answer, 400, answer.json()["error"].get("code"))
                assert answer.elapsed.total_seconds() < 5
    for form in FORMS:
        for route in (COMPLETIONS, CHAT, RESPONSES):
            for answer in send(http, route, {"structured_outputs": form}):
                check(answer, 400, answer.json()["error"]["code"])
                assert answer.json()["error"]["param"].startswith("structured_outputs")
    assert len(engine_of(busy).requests) == num_before


@pytest.mark.parametrize("route", GOOD)
def test_bodies_types_methods_and_models_are_checked_on_every_route(
    busy: RunningServer, http: httpx.Client, route: str
) -> None:
    num_before = len(engine_of(busy).requests)
    content = json.dumps(GOOD[route]).encode()
    own = {"content-type": "application/json"}
    for body in (b"", b"{", b"[1]", b"null", b'{"model": "\xff"}', b'{"model": "\\ud800"}',
                 b"[" * 100_000, b'{"model": NaN}', b'{"model": ' + b"9" * 5000 + b"}",
                 b'{"model": "demo", "model": "demo"}', "{}".encode("utf-16")):  # fmt: skip
        code = None if "/v1/messages" in route else "invalid_json"
        check(http.post(route, content=body, headers=own), 400, code)
    for headers in ({"content-type": "text/plain"}, {}, own | {"content-encoding": "gzip"}):
        code = None if "/v1/messages" in route else "unsupported_media_type"
        check(http.post(route, content=content, headers=headers), 415, code)
    large = b" " * (LIMITS.max_body_bytes + 1)
    code = None if "/v1/messages" in route else "request_too_large"
    check(http.post(route, content=large, headers=own), 413, code)
    answer = http.get(route)
    check(answer, 405, None if "/v1/messages" in route else "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    for name in ("nope", "../../etc/passwd", "", "demo "):
        for answer in send(http, route, {"model": name}):
            check(answer, 404, None if "/v1/messages" in route else "model_not_found")
    assert len(engine_of(busy).requests) == num_before


@pytest.mark.parametrize("route", GOOD)
def test_a_nul_character_is_text_on_every_route(http: httpx.Client, route: str) -> None:
    text = json.dumps(GOOD[route]).replace('"hi"', '"a\\u0000b"')
    body = json.loads(text)
    if route in STREAMS:
        body |= {"max_output_tokens" if route == RESPONSES else "max_tokens": 1}
    assert http.post(route, json=body).status_code == 200


def test_keys_are_asked_for_on_every_route(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    config = ServerConfig(port=0, api_keys=("sk-one",))
    running = scripted(checkpoint, tokenizer, "Hi.", server=config)
    with running.http() as http:
        for route, body in GOOD.items():
            for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic sk-one"}):
                answer = http.post(route, json=body, headers=headers)
                check(answer, 401, None if "/v1/messages" in route else "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
            key = {"authorization": "Bearer sk-one"}
            assert http.post(route, json=body, headers=key).status_code == 200
            # Nor does a path that only begins like one that is open, or that is written otherwise.
            for path in (f"{route}/", f"/x/..{route}", f"/{route}", route.replace("/", "//")):
                assert http.post(path, json=body).status_code == 401
    running.stop()


def test_a_full_queue_and_a_draining_server_ask_to_come_back_on_every_route(start: Start) -> None:
    full = start(refuse_after=0)
    draining = start()
    draining.app.context.draining = True
    for running, code in ((full, "server_overloaded"), (draining, "server_shutting_down")):
        with running.http() as http:
            for route in (*STREAMS, EMBEDDINGS):
                for answer in send(http, route, {}):
                    check(answer, 503, None if "/v1/messages" in route else code)
                    assert int(answer.headers["retry-after"]) >= 1
                    if "/v1/messages" not in route:
                        assert answer.json()["error"]["type"] == "service_unavailable_error"
        assert running.llm.client.num_unfinished == 0


def counted(http: httpx.Client) -> list[str]:
    """What the engine has computed and holds."""
    names = ("prompt_tokens", "generation_tokens", "iteration_tokens", "kv_cache_usage")
    names += ("num_requests", "prefix_cache", "late_compiles")
    lines = http.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith(tuple(f"jaxserve:{n}" for n in names))]
    assert len(found) > len(names)
    return found


def test_nothing_bad_costs_a_real_engine_a_step_or_a_page(real: RunningServer) -> None:
    rows = {COMPLETIONS: BOTH + OF_COMPLETIONS, CHAT: BOTH + OF_CHAT}
    rows |= {route: rows_of(route) for route in NAMES}
    with real.http() as http:
        before = counted(http)
        for route, changes in rows.items():
            for change, _, _ in changes:
                # Of this server, whose limits are larger and which has a parser of calls.
                if len(str(change)) > 10_000 or change.get("tool_choice") == "auto":
                    continue
                for answer in send(http, route, change):
                    assert answer.status_code in (400, 404), (route, change, answer.text[:200])
                assert counted(http) == before, (route, change)

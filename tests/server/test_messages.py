"""The Messages API: Anthropic's client against a scripted model, and what is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import pytest

from jaxserve.server.anthropic_input import as_chat
from jaxserve.server.anthropic_protocol import MessagesRequest
from jaxserve.server.schema import read
from jaxserve.server_config import RequestLimits, ServerConfig
from tests.server.conftest import Start
from tests.server.running import (
    RunningServer,
    check_leaving,
    engine_of,
    forced_call,
    kinds_of,
    prompt_of,
)

ROUTE, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
OSLO = {"city": "Oslo", "days": 2}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
ALL = ServerConfig(
    port=0, enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3"
)


@pytest.fixture
def connect() -> Iterator[Callable[[RunningServer], Any]]:
    clients: list[anthropic.Anthropic] = []

    def make(server: RunningServer) -> Any:
        clients.append(anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


type Connect = Callable[[RunningServer], Any]  # its answers are checked by what they hold


def test_a_message_has_content_usage_and_a_reason(start: Start, connect: Connect) -> None:
    server = start("Hello there.")
    answer = connect(server).messages.create(
        model="demo", max_tokens=50, messages=USER, system="Be kind.", stop_sequences=["zzz"],
        metadata={"user_id": "me"}, service_tier="auto",
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5},
    )  # fmt: skip
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "demo")
    assert [block.to_dict() for block in answer.content] == [
        {"type": "text", "text": "Hello there."}
    ]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.id.startswith("msg_")
    assert answer._request_id
    assert answer.usage.output_tokens == 4  # with the token that ended it
    request = engine_of(server).requests[-1]
    assert answer.usage.input_tokens == len(request.prompt_token_ids)
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.stop) == (0.5, 0.9, 5, ["zzz"])
    assert request.max_tokens == 50
    prompt = prompt_of(server)
    assert "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>" in prompt


def test_a_stream_joins_to_the_whole(start: Start, connect: Connect) -> None:
    server = start("Grüße, 世界! \U0001f600 ok", delay_s=0.002)
    client = connect(server)
    whole = client.messages.create(model="demo", max_tokens=50, messages=USER)
    events = list(client.messages.create(model="demo", max_tokens=50, messages=USER, stream=True))
    assert kinds_of(events) == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    first: Any = events[0]
    assert (first.message.content, first.message.stop_reason) == ([], None)
    assert first.message.usage.input_tokens == whole.usage.input_tokens
    with client.messages.stream(model="demo", max_tokens=50, messages=USER) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "Grüße, 世界! \U0001f600 ok"
    facts = {name: value for name, value in whole.to_dict().items() if name != "id"}
    assert final.to_dict().items() >= facts.items()
    body = {"model": "demo", "max_tokens": 5, "messages": USER, "stream": True}
    with server.http() as http, http.stream("POST", ROUTE, json=body) as raw:
        assert raw.headers["request-id"]
        lines = [line for line in raw.iter_lines() if line]
    assert lines[2:4] == ["event: ping", 'data: {"type":"ping"}']
    assert lines[-1] == 'data: {"type":"message_stop"}'


def test_an_answer_tells_why_it_ended(start: Start, connect: Connect) -> None:
    client = connect(start("one two three four"))
    for stops, most, reason, sequence, text in (
        (["zzz", "three"], 50, "stop_sequence", "three", "one two "),
        (["zzz"], 2, "max_tokens", None, "one two"),
        ([], 50, "end_turn", None, "one two three four"),
    ):
        fields: Any = {
            "model": "demo", "max_tokens": most, "messages": USER, "stop_sequences": stops,
        }  # fmt: skip
        whole = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            streamed = stream.get_final_message()
        for answer in (whole, streamed):
            block: Any = answer.content[0]
            assert (answer.stop_reason, answer.stop_sequence) == (reason, sequence)
            assert block.text == text


def test_thoughts_text_and_calls_are_blocks(start: Start, connect: Connect) -> None:
    server = start(f"<think>Hm.</think>Let me see. {CALL}\n{CALL}", server=ALL, delay_s=0.001)
    client = connect(server)
    fields: Any = {"model": "demo", "max_tokens": 200, "messages": USER, "tools": [WEATHER]}
    whole = client.messages.create(**fields)
    events = list(client.messages.create(**fields, stream=True))
    with client.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    one_block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds_of(events) == ["message_start", *one_block * 4, "message_delta", "message_stop"]
    deltas = [e for e in events if e.type == "content_block_delta"]
    assert {(e.index, e.delta.type) for e in deltas} == {
        (0, "thinking_delta"), (1, "text_delta"), (2, "input_json_delta"), (3, "input_json_delta"),
    }  # fmt: skip
    for answer in (whole, streamed):
        thought, text, *calls = [block.to_dict() for block in answer.content]
        assert thought == {"type": "thinking", "thinking": "Hm.", "signature": ""}
        assert text == {"type": "text", "text": "Let me see."}
        assert [(c["type"], c["name"], c["input"]) for c in calls] == [
            ("tool_use", "weather", OSLO)
        ] * 2
        assert len({c["id"] for c in calls}) == 2
        assert answer.stop_reason == "tool_use"
        assert answer.usage.output_tokens_details is not None
        assert answer.usage.output_tokens_details.thinking_tokens > 0
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    single = client.messages.create(**fields, tool_choice=choice)
    assert [block.type for block in single.content] == ["thinking", "text", "tool_use"]
    hidden = client.messages.create(**fields, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in hidden.content] == ["text", "tool_use", "tool_use"]
    # What was answered can be sent back.
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "Rain."}
        for block in whole.content
        if block.type == "tool_use"
    ]
    fields["messages"] = [
        *USER,
        {"role": "assistant", "content": [block.to_dict() for block in whole.content]},
        {"role": "user", "content": results},
    ]
    assert client.messages.create(**fields).stop_reason == "tool_use"
    assert prompt_of(server).count("Rain.") == 2


def test_tool_choices_force_and_forbid(start: Start, connect: Connect) -> None:
    client = connect(start(forced_call))
    fields: Any = {"model": "demo", "max_tokens": 50, "messages": USER, "tools": [WEATHER]}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        whole = client.messages.create(**fields, tool_choice=choice)
        with client.messages.stream(**fields, tool_choice=choice) as stream:
            streamed = stream.get_final_message()
        for answer in (whole, streamed):
            call: Any = answer.content[0]
            assert (call.name, call.input, answer.stop_reason) == (
                "weather", {"city": "Oslo"}, "tool_use",
            )  # fmt: skip
    plain = connect(start(CALL, server=ALL)).messages.create(**fields, tool_choice={"type": "none"})
    assert [block.type for block in plain.content] == ["text"]


def test_a_call_that_was_cut_keeps_what_there_is(start: Start, connect: Connect) -> None:
    client = connect(start('{"city": "Oslo", "days": 2}'))
    answer = client.messages.create(
        model="demo", max_tokens=4, messages=USER, tools=[WEATHER],
        tool_choice={"type": "tool", "name": "weather"},
    )  # fmt: skip
    call: Any = answer.content[0]
    assert answer.stop_reason == "max_tokens"
    assert call.input["INVALID_JSON"].startswith('{"city"')


def test_tokens_are_counted_as_they_will_be(start: Start, connect: Connect) -> None:
    client = connect(start("Hello.", max_model_len=100))
    fields: Any = {"model": "demo", "messages": USER, "system": "Be kind."}
    count = client.messages.count_tokens(**fields)
    answer = client.messages.create(**fields, max_tokens=5)
    assert count.input_tokens == answer.usage.input_tokens
    fields["messages"] = [{"role": "user", "content": "word " * 500}]
    assert client.messages.count_tokens(**fields).input_tokens > 500  # more than would fit


def test_an_answer_that_was_begun_is_continued(start: Start, connect: Connect) -> None:
    server = start(" Oslo.")
    begun: Any = [*USER, {"role": "assistant", "content": "It is"}]
    answer = connect(server).messages.create(model="demo", max_tokens=50, messages=begun)
    assert answer.content[0].to_dict() == {"type": "text", "text": " Oslo."}
    assert prompt_of(server).endswith("<|im_start|>assistant\nIt is")
    blocks = [{"type": "text", "text": "It"}, {"type": "text", "text": "is"}]
    begun[1]["content"] = blocks
    connect(server).messages.create(model="demo", max_tokens=50, messages=begun)
    assert prompt_of(server).endswith("<|im_start|>assistant\nIt\nis")


def test_a_schema_binds_the_text(start: Start, connect: Connect) -> None:
    server = start('{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form: Any = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    connect(server).messages.create(model="demo", max_tokens=50, messages=USER, output_config=form)
    bound = engine_of(server).requests[-1].sampling.structured_outputs
    assert bound is not None
    assert bound.json == schema


def test_blocks_become_the_messages_of_their_turns() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [
            {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Wait."},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
            {"type": "tool_use", "id": "t2", "name": "g", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [
                {"type": "text", "text": "one"}]},
            {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
            {"type": "text", "text": "And?"}]},
    ]  # fmt: skip
    data = {
        "model": "demo", "max_tokens": 9, "messages": messages, "system": [
            {"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be brief."}],
        "thinking": {"type": "disabled"},
    }  # fmt: skip
    chat = as_chat(read(MessagesRequest, data), RequestLimits())
    calls = [
        {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"id": "t2", "type": "function", "function": {"name": "g", "arguments": {}}},
    ]

    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    assert chat.messages == [
        {"role": "system", "content": parts("Be kind.", "Be brief.")},
        {"role": "user", "content": parts("a", "b")},
        {"role": "assistant", "content": "Wait.", "reasoning": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "one"},
        {"role": "tool", "tool_call_id": "t2", "content": parts("Error:", "no")},
        {"role": "user", "content": "And?"},
    ]
    assert chat.chat_template_kwargs == {"enable_thinking": False, "thinking": False}


def test_a_client_that_leaves_ends_its_request(start: Start) -> None:
    server = start("word ", ends=False, delay_s=0.002, max_model_len=100_000)
    body = {"model": "demo", "messages": USER, "max_tokens": 90_000}
    check_leaving(server, ROUTE, body, "text_delta")


def test_a_stream_that_fails_says_so(start: Start, connect: Connect) -> None:
    server = start("word ", ends=False, delay_s=0.01, max_model_len=10_000)
    stream = connect(server).messages.create(
        model="demo", max_tokens=9_000, messages=USER, stream=True
    )
    next(event for event in stream if event.type == "content_block_delta")
    engine_of(server).die()
    with pytest.raises(anthropic.APIStatusError) as failed:
        list(stream)
    body: Any = failed.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "api_error")
    assert set(body) == {"type", "error", "request_id"}


def test_errors_have_anthropics_shape_on_these_routes_only(start: Start, connect: Connect) -> None:
    config = ServerConfig(port=0, api_keys=("key",))
    server = start(server=config, refuse_after=0)
    client = connect(server)
    with pytest.raises(anthropic.APIStatusError) as full:
        client.messages.create(model="demo", max_tokens=5, messages=USER)
    assert (full.value.status_code, full.value.response.headers["retry-after"]) == (503, "1")
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="x", max_tokens=5, messages=USER)
    assert missing.value.request_id
    key = {"x-api-key": "key"}
    with server.http() as http:
        for answer, status, kind in (
            (http.post(ROUTE, json={}), 401, "authentication_error"),
            (http.get(ROUTE, headers=key), 405, "invalid_request_error"),
            (http.post("/v1/messages/batches", json={}, headers=key), 404, "not_found_error"),
            (http.post(ROUTE, content=b"{", headers=key), 415, "invalid_request_error"),
            (http.post(ROUTE, content=b"{", headers=key | {"content-type": "application/json"}),
             400, "invalid_request_error"),
        ):  # fmt: skip
            body = answer.json()
            assert (answer.status_code, body["error"]["type"]) == (status, kind)
            assert set(body) == {"type", "error", "request_id"}
            assert set(body["error"]) == {"type", "message"}
            assert body["request_id"] == answer.headers["request-id"]
        other = http.post("/v1/messagesx", json={}, headers=key).json()
        assert set(other) == {"error"}
        assert set(http.get("/v1/models").json()) == {"error"}


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "a"}
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
BAD: list[tuple[str, dict[str, Any], str]] = [  # "": of both routes
    (ROUTE, {"max_tokens": None}, "max_tokens"),
    (ROUTE, {"max_tokens": 0}, "max_tokens"),
    (ROUTE, {"max_tokens": "5"}, "max_tokens"),
    (ROUTE, {"temperature": 3}, "temperature"),
    (ROUTE, {"stop_sequences": "a"}, "stop_sequences"),
    (ROUTE, {"stop_sequences": ["a"] * 9}, "stop_sequences has 9 strings"),
    (ROUTE, {"stop_sequences": [""]}, "stop_sequences has a string of 0"),
    (ROUTE, {"stop": ["a"]}, "unknown field 'stop'"),
    (ROUTE, {"max_completion_tokens": 5}, "unknown field 'max_completion_tokens'"),
    (ROUTE, {"container": "c"}, "container is not supported"),
    (ROUTE, {"inference_geo": "eu"}, "inference_geo is not supported"),
    (ROUTE, user({"type": "text", "text": "word " * 200}), "context"),
    (ROUTE, {"tools": [WEATHER]}, "--enable-auto-tool-choice"),
    (COUNT, {"max_tokens": 5}, "unknown field 'max_tokens'"),
    ("", {"mcp_servers": [{"name": "a"}]}, "mcp_servers is not supported"),
    ("", {"speed": "fast"}, "speed is not supported"),
    ("", {"context_management": {"edits": [{"type": "x"}]}}, "context_management is not"),
    ("", {"thinking": {"type": "between_tools"}}, "thinking.type='between_tools' is not"),
    ("", {"thinking": {"type": "hard"}}, "thinking.type"),
    ("", {"system": 1}, "system"),
    ("", {"system": [{"type": "image"}]}, "system[0].type='image' is not supported"),
    ("", {"messages": []}, "messages is empty"),
    ("", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ("", {"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    ("", {"messages": [{"role": "user", "content": "a", "name": "b"}]},
     "unknown field 'messages[0].name'"),
    ("", user(), "messages[0].content is empty"),
    ("", user("a"), "messages[0].content[0]"),
    ("", user({"type": "text"}), "messages[0].content[0].text is missing"),
    ("", user({"type": "image", "source": {}}), "messages[0].content[0].type='image'"),
    ("", user(USE), "messages[0].content[0].type='tool_use' is not supported here"),
    ("", user(RESULT), "messages[0].content[0].tool_use_id='t' answers no call"),
    ("", user(RESULT | {"content": [{"type": "document"}]}),
     "messages[0].content[0].content[0].type='document'"),
    ("", {"messages": [*USER, {"role": "assistant", "content": [USE]}]}, "send its tool_result"),
    ("", {"tools": [{"name": "a"}]}, "tools[0].input_schema is missing"),
    ("", {"tools": [WEATHER | {"name": "a b"}], "tool_choice": {"type": "any"}},
     "tools[0].name='a b' is not allowed"),
    ("", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type='bash_20250124'"),
    ("", {"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading is not"),
    ("", {"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
    ("", {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}},
     "tool_choice names 'x'"),
    ("", {"tools": [WEATHER], "tool_choice": "auto"}, "tool_choice"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("route", "change", "text"),
    [(r, c, t) for route, c, t in BAD for r in ([route] if route else [ROUTE, COUNT])],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_is_refused_in_the_names_of_this_api(
    idle: RunningServer, http: httpx.Client, route: str, change: dict[str, Any], text: str
) -> None:
    body = {"model": "demo", "messages": USER} | ({"max_tokens": 5} if route == ROUTE else {})
    answer = http.post(route, json=body | change)
    streamed = http.post(route, json=body | change | {"stream": True})
    for each in (answer, streamed) if route == ROUTE else (answer,):
        assert each.status_code == 400, each.text
        error = each.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert text in error["message"]
    assert not engine_of(idle).requests


def test_max_tokens_and_the_model_must_be_named(http: httpx.Client) -> None:
    answer = http.post(ROUTE, json={"model": "demo", "messages": USER})
    assert "max_tokens is missing" in answer.json()["error"]["message"]
    for route in (ROUTE, COUNT):
        body = {"messages": USER} | ({"max_tokens": 5} if route == ROUTE else {})
        assert "model is missing" in http.post(route, json=body).json()["error"]["message"]
        answer = http.post(route, json=body | {"model": "x"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")

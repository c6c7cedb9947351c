"""The Responses API: OpenAI's client against a scripted model, and what is refused."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from jaxserve.server.responses_input import as_chat
from jaxserve.server.responses_protocol import ResponsesRequest
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

ROUTE = "/v1/responses"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "strict": False,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
TOOLS = ServerConfig(port=0, enable_auto_tool_choice=True, tool_call_parser="hermes")


@pytest.fixture
def connect() -> Iterator[Callable[[RunningServer], Any]]:
    clients: list[openai.OpenAI] = []

    def make(server: RunningServer) -> Any:
        clients.append(openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


type Connect = Callable[[RunningServer], Any]  # its answers are checked by what they hold


def events_of(stream: Any) -> list[Any]:
    """All events, with what holds of every stream checked."""
    events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert {event.response.status for event in events[:2]} == {"in_progress"}
    return events


def test_a_response_has_text_usage_and_what_was_asked(start: Start, connect: Connect) -> None:
    server = start("Hello there.")
    answer = connect(server).responses.create(
        model="demo", input="Hi", instructions="Be kind.", temperature=0.5, top_p=0.9,
        max_output_tokens=50, metadata={"a": "b"}, user="me", store=True, truncation="auto",
        include=["reasoning.encrypted_content"], reasoning={"effort": "low", "summary": "auto"},
    )  # fmt: skip
    assert (answer.output_text, answer.status, answer.object) == (
        "Hello there.", "completed", "response",
    )  # fmt: skip
    assert answer.id.startswith("resp_")
    assert [item.type for item in answer.output] == ["message"]
    assert answer.usage is not None
    assert answer.usage.output_tokens == 4  # with the token that ended it
    assert answer.usage.total_tokens == answer.usage.input_tokens + 4
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 0.9, 50)
    assert (answer.metadata, answer.user, answer.instructions) == ({"a": "b"}, "me", "Be kind.")
    assert answer.model_extra is not None
    assert answer.model_extra["store"] is False  # nothing is
    sampling = engine_of(server).requests[-1].sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.9)
    assert engine_of(server).requests[-1].max_tokens == 50
    prompt = prompt_of(server)
    assert "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>" in prompt


def test_a_stream_joins_to_the_whole(start: Start, connect: Connect) -> None:
    client = connect(start("Grüße, 世界! \U0001f600 ok", delay_s=0.002))
    whole = client.responses.create(model="demo", input="Hi")
    events = events_of(client.responses.create(model="demo", input="Hi", stream=True))
    assert kinds_of(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    done = next(e for e in events if e.type == "response.output_text.done")
    last = events[-1].response
    assert text == done.text == last.output_text == whole.output_text
    assert text == "Grüße, 世界! \U0001f600 ok"
    assert last.usage == whole.usage
    added = next(e for e in events if e.type == "response.output_item.added")
    assert added.item.content == []
    ids = {e.item_id for e in events if hasattr(e, "item_id")} | {added.item.id}
    assert ids == {last.output[0].id}


def test_the_stream_helper_of_the_client_follows(start: Start, connect: Connect) -> None:
    config = ServerConfig(
        port=0,
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
    )
    client = connect(start(f"<think>Hm.</think>Let me see. {CALL}", server=config))
    with client.responses.stream(model="demo", input="Hi", tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "Let me see."


def test_an_answer_that_was_cut_is_incomplete(start: Start, connect: Connect) -> None:
    client = connect(start("word ", ends=False))
    whole = client.responses.create(model="demo", input="Hi", max_output_tokens=5)
    stream = client.responses.create(model="demo", input="Hi", max_output_tokens=5, stream=True)
    events = events_of(stream)
    assert events[-1].type == "response.incomplete"
    for answer in (whole, events[-1].response):
        assert answer.status == "incomplete"
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert [item.status for item in answer.output] == ["incomplete"]
    done = next(e for e in events if e.type == "response.output_item.done")
    assert done.item.status == "incomplete"


def test_calls_are_items_whole_and_streamed(start: Start, connect: Connect) -> None:
    client = connect(start(f"Let me see. {CALL}\n{CALL}", server=TOOLS, delay_s=0.001))
    whole = client.responses.create(model="demo", input="Hi", tools=[WEATHER], tool_choice="auto")
    events = events_of(
        client.responses.create(model="demo", input="Hi", tools=[WEATHER], stream=True)
    )
    for answer in (whole, events[-1].response):
        message, *calls = answer.output
        assert message.content[0].text == "Let me see."
        assert [call.name for call in calls] == ["weather", "weather"]
        assert len({call.call_id for call in calls}) == 2
        for call in calls:
            assert json.loads(call.arguments) == {"city": "Oslo", "days": 2}
        assert (answer.status, answer.tools[0].name) == ("completed", "weather")
    one_call = [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
    ]  # fmt: skip
    assert kinds_of(events)[-9:] == [*one_call, *one_call, "completed"]
    first = events[-1].response.output[1]
    deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(e.delta for e in deltas if e.item_id == first.id) == first.arguments
    assert {e.output_index for e in deltas} == {1, 2}
    single = client.responses.create(
        model="demo", input="Hi", tools=[WEATHER], parallel_tool_calls=False
    )
    assert [item.type for item in single.output] == ["message", "function_call"]


def test_tool_choices_force_and_allow(start: Start, connect: Connect) -> None:
    client = connect(start(forced_call))
    choice: Any = {"type": "function", "name": "weather"}
    allowed: Any = {
        "type": "allowed_tools", "mode": "required",
        "tools": [{"type": "function", "name": "weather"}],
    }  # fmt: skip
    other = WEATHER | {"name": "other"}
    for given in ("required", choice, allowed):
        answer = client.responses.create(
            model="demo", input="Hi", tools=[WEATHER, other], tool_choice=given
        )
        call: Any = answer.output[0]
        assert (call.type, call.name) == ("function_call", "weather")
        assert json.loads(call.arguments) == {"city": "Oslo"}
    plain = connect(start(CALL, server=TOOLS)).responses.create(
        model="demo", input="Hi", tools=[WEATHER], tool_choice="none"
    )
    assert "<tool_call>" in plain.output_text


def test_reasoning_is_an_item_of_its_own(start: Start, connect: Connect) -> None:
    config = ServerConfig(port=0, reasoning_parser="qwen3")
    client = connect(start("<think>Hm, well.</think>Yes.", server=config, delay_s=0.002))
    whole = client.responses.create(model="demo", input="Hi")
    events = events_of(client.responses.create(model="demo", input="Hi", stream=True))
    assert kinds_of(events)[2:8] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
    ]  # fmt: skip
    thought = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    assert thought == "Hm, well."
    for answer in (whole, events[-1].response):
        reasoning: Any = answer.output[0]
        assert reasoning.type == "reasoning"
        assert [part.text for part in reasoning.content] == ["Hm, well."]
        assert answer.output_text == "Yes."
        assert answer.usage.output_tokens_details.reasoning_tokens > 0


def test_a_schema_binds_the_text(start: Start, connect: Connect) -> None:
    server = start('{"a": 1}')
    client = connect(server)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form: Any = {"type": "json_schema", "name": "x", "schema": schema}
    answer = client.responses.create(model="demo", input="Hi", text={"format": form})
    bound = engine_of(server).requests[-1].sampling.structured_outputs
    assert bound is not None
    assert bound.json == schema
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.to_dict() == form
    client.responses.create(model="demo", input="Hi", text={"format": {"type": "json_object"}})
    bound = engine_of(server).requests[-1].sampling.structured_outputs
    assert bound is not None
    assert bound.json_object


def test_logprobs_come_where_they_are_included(start: Start, connect: Connect) -> None:
    client = connect(start("Hello there."))
    include: Any = ["message.output_text.logprobs"]
    answer = client.responses.create(model="demo", input="Hi", include=include, top_logprobs=2)
    part: Any = answer.output[0].content[0]
    assert [entry.token for entry in part.logprobs][:3] == ["Hello", " there", "."]
    assert [len(entry.top_logprobs) for entry in part.logprobs] == [2, 2, 2, 2]
    events = events_of(
        client.responses.create(model="demo", input="Hi", include=include, stream=True)
    )
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    tokens = [entry.token for e in deltas for entry in e.logprobs]
    assert tokens == [entry.token for entry in part.logprobs]
    whole: Any = events[-1].response.output[0]
    assert [entry.token for entry in whole.content[0].logprobs] == tokens
    thinks = start(server=ServerConfig(port=0, reasoning_parser="qwen3"))
    with pytest.raises(openai.BadRequestError, match="not supported where reasoning"):
        connect(thinks).responses.create(model="demo", input="Hi", include=include)


def test_items_become_the_messages_of_their_turns() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [],
         "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [
            {"type": "output_text", "text": "Wait.", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "id": "fc_2", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c2", "output": "two"},
        {"type": "function_call_output", "call_id": "c1", "output": [
            {"type": "input_text", "text": "one"}]},
        {"role": "user", "content": "And?"},
        {"role": "user", "content": "Well?"},
    ]  # fmt: skip
    body = read(ResponsesRequest, {"model": "demo", "input": items, "instructions": "Be kind."})
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for i, name in ((1, "f"), (2, "g"))
    ]
    assert as_chat(body, RequestLimits()).messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "Wait.", "reasoning": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "user", "content": "And?"},
        {"role": "user", "content": "Well?"},
    ]


def test_what_was_answered_can_be_sent_back(start: Start, connect: Connect) -> None:
    config = ServerConfig(
        port=0, enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3"
    )
    client = connect(start(f"<think>Hm.</think>Let me see. {CALL}", server=config))
    first = client.responses.create(model="demo", input="Hi", tools=[WEATHER])
    call: Any = first.output[-1]
    items: Any = [
        {"role": "user", "content": "Hi"},
        *(item.to_dict() for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."},
    ]
    second = client.responses.create(model="demo", input=items, tools=[WEATHER])
    assert second.status == "completed"


def test_a_client_that_leaves_ends_its_request(start: Start) -> None:
    server = start("word ", ends=False, delay_s=0.002, max_model_len=100_000)
    body = {"model": "demo", "input": "Hi", "max_output_tokens": 90_000}
    check_leaving(server, ROUTE, body, "output_text.delta")


def test_a_stream_that_fails_says_so(start: Start, connect: Connect) -> None:
    server = start("word ", ends=False, delay_s=0.01, max_model_len=10_000)
    stream = connect(server).responses.create(model="demo", input="Hi", stream=True)
    events: list[Any] = []
    for event in stream:
        events.append(event)
        if event.type == "response.output_text.delta":
            engine_of(server).die()
    assert [e.sequence_number for e in events] == list(range(len(events)))
    last = events[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    assert last.response.output[0].status == "incomplete"


def test_truncation_drops_what_does_not_fit(start: Start, connect: Connect) -> None:
    server = start("Hello.", max_model_len=100)
    words = " ".join(str(i) for i in range(200))
    answer = connect(server).responses.create(
        model="demo", input=words, truncation="auto", max_output_tokens=10
    )
    assert answer.truncation == "auto"
    assert answer.usage is not None
    assert answer.usage.total_tokens <= 100
    assert "198 199<|im_end|>" in prompt_of(server)
    assert "0 1 2" not in prompt_of(server)


def test_nothing_is_stored(start: Start, connect: Connect) -> None:
    client = connect(start())
    answer = client.responses.create(model="demo", input="Hi", store=True)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError) as missing:
            ask(answer.id)
        assert missing.value.code == "response_not_found"


def test_a_full_queue_asks_to_come_back(start: Start) -> None:
    server = start(refuse_after=0)
    with server.http() as http:
        for stream in (False, True):
            body = {"model": "demo", "input": "Hi", "stream": stream}
            answer = http.post(ROUTE, json=body)
            assert (answer.status_code, bool(answer.headers["retry-after"])) == (503, True)


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b"}]}
LONG = [{"role": "user", "content": "word " * 200}]
BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"background": True}, "unsupported_parameter", "background"),
    ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
    ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
    ({"prompt": {"id": "p"}}, "unsupported_parameter", "prompt"),
    ({"context_management": [{"type": "compaction"}]}, "unsupported_parameter",
     "context_management"),
    ({"temprature": 1}, "unknown_parameter", "temprature"),
    ({"n": 2}, "unknown_parameter", "n"),
    ({"messages": []}, "unknown_parameter", "messages"),
    ({"input": None}, "invalid_type", "input"),
    ({"input": []}, "empty_array", "input"),
    ({"input": ["a"]}, "invalid_type", "input[0]"),
    ({"input": [{"role": "king", "content": "a"}]}, "invalid_value", "input[0].role"),
    ({"input": [{"role": "user"}]}, "missing_required_parameter", "input[0].content"),
    ({"input": [{"role": "user", "content": "a", "x": 1}]}, "unknown_parameter", "input[0].x"),
    ({"input": [{"type": "web_search_call"}]}, "unsupported_value", "input[0].type"),
    ({"input": [{"type": 1}]}, "invalid_type", "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "unsupported_parameter", "input[0]"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "a"}]},
     "invalid_value", "input[0].call_id"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
     "invalid_value", "input"),
    ({"input": [IMAGE]}, "unsupported_value", "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "invalid_type",
     "input[0].content[0].text"),
    ({"input": LONG}, "context_length_exceeded", "input"),
    ({"max_output_tokens": 0}, "integer_below_min_value", "max_output_tokens"),
    ({"temperature": 3}, "decimal_above_max_value", "temperature"),
    ({"top_p": 0}, "decimal_below_min_value", "top_p"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"include": ["everything"]}, "invalid_value", "include[0]"),
    ({"truncation": "never"}, "invalid_value", "truncation"),
    ({"metadata": {"a": 1}}, "invalid_type", "metadata[...]"),
    ({"reasoning": {"effort": "huge"}}, "invalid_value", "reasoning.effort"),
    ({"reasoning": {"mode": "pro"}}, "unsupported_parameter", "reasoning.mode"),
    ({"stream_options": {"include_usage": True}}, "unknown_parameter",
     "stream_options.include_usage"),
    ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "missing_required_parameter",
     "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "missing_required_parameter",
     "text.format.schema"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a b"}], "tool_choice": "required"},
     "invalid_value", "tools[0].name"),
    ({"tools": [WEATHER | {"defer_loading": True}]}, "unsupported_parameter",
     "tools[0].defer_loading"),
    ({"tools": [WEATHER]}, "unsupported_parameter", "tool_choice"),  # no parser
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "invalid_value",
     "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "unsupported_parameter",
     "tool_choice.type"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "code", "param"), BAD, ids=[f"{str(c)[:40]}-{i}" for i, (c, *_) in enumerate(BAD)]
)
def test_a_bad_request_is_refused_in_the_names_of_this_api(
    idle: RunningServer, http: httpx.Client, change: dict[str, Any], code: str, param: str | None
) -> None:
    for stream in (False, True):
        body = {"model": "demo", "input": "hi", "stream": stream} | change
        answer = http.post(ROUTE, json=body)
        assert answer.status_code == 400, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (code, param), error
        for name in ("messages", "max_tokens", "response_format", "function.name"):
            assert name not in error["message"] or name in change
    assert not engine_of(idle).requests


def test_models_must_be_named_and_known(http: httpx.Client) -> None:
    answer = http.post(ROUTE, json={"input": "hi"})
    assert answer.json()["error"]["code"] == "missing_required_parameter"
    answer = http.post(ROUTE, json={"input": "hi", "model": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert http.get(ROUTE).status_code == 405

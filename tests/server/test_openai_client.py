"""The `openai` client against a scripted model: what OpenAI's and vLLM's users rely on."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pydantic
import pytest

from jaxserve.frontend.parsers.reasoning import Qwen3Parser
from jaxserve.frontend.parsers.registry import REASONING_PARSERS
from jaxserve.request import Request
from jaxserve.server_config import ServerConfig
from tests.server.conftest import Start
from tests.server.running import RunningServer, check_leaving, engine_of, until

USER = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'


@pytest.fixture
def connect() -> Iterator[Callable[[RunningServer], openai.OpenAI]]:
    clients: list[openai.OpenAI] = []

    def make(server: RunningServer) -> openai.OpenAI:
        clients.append(openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


type Connect = Callable[[RunningServer], openai.OpenAI]


def test_models_are_listed_under_all_their_names(start: Start, connect: Connect) -> None:
    server = start(server=ServerConfig(port=0, served_model_name=("one", "two")))
    client = connect(server)
    assert [model.id for model in client.models.list()] == ["one", "two"]
    assert client.models.retrieve("two").id == "two"
    answer = client.completions.create(model="two", prompt="a")
    assert answer.model == "two"


def test_a_completion_has_text_usage_and_a_reason(start: Start, connect: Connect) -> None:
    client = connect(start("Hello there."))
    answer = client.completions.create(model="demo", prompt="Hi", max_tokens=50)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("Hello there.", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4  # with the token that ended it
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    assert answer.id.startswith("cmpl-")
    assert str(answer.system_fingerprint).startswith("jaxserve-")


def test_completions_have_16_tokens_by_default_and_chats_the_rest_of_the_context(
    start: Start, connect: Connect
) -> None:
    server = start("word ", ends=False, max_model_len=100)
    client = connect(server)
    answer = client.completions.create(model="demo", prompt="Hi")
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 16)
    chat = client.chat.completions.create(model="demo", messages=USER)  # type: ignore[arg-type]
    assert chat.usage is not None
    assert (chat.choices[0].finish_reason, chat.usage.total_tokens) == ("length", 100)
    answer = client.completions.create(model="demo", prompt=[5] * 90, max_tokens=50)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 100  # clamped, as vLLM does


def test_prompts_and_choices_are_numbered_in_order(start: Start, connect: Connect) -> None:
    def answer(request: Request, choice: int) -> str:
        return f"{request.prompt_token_ids[0]}/{choice}"

    client = connect(start(answer))
    for stream in (False, True):
        prompts: Any = [[40], [50]]
        result: Any = client.completions.create(
            model="demo", prompt=prompts, n=2, temperature=1, stream=stream
        )
        texts: dict[int, str] = {}
        for each in result if stream else [result]:
            for choice in each.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        assert texts == {0: "40/0", 1: "40/1", 2: "50/0", 3: "50/1"}


def test_streams_join_to_the_whole_and_tell_usage_when_asked(
    start: Start, connect: Connect
) -> None:
    client = connect(start("Grüße, 世界! \U0001f600 ok", delay_s=0.005))
    messages: Any = USER
    whole = client.chat.completions.create(model="demo", messages=messages)
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content == "Grüße, 世界! \U0001f600 ok"
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1
    plain = list(client.chat.completions.create(model="demo", messages=messages, stream=True))
    assert all(c.usage is None for c in plain)
    every = list(
        client.chat.completions.create(
            model="demo",
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        )
    )
    assert all(c.usage is not None for c in every)


def test_a_stream_ends_with_done(start: Start) -> None:
    server = start()
    with server.http() as http:
        body = {"model": "demo", "messages": USER, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_stop_strings_are_cut_and_told(start: Start, connect: Connect) -> None:
    client = connect(start("one two three four"))
    answer = client.completions.create(model="demo", prompt="a", stop=["three", "zzz"])
    assert answer.choices[0].text == "one two "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "three"  # type: ignore[attr-defined]
    extra = {"include_stop_str_in_output": True}
    answer = client.completions.create(model="demo", prompt="a", stop="three", extra_body=extra)
    assert answer.choices[0].text == "one two three"


def test_echo_and_logprobs_cover_prompt_and_output(start: Start, connect: Connect) -> None:
    client = connect(start("Hello there."))
    answer = client.completions.create(
        model="demo", prompt="Hi you", echo=True, logprobs=2, max_tokens=3
    )
    choice = answer.choices[0]
    assert choice.text == "Hi youHello there."
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["Hi", " you", "Hello", " there", "."]
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == [-0.25, -0.5, -0.5, -0.5]
    assert logprobs.text_offset == [0, 2, 6, 11, 17]
    scored = client.completions.create(
        model="demo", prompt="Hi you", echo=True, logprobs=0, max_tokens=0
    )
    assert scored.choices[0].text == "Hi you"
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.tokens == ["Hi", " you"]
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 1


def test_chat_logprobs_put_the_chosen_token_first(start: Start, connect: Connect) -> None:
    client = connect(start("Hello there."))
    messages: Any = USER
    answer = client.chat.completions.create(
        model="demo", messages=messages, logprobs=True, top_logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert [token.token for token in found.content][:3] == ["Hello", " there", "."]
    assert [len(token.top_logprobs) for token in found.content] == [2, 2, 2, 2]
    assert found.content[0].top_logprobs[0].token == "Hello"
    assert found.content[0].bytes == list(b"Hello")
    none = client.chat.completions.create(model="demo", messages=messages, logprobs=True)
    assert none.choices[0].logprobs is not None
    assert none.choices[0].logprobs.content is not None
    assert none.choices[0].logprobs.content[0].top_logprobs == []


def test_vllm_fields_reach_the_engine(start: Start, connect: Connect) -> None:
    server = start()
    extra = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [7], "allowed_token_ids": [1, 2, 3], "bad_words": ["x"],
        "skip_special_tokens": False, "priority": 3, "cache_salt": "s", "prompt_logprobs": 0,
    }  # fmt: skip
    connect(server).completions.create(
        model="demo", prompt="Hi", temperature=0.5, top_p=0.9, seed=-3, logit_bias={"5": 2},
        presence_penalty=0.5, frequency_penalty=-0.5, max_tokens=4, extra_body=extra,
    )  # fmt: skip
    request = engine_of(server).requests[-1]
    s = request.sampling
    assert (s.top_k, s.min_p, s.repetition_penalty, s.min_tokens) == (5, 0.1, 1.1, 2)
    assert (s.temperature, s.top_p, s.presence_penalty, s.frequency_penalty) == (
        0.5,
        0.9,
        0.5,
        -0.5,
    )
    assert (s.ignore_eos, s.stop_token_ids, s.allowed_token_ids) == (True, [7], [1, 2, 3])
    assert (s.bad_words, s.logit_bias, s.skip_special_tokens) == (["x"], {5: 2}, False)
    assert (request.seed, request.priority, request.cache_salt) == (-3, 3, "s")
    assert request.max_tokens == 4


def test_token_ids_are_returned_and_taken(start: Start, connect: Connect) -> None:
    server = start("Hello there.")
    client = connect(server)
    extra = {"return_token_ids": True}
    answer: Any = client.completions.create(model="demo", prompt=[40, 41], extra_body=extra)
    assert answer.choices[0].prompt_token_ids == [40, 41]
    assert answer.choices[0].token_ids[-1] == 2
    with server.http() as http:
        text = http.post("/detokenize", json={"tokens": answer.choices[0].token_ids[:-1]}).json()
        assert text == {"prompt": "Hello there."}
        found = http.post("/tokenize", json={"prompt": "Hello there."}).json()
        assert found["tokens"] == answer.choices[0].token_ids[:-1]
        assert found["count"] == len(found["tokens"])
        chat = http.post("/tokenize", json={"messages": USER, "return_token_strs": True}).json()
        assert "".join(chat["token_strs"]).startswith("<|im_start|>")


def test_tool_calls_are_found_whole_and_streamed(start: Start, connect: Connect) -> None:
    config = ServerConfig(port=0, enable_auto_tool_choice=True, tool_call_parser="hermes")
    client = connect(start(f"Let me see. {CALL}", server=config, delay_s=0.002))
    messages: Any = USER
    answer = client.chat.completions.create(model="demo", messages=messages, tools=[WEATHER])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    call: Any = choice.message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 2}
    assert (choice.message.content or "").strip() == "Let me see."
    names, arguments, reasons = [], "", []
    for chunk in client.chat.completions.create(
        model="demo", messages=messages, tools=[WEATHER], stream=True
    ):
        for piece in chunk.choices[0].delta.tool_calls or []:
            assert piece.function is not None
            if piece.function.name:
                names.append(piece.function.name)
                assert piece.id
            arguments += piece.function.arguments or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert names == ["weather"]
    assert json.loads(arguments) == {"city": "Oslo", "days": 2}
    assert reasons[-1] == "tool_calls"
    plain = client.chat.completions.create(
        model="demo", messages=messages, tools=[WEATHER], tool_choice="none"
    )
    assert plain.choices[0].message.tool_calls is None
    assert "<tool_call>" in (plain.choices[0].message.content or "")


def test_a_conversation_with_calls_and_their_results_is_understood(
    start: Start, connect: Connect
) -> None:
    server = start("Rain.")
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    for content in ({"content": None}, {}, {"content": ""}):
        messages: Any = [
            *USER,
            {"role": "assistant", "tool_calls": [call], **content},
            {"role": "tool", "tool_call_id": "c1", "content": "It rains."},
        ]
        answer = connect(server).chat.completions.create(model="demo", messages=messages)
        assert answer.choices[0].message.content == "Rain."
        prompt = engine_of(server).requests[-1].prompt_token_ids
        assert "It rains." in server.llm.get_tokenizer().decode(prompt)


def test_what_the_clients_helpers_send_is_understood(start: Start, connect: Connect) -> None:
    class City(pydantic.BaseModel):
        name: str
        size: int

    client = connect(start('{"name": "Oslo", "size": 7}'))
    messages: Any = USER
    parsed = client.chat.completions.parse(
        model="demo", messages=messages, response_format=City, max_completion_tokens=50
    )
    assert parsed.choices[0].message.parsed == City(name="Oslo", size=7)
    with client.chat.completions.stream(
        model="demo", messages=messages, response_format=City
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == City(name="Oslo", size=7)
    nulls = dict.fromkeys(
        ("temperature", "top_p", "n", "stop", "tools", "tool_choice", "response_format", "seed",
         "stream_options", "logit_bias", "user", "logprobs", "top_logprobs", "max_tokens",
         "metadata", "store", "reasoning_effort", "top_k", "structured_outputs")
    )  # fmt: skip
    answer = client.chat.completions.create(model="demo", messages=messages, extra_body=nulls)
    assert answer.choices[0].finish_reason == "stop"


def test_reasoning_is_apart_from_content(start: Start, connect: Connect) -> None:
    config = ServerConfig(port=0, reasoning_parser="qwen3")
    client = connect(start("<think>Hm, well.</think>Yes.", server=config, delay_s=0.002))
    messages: Any = USER
    answer: Any = client.chat.completions.create(model="demo", messages=messages)
    assert answer.choices[0].message.content == "Yes."
    assert answer.choices[0].message.reasoning == "Hm, well."
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    reasoning, content = "", ""
    for chunk in client.chat.completions.create(model="demo", messages=messages, stream=True):
        delta: Any = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning", None) or ""
        content += delta.content or ""
    assert (reasoning, content) == ("Hm, well.", "Yes.")


@pytest.mark.parametrize(
    ("parser", "text", "opener", "ends"),
    [
        ("deepseek_r1", "Hm.</think>{}", None, {"</think>"}),
        ("special", "<file_sep>Hm.<empty_output>{}", "<file_sep>", {"<empty_output>"}),
        ("qwen3", "{}", None, set()),  # <think> is no token of the demo model
        ("openai_gptoss", "<|channel|>final<|message|>{}", None,
         {"<|channel|>final<|message|>", "<|channel|>final <|constrain|>json<|message|>",
          "<|channel|>final <|constrain|>JSON<|message|>", "<|channel|>final json<|message|>"}),
    ],
)  # fmt: skip
def test_a_form_begins_behind_the_reasoning(
    start: Start,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    parser: str,
    text: str,
    opener: str | None,
    ends: set[str],
) -> None:
    class Special(Qwen3Parser):  # with tags that are tokens of the demo model
        needs_special_tokens = True
        start_tag, end_tag = "<file_sep>", "<empty_output>"

    monkeypatch.setitem(REASONING_PARSERS, "special", Special)
    server = start(text, server=ServerConfig(port=0, reasoning_parser=parser))
    messages: Any = USER
    answer = connect(server).chat.completions.create(
        model="demo", messages=messages, response_format={"type": "json_object"}
    )
    assert answer.choices[0].message.content == "{}"
    grammar = engine_of(server).requests[-1].grammar
    assert grammar is not None
    tokenizer = server.llm.get_tokenizer()
    assert {tokenizer.decode(list(marker)) for marker in grammar.start_after} == ends
    assert grammar.opened_by == (opener and tokenizer.convert_tokens_to_ids(opener))


def test_a_client_that_leaves_ends_its_request(start: Start) -> None:
    server = start("word ", ends=False, delay_s=0.002, max_model_len=100_000)
    body = {"model": "demo", "max_tokens": 90_000}
    check_leaving(server, "/v1/completions", body | {"prompt": "a"}, "word")
    check_leaving(server, "/v1/chat/completions", body | {"messages": USER}, "word")


def test_a_request_past_its_time_gets_504_and_ends(start: Start) -> None:
    config = ServerConfig(port=0, request_timeout_s=0.3)
    server = start("word ", ends=False, delay_s=0.01, max_model_len=100_000, server=config)
    body = {"model": "demo", "prompt": "a", "max_tokens": 90_000}
    with server.http() as http:
        answer = http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert lines[-1] == "data: [DONE]"
    until(lambda: engine_of(server).num_running == 0)


def test_a_full_queue_asks_to_come_back(start: Start) -> None:
    server = start(refuse_after=1)
    with server.http() as http:
        body = {"model": "demo", "prompt": "a"}
        assert http.post("/v1/completions", json=body).status_code == 200
        for stream in (False, True):
            answer = http.post("/v1/completions", json=body | {"stream": stream})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "server_overloaded"
            assert int(answer.headers["retry-after"]) >= 1
        # Two prompts, of which the second does not fit: neither stays.
        answer = http.post("/v1/completions", json=body | {"prompt": ["a", "b"]})
        assert answer.status_code == 503
    assert server.llm.client.num_unfinished == 0


def test_a_key_has_so_many_requests_at_a_time(start: Start) -> None:
    config = ServerConfig(port=0, api_keys=("a", "b"), max_concurrent_requests_per_key=1)
    server = start("word ", ends=False, delay_s=0.01, max_model_len=10_000, server=config)
    body = {"model": "demo", "prompt": "a", "max_tokens": 9_000, "stream": True}
    a, b = ({"authorization": f"Bearer {key}"} for key in "ab")
    with server.http() as http:
        with http.stream("POST", "/v1/completions", json=body, headers=a) as answer:
            lines = answer.iter_lines()  # kept: its end would close the answer
            next(lines)
            refused = http.get("/v1/models", headers=a)
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert refused.headers["retry-after"]
            assert http.get("/v1/models", headers=b).status_code == 200
        until(lambda: http.get("/v1/models", headers=a).status_code == 200)


def test_keys_do_not_share_prefixes(start: Start) -> None:
    config = ServerConfig(port=0, api_keys=("a", "b"))
    server = start(server=config)
    with server.http() as http:
        for key in "aab":
            http.post(
                "/v1/completions",
                json={"model": "demo", "prompt": "a"},
                headers={"authorization": f"Bearer {key}"},
            ).raise_for_status()
    salts = [request.cache_salt for request in engine_of(server).requests]
    assert salts[0] == salts[1] != salts[2]
    assert all(salt and salt != "a" for salt in salts)


def test_a_dead_engine_fails_health_and_requests(start: Start) -> None:
    server = start("word ", ends=False, delay_s=0.01, max_model_len=10_000)
    with server.http() as http:
        assert http.get("/health").status_code == 200
        body = {"model": "demo", "prompt": "a", "max_tokens": 9_000, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine_of(server).die()
            rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert rest[-1] == "data: [DONE]"


def test_request_ids_come_back(start: Start) -> None:
    server = start()
    with server.http() as http:
        body = {"model": "demo", "prompt": "a"}
        answer = http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.json()["id"] == "cmpl-mine-1"
        answer = http.post("/v1/completions", json=body | {"request_id": "body-1"})
        assert answer.json()["id"] == "cmpl-body-1"
        forged = http.post("/v1/completions", json=body, headers={"x-request-id": "a b\tc"})
        assert forged.headers["x-request-id"] != "a b\tc"


def test_the_async_client_streams_many_at_once(start: Start) -> None:
    server = start("Hello there, all of you.", delay_s=0.001)

    async def one(client: openai.AsyncOpenAI) -> str:
        messages: Any = USER
        stream = await client.chat.completions.create(model="demo", messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
            return await asyncio.gather(*(one(client) for _ in range(64)))

    assert asyncio.run(many()) == ["Hello there, all of you."] * 64


def test_cross_origin_calls_are_off_unless_asked_for(start: Start) -> None:
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with start().http() as http:
        assert (
            "access-control-allow-origin" not in http.options("/v1/models", headers=headers).headers
        )
    config = ServerConfig(port=0, allowed_origins=("https://a.example",), api_keys=("k",))
    with start(server=config).http() as http:
        answer = http.options("/v1/chat/completions", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"

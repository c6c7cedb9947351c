"""Fields that shape the prompt, the envelope and the stream, over a model that says what we want.

What sampling fields do to tokens is in `test_sampling_fields`.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jaxserve.checkpoint import Checkpoint
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.request import Request
from jaxserve.server_config import ServerConfig
from tests.server.conftest import Start
from tests.server.running import RunningServer, engine_of, prompt_of, scripted

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER: dict[str, Any] = {"role": "user", "content": "Hi"}
# Shows every variable that a request can set.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.reasoning or '' }}{% endfor %}"
    "{% for d in documents or [] %}<{{ d.text }}>{% endfor %}"
    "{% if tools %}({{ tools[0].function.name }}){% endif %}"
    "{% if style is defined %}style={{ style }}{% endif %}"
    "{% if reasoning_effort is defined %}effort={{ reasoning_effort }},{{ enable_thinking }}"
    "{% endif %}{% if add_generation_prompt %}[go]{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(checkpoint: Checkpoint) -> Iterator[RunningServer]:
    tokenizer = load_tokenizer(checkpoint)  # not the shared one: its template is replaced
    tokenizer.chat_template = TEMPLATE
    tokenizer.chat_templates.clear()
    running = scripted(
        checkpoint,
        tokenizer,
        "one two three",
        config={
            "override_generation_config": {"temperature": 0.25, "max_new_tokens": 9},
            "max_logprobs": -1,
        },
        delay_s=0.004,
        server=ServerConfig(
            port=0,
            default_chat_template_kwargs={"style": "plain"},
            enable_prompt_tokens_details=True,
            enable_auto_tool_choice=True,
            tool_call_parser="hermes",
        ),
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as made:
        yield made


def ask(client: httpx.Client, route: str, /, **fields: Any) -> dict[str, Any]:
    own = {"prompt": "Hi you"} if route == COMPLETIONS else {"messages": [USER]}
    answer = client.post(route, json={"model": "demo"} | own | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client: httpx.Client, route: str, /, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of an answer."""
    own = {"prompt": "Hi you"} if route == COMPLETIONS else {"messages": [USER]}
    body = {"model": "demo", "stream": True} | own | fields
    with client.stream("POST", route, json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# What the template sees

PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({}, "[user]Histyle=plain[go]"),
    ({"add_generation_prompt": False}, "[user]Histyle=plain"),
    ({"chat_template_kwargs": {"style": "bold"}}, "[user]Histyle=bold[go]"),
    ({"documents": [{"title": "a", "text": "b"}]}, "[user]Hi<b>style=plain[go]"),
    ({"reasoning_effort": "low"}, "[user]Histyle=plaineffort=low,True[go]"),
    ({"reasoning_effort": "none"}, "[user]Histyle=plaineffort=none,False[go]"),
    ({"tools": [TOOL]}, "[user]Hi(f)style=plain[go]"),
    ({"messages": [USER, {"role": "assistant", "content": "a", "reasoning_content": "b"}, USER]},
     "[user]Hi[assistant]ab[user]Histyle=plain[go]"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                                                {"type": "text", "text": "b"}]}]},
     "[user]a\nbstyle=plain[go]"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "prompt"), PROMPTS, ids=[str(p[0])[:40] for p in PROMPTS])
def test_the_template_sees_what_the_request_sets(
    server: RunningServer, client: httpx.Client, fields: dict[str, Any], prompt: str
) -> None:
    ask(client, CHAT, **fields)
    assert prompt_of(server) == prompt
    assert ask(client, CHAT, **fields, return_prompt_text=True)["prompt_text"] == prompt
    same = {k: v for k, v in fields.items() if k not in ("documents", "reasoning_effort")}
    if same == fields:
        tokens = client.post("/tokenize", json={"messages": [USER]} | fields).json()["tokens"]
        assert tuple(tokens) == engine_of(server).requests[-1].prompt_token_ids


def test_an_answer_that_was_begun_is_continued_and_repeated(start: Start) -> None:
    server = start(" two")
    messages = [USER, {"role": "assistant", "content": "one"}]
    asked = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    with server.http() as http:
        plain = ask(http, CHAT, **asked)
        assert prompt_of(server).endswith("assistant\none")
        assert plain["choices"][0]["message"]["content"] == " two"
        echoed = ask(http, CHAT, **asked, echo=True)
        assert echoed["choices"][0]["message"]["content"] == "one two"
        chunks = stream(http, CHAT, **asked, echo=True)
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "one two"


# What reaches the engine

SENT: list[tuple[dict[str, Any], str, Any]] = [
    ({"top_k": 5}, "top_k", 5),
    ({"top_k": -1}, "top_k", -1),
    ({"top_p": 0.5}, "top_p", 0.5),
    ({"min_p": 0.1}, "min_p", 0.1),
    ({"temperature": 0.7}, "temperature", 0.7),
    ({}, "temperature", 0.25),  # of the generation config
    ({"presence_penalty": 0.5}, "presence_penalty", 0.5),
    ({"frequency_penalty": -0.5}, "frequency_penalty", -0.5),
    ({"repetition_penalty": 1.1}, "repetition_penalty", 1.1),
    ({"logit_bias": {"5": 2}}, "logit_bias", {5: 2}),
    ({"allowed_token_ids": [1, 2]}, "allowed_token_ids", [1, 2]),
    ({"bad_words": ["x"]}, "bad_words", ["x"]),
    ({"stop": "a"}, "stop", ["a"]),
    ({"stop_token_ids": [7, 7]}, "stop_token_ids", [7]),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output", True),
    ({"ignore_eos": True}, "ignore_eos", True),
    ({"min_tokens": 2}, "min_tokens", 2),
    ({"skip_special_tokens": False}, "skip_special_tokens", False),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens", False),
    ({"n": 2, "temperature": 1}, "n", 2),
    ({"seed": -3}, "seed", -3),
    ({"seed": 2**63 - 1}, "seed", 2**63 - 1),
]


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("fields", "name", "value"), SENT, ids=[str(s[0]) for s in SENT])
def test_sampling_fields_reach_the_engine_on_both_routes(
    server: RunningServer,
    client: httpx.Client,
    route: str,
    fields: dict[str, Any],
    name: str,
    value: Any,
) -> None:
    ask(client, route, **fields)
    found = getattr(engine_of(server).requests[-1].sampling, name)
    assert (list(found) if isinstance(found, tuple) else found) == value


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_priority_salt_and_lengths_reach_it_too(
    server: RunningServer, client: httpx.Client, route: str
) -> None:
    ask(client, route, priority=3, cache_salt="s", max_tokens=5)
    request = engine_of(server).requests[-1]
    assert (request.priority, request.cache_salt, request.max_tokens) == (3, "s", 5)
    own = {"prompt": "Hi"} if route == COMPLETIONS else {"messages": [USER]}
    body = {"model": "demo", **own}
    client.post(route, json=body, headers={"x-vllm-priority": "-4"})
    assert engine_of(server).requests[-1].priority == -4
    assert engine_of(server).requests[-1].max_tokens == (16 if route == COMPLETIONS else 9)


def test_special_tokens_are_added_to_prompts_and_not_to_chats(
    server: RunningServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    parse = server.llm.parse

    async def watched(prompt: Any, **options: Any) -> Any:
        asked.append(options["add_special_tokens"])
        return await parse(prompt, **options)

    monkeypatch.setattr(server.llm, "parse", watched)
    for route in (COMPLETIONS, CHAT):
        for given in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            ask(client, route, **given)
    assert asked == [True, True, False, False, True, False]


@pytest.mark.parametrize(
    "field",
    [{"user": "me"}, {"metadata": {"a": "b"}}, {"service_tier": "auto"}, {"session_id": "s"},
     {"prompt_cache_key": "k"}, {"safety_identifier": "i"}, {"length_penalty": 1.0},
     {"use_beam_search": False}, {"thinking_token_budget": -1}, {"logprob_token_ids": []},
     {"vllm_xargs": {}}, {"kv_transfer_params": {}}, {"watermarking": False},
     {"return_weight_versions": False}, {"truncate_prompt_tokens": None}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_what_changes_nothing_is_taken(
    client: httpx.Client, route: str, field: dict[str, Any]
) -> None:
    assert ask(client, route, **field)["choices"][0]["finish_reason"] == "stop"


# What comes back


def test_token_ids_come_whole_and_streamed_on_both_routes(client: httpx.Client) -> None:
    for route in (COMPLETIONS, CHAT):
        whole = ask(client, route, return_token_ids=True)
        chunks = stream(client, route, return_token_ids=True)
        ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])]
        assert ids == whole["choices"][0]["token_ids"]
        assert ids[-1] == 2
        where = [each["choices"][0] if route == COMPLETIONS else each for each in (whole, *chunks)]
        assert where[0]["prompt_token_ids"] == where[1]["prompt_token_ids"]
        assert all("prompt_token_ids" not in later for later in where[2:])


def test_tokens_may_be_written_as_ids(client: httpx.Client) -> None:
    fields = {"return_tokens_as_token_ids": True, "max_tokens": 2}
    words = ask(client, COMPLETIONS, **fields, logprobs=1)["choices"][0]["logprobs"]["tokens"]
    answer = ask(client, CHAT, **fields, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(word.startswith("token_id:") for word in words)
    assert [entry["token"] for entry in answer] == words


def test_usage_tells_cached_tokens_where_the_operator_asks_for_it(client: httpx.Client) -> None:
    for route in (COMPLETIONS, CHAT):
        details = ask(client, route)["usage"]["prompt_tokens_details"]
        assert details["cached_tokens"] == 2
        last = stream(client, route, stream_options={"include_usage": True})[-1]
        assert last["choices"] == []
        assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


def test_keys_that_were_never_set_are_absent_from_chunks(client: httpx.Client) -> None:
    for route in (COMPLETIONS, CHAT):
        first, *_, last = stream(client, route)
        assert "usage" not in first
        assert "usage" not in last
        assert "token_ids" not in first["choices"][0]
        assert first["choices"][0]["finish_reason"] is None
        assert last["choices"][0]["finish_reason"] == "stop"
        assert last["choices"][0]["stop_reason"] is None
        if route == CHAT:
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_the_whole_vocabulary_of_logprobs_may_be_allowed(client: httpx.Client) -> None:
    answer = ask(client, CHAT, logprobs=True, top_logprobs=-1, max_tokens=1)
    entry = answer["choices"][0]["logprobs"]["content"][0]
    assert len(entry["top_logprobs"]) > 1
    answer = ask(client, COMPLETIONS, logprobs=-1, max_tokens=1)
    assert len(answer["choices"][0]["logprobs"]["top_logprobs"][0]) > 1
    only = ask(client, COMPLETIONS, logprobs=0)["choices"][0]["logprobs"]
    assert [list(top) for top in only["top_logprobs"]] == [[token] for token in only["tokens"]]


def test_echo_streams_the_prompt_in_the_first_chunk(client: httpx.Client) -> None:
    first, *rest = stream(client, COMPLETIONS, echo=True, logprobs=0)
    assert first["choices"][0]["text"].startswith("Hi youone")
    assert first["choices"][0]["logprobs"]["tokens"][:2] == ["Hi", " you"]
    assert first["choices"][0]["logprobs"]["token_logprobs"][0] is None
    assert all("Hi" not in chunk["choices"][0]["text"] for chunk in rest)
    ids = ask(client, COMPLETIONS, prompt=[40, 41], echo=True)["choices"][0]["text"]
    assert ids.endswith("one two three")
    assert len(ids) > len("one two three")
    hidden = ask(client, COMPLETIONS, echo=True, return_token_ids=True)["choices"][0]
    assert hidden["text"] == "one two three"


def test_prompt_logprobs_of_the_prompts_own_tokens_can_be_streamed(client: httpx.Client) -> None:
    for route in (COMPLETIONS, CHAT):
        assert stream(client, route, prompt_logprobs=0)[-1]["choices"][0]["finish_reason"] == "stop"


def test_chunks_hold_as_many_tokens_as_are_asked_for(client: httpx.Client) -> None:
    every = stream(client, COMPLETIONS, prompt="a", return_token_ids=True)
    some = stream(client, COMPLETIONS, prompt="a", return_token_ids=True, stream_interval=3)
    assert len(some) < len(every) or len(every) == 1
    text = "".join(chunk["choices"][0]["text"] for chunk in some)
    assert text == "one two three"


# Settings of the server


def test_usage_in_every_chunk_can_be_forced(start: Start) -> None:
    server = start(server=ServerConfig(port=0, enable_force_include_usage=True))
    with server.http() as http:
        for route in (COMPLETIONS, CHAT):
            chunks = stream(http, route)
            assert all(chunk["usage"]["total_tokens"] for chunk in chunks)
            assert chunks[-1]["choices"] == []


def test_a_server_behind_a_path_answers_at_both(start: Start) -> None:
    server = start(server=ServerConfig(port=0, root_path="/llm"))
    with server.http() as http:
        assert ask(http, COMPLETIONS)["choices"][0]["text"] == "Hello there."
        assert http.get("/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_the_role_of_answers_is_the_operators(start: Start) -> None:
    server = start(server=ServerConfig(port=0, response_role="model"))
    with server.http() as http:
        assert ask(http, CHAT)["choices"][0]["message"]["role"] == "model"
        assert stream(http, CHAT)[0]["choices"][0]["delta"]["role"] == "model"


CALLS: dict[str, str] = {  # {} is where arguments go
    "hermes": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "llama3_json": '{"name": "f", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "f", "arguments": {}}]',
    "pythonic": "[f(a='b')]",
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\nb\n</parameter>\n</function>\n"
    "</tool_call>",
    "openai": "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
    "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "gemma4": '<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>',
    "functiongemma": "<start_function_call>call:f{a:<escape>b<escape>}<end_function_call>",
}


@pytest.mark.parametrize("parser", CALLS)
def test_calls_are_found_in_every_form_whole_and_streamed(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, client: httpx.Client, parser: str
) -> None:
    text = CALLS[parser].replace("{}", '{"a": "b"}')
    tokenizer = server.llm.get_tokenizer()
    ids = [*tokenizer.encode(text, add_special_tokens=False), 2]

    def script(request: Request, choice: int) -> list[int]:
        return ids

    context = server.app.context
    config = dataclasses.replace(context.config, tool_call_parser=parser)
    monkeypatch.setattr(context, "config", config)
    monkeypatch.setattr(engine_of(server), "script", script)
    tool = json.loads(json.dumps(TOOL))
    tool["function"]["parameters"]["properties"] = {"a": {"type": "string"}}
    fields: dict[str, Any] = {"tools": [tool], "max_tokens": 200}
    choice = ask(client, CHAT, **fields)["choices"][0]
    assert choice["finish_reason"] == "tool_calls", choice
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "f"
    assert json.loads(call["function"]["arguments"]) == {"a": "b"}
    pieces = [
        piece["function"]
        for chunk in stream(client, CHAT, **fields)
        for piece in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert [piece["name"] for piece in pieces if "name" in piece] == ["f"]
    assert json.loads("".join(piece["arguments"] for piece in pieces)) == {"a": "b"}


def test_a_dead_engine_is_not_healthy(start: Start) -> None:
    server = start()
    with server.http() as http:
        assert (http.get("/health").status_code, http.get("/health").content) == (200, b"")
        assert http.post("/ping").status_code == 200
        card = http.get("/v1/models").json()["data"][0]
        assert set(card) == {
            "id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission",
        }  # fmt: skip
        assert card["max_model_len"] == 256
        assert set(http.get("/version").json()) == {"version"}
        engine_of(server).die()
        answer = http.post(COMPLETIONS, json={"model": "demo", "prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert http.get("/health").status_code == 503

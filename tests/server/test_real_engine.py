"""The server over the demo model: HTTP gives what the Python API gives."""

import base64
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest

from tests.server.running import RunningServer

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 10_000_000},
        "capital": {"type": "boolean"},
    },
    "required": ["name", "population", "capital"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(real: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="-", max_retries=0) as made:
        yield made


def test_greedy_text_is_that_of_the_engine_whole_and_streamed(
    real: RunningServer, client: openai.OpenAI
) -> None:
    prompt = "The capital of France is"
    whole = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0)
    streamed = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="demo", prompt=prompt, max_tokens=12, temperature=0, stream=True
        )
    )
    ids: Any = real.llm.get_tokenizer().encode(prompt)
    by_ids = client.completions.create(model="demo", prompt=ids, max_tokens=12, temperature=0)
    assert "Paris" in whole.choices[0].text
    assert streamed == whole.choices[0].text == by_ids.choices[0].text


def test_a_seed_repeats_and_another_differs(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        answer = client.completions.create(
            model="demo", prompt="Once", max_tokens=16, temperature=1, seed=seed
        )
        return answer.choices[0].text

    assert draw(1) == draw(1) != draw(2)


def test_a_json_schema_holds_at_temperature_1(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    messages: Any = [{"role": "user", "content": "Describe Paris in JSON."}]
    answer = client.chat.completions.create(
        model="demo", messages=messages, response_format=form, temperature=1, n=4, seed=3,
        max_tokens=100,
    )  # fmt: skip
    finished = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert len(finished) >= 3
    for choice in finished:
        jsonschema.validate(json.loads(choice.message.content or ""), CITY)


def test_vllms_structured_outputs_hold(client: openai.OpenAI) -> None:
    def ask(**form: Any) -> str:
        answer = client.completions.create(
            model="demo", prompt="Answer:", max_tokens=40, temperature=1, seed=1,
            extra_body={"structured_outputs": form},
        )  # fmt: skip
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].text

    assert ask(choice=["red", "green"]) in ("red", "green")
    assert re.fullmatch(r"\d{3}-[a-f]{2}", ask(regex=r"\d{3}-[a-f]{2}"))
    assert ask(grammar='start: "yes" | "no"') in ("yes", "no")


@pytest.mark.parametrize(
    "form",
    [
        {"json": {"type": "nonsense"}},
        {"json": {"$ref": "http://example.com/x.json"}},
        {"json": {"$ref": "#"}},
        {"regex": "(?<=a)b"},
        {"regex": "("},
        {"regex": "((a{1,1000}){1,1000}){1,1000}"},
        {"grammar": "start: ("},
        {"choice": []},
    ],
    ids=str,
)
def test_a_form_that_cannot_be_is_refused_and_streams_go_on(
    client: openai.OpenAI, form: dict[str, Any]
) -> None:
    stream = client.completions.create(
        model="demo", prompt="Once", max_tokens=40, stream=True, temperature=0
    )
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="demo", prompt="x", extra_body={"structured_outputs": form})
    assert refused.value.param == "structured_outputs"
    assert sum(len(chunk.choices) for chunk in stream) > 5


def test_forced_tools_are_called_with_arguments_that_fit(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "describe", "parameters": CITY}}
    messages: Any = [{"role": "user", "content": "Describe Paris."}]
    named: Any = {"type": "function", "function": {"name": "describe"}}
    choices: Any = (("required", "tool_calls"), (named, "stop"))
    for choice, reason in choices:
        answer = client.chat.completions.create(
            model="demo", messages=messages, tools=[tool], tool_choice=choice, temperature=1,
            seed=2, max_tokens=120,
        )  # fmt: skip
        found = answer.choices[0]
        assert found.finish_reason == reason
        assert found.message.tool_calls is not None
        call: Any = found.message.tool_calls[0]
        assert call.function.name == "describe"
        jsonschema.validate(json.loads(call.function.arguments), CITY)


def test_embeddings_have_length_one_and_tell_texts_apart(
    real: RunningServer, client: openai.OpenAI
) -> None:
    texts = ["A cat sat on the mat.", "A dog lay on the rug.", "Stocks fell by three percent."]
    answer = client.embeddings.create(model="demo", input=texts, encoding_format="float")
    vectors = np.array([item.embedding for item in answer.data])
    assert vectors.shape == (3, 576)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    alone = client.embeddings.create(model="demo", input=texts[2])  # base64 by itself
    assert np.allclose(alone.data[0].embedding, vectors[2], atol=2e-4)
    with real.http() as http:
        body = {"model": "demo", "input": texts[2], "encoding_format": "base64", "dimensions": 64}
        raw = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    short = np.frombuffer(base64.b64decode(raw), "<f4")
    assert short.shape == (64,)
    assert math.isclose(float(np.linalg.norm(short)), 1, abs_tol=1e-5)
    long = client.embeddings.create(model="demo", input="word " * 200)  # several chunks
    assert len(long.data[0].embedding) == 576
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="demo", input=texts, dimensions=577)
    ids = [[1 + i % 400 for i in range(count)] for count in (256, 255)]  # the model takes 256
    full, less = client.embeddings.create(model="demo", input=ids, encoding_format="float").data
    assert len(full.embedding) == 576
    assert np.dot(full.embedding, less.embedding) > 0.5
    again = client.embeddings.create(model="demo", input=ids[:1], encoding_format="float").data[0]
    assert np.allclose(again.embedding, full.embedding, atol=2e-4)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256"):
        client.embeddings.create(model="demo", input=[7] * 257)


def test_free_text_may_hold_forms(client: openai.OpenAI) -> None:
    tag = {"begin": "<city>", "content": {"type": "json_schema", "json_schema": CITY},
           "end": "</city>"}  # fmt: skip
    forms: list[dict[str, Any]] = [
        {"format": {"type": "triggered_tags", "triggers": ["<city>"], "tags": [tag],
                    "at_least_one": True, "stop_after_first": True}},
        {"structures": [{"begin": "<city>", "schema": CITY, "end": "</city>"}],
         "triggers": ["<city>"]},
    ]  # fmt: skip
    messages: Any = [{"role": "user", "content": "Describe Paris as <city>{...}</city>."}]
    for form in forms:
        answer = client.chat.completions.create(
            model="demo", messages=messages, temperature=1, n=4, seed=5, max_tokens=100,
            response_format={"type": "structural_tag", **form},  # pyright: ignore
        )  # fmt: skip
        finished = [c.message.content or "" for c in answer.choices if c.finish_reason == "stop"]
        assert finished
        for text in finished:
            parts = text.split("<city>")
            assert "format" not in form or (len(parts) == 2 and not parts[0])
            for part in parts[1:]:
                inner, end, _ = part.partition("</city>")
                assert end
                jsonschema.validate(json.loads(inner), CITY)


def test_metrics_count_what_was_served(real: RunningServer, client: openai.OpenAI) -> None:
    def read(name: str) -> float:
        with real.http() as http:
            text = http.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith(f"jaxserve:{name}{{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    before = read("generation_tokens_total")
    answer = client.completions.create(model="demo", prompt="Once", max_tokens=7, temperature=0)
    assert answer.usage is not None
    assert read("generation_tokens_total") - before == answer.usage.completion_tokens
    assert read("late_compiles_total") == 0
    assert read("num_requests_running") == 0
    assert read("kv_cache_usage_perc") == 0

"""Reasoning, the two parsers together, their names, and the schemas of tool_choice."""

import json
from typing import Any

import jsonschema
import pytest

from jaxserve.errors import ConfigError, RequestError
from jaxserve.frontend.parsers import registry
from jaxserve.frontend.parsers.forced import JsonListParser
from jaxserve.frontend.parsers.hermes import HermesParser
from jaxserve.frontend.parsers.output_parser import OutputParser
from jaxserve.frontend.parsers.reasoning import Qwen3Parser
from jaxserve.frontend.parsers.tool_choice import tool_choice_schema
from tests.frontend.parsers.reading import parse

CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
OFF = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("name", "prompt", "text", "reasoning", "content"),
    [
        ("deepseek_r1", "", "Hm.\n</think>\n\nHi", "Hm.\n", "\n\nHi"),
        ("deepseek_r1", "", "<think>Hm.</think>Hi", "Hm.", "Hi"),
        ("deepseek_r1", "x<think>\n", "Hm.</think>Hi", "Hm.", "Hi"),
        ("deepseek_r1", "", "cut of</thi", "cut of</thi", ""),
        ("deepseek_r1", "", " <th", " <th", ""),
        ("deepseek_r1", OFF, "Hi", "", "Hi"),
        ("qwen3", "", "<think>\nHm.\n</think>\n\nHi", "\nHm.\n", "\n\nHi"),
        ("qwen3", "", "\n<think></think>Hi", "", "Hi"),
        ("qwen3", "", "Hi", "", "Hi"),
        ("qwen3", "", " <thin", "", " <thin"),
        ("qwen3", "", "a <think>b</think>", "", "a <think>b</think>"),
        ("qwen3", "x<think>\n", "Hm.</think>Hi</think>", "Hm.", "Hi</think>"),
        ("qwen3", "x<think>\n", "<think>Hm.</think>Hi", "Hm.", "Hi"),
        ("qwen3", "what does <think> do?", "It thinks.", "", "It thinks."),
        ("qwen3", OFF, "<think>Hi", "", "<think>Hi"),
        ("mistral", "", "[THINK]Hm.[/THINK]Hi", "Hm.", "Hi"),
        ("gemma4", "", "<|channel>thought\nHm.\n<channel|>Hi", "Hm.\n", "Hi"),
        ("gemma4", "", "<|channel>Hm.<channel|>Hi", "Hm.", "Hi"),
        ("gemma4", "", "<|channel>thou", "thou", ""),
        ("gemma4", "", "Hi", "", "Hi"),
        ("gemma4", "model\n<|channel>thought\n", "Hm.<channel|>Hi", "Hm.", "Hi"),
        ("gemma4", "model\n<|channel>thought\n<channel|>", "Hi", "", "Hi"),
    ],
)
def test_reasoning_ends_at_its_tag(
    name: str, prompt: str, text: str, reasoning: str, content: str
) -> None:
    parsed = parse(text, reasoning=name, prompt_text=prompt)
    assert (parsed.reasoning, parsed.content) == (reasoning, content)


def test_a_call_in_the_reasoning_is_no_call() -> None:
    parsed = parse(f"<think>I could {CALL}</think>\n\n{CALL}", "hermes", reasoning="qwen3")
    assert parsed.reasoning == f"I could {CALL}"
    assert (parsed.content, parsed.calls) == ("", [("f", "{}")])


def test_forced_calls_follow_the_reasoning() -> None:
    text = 'Hm.</think>\n\n[{"name": "f", "parameters": {"a": 1}}]'
    parsed = parse(text, JsonListParser, reasoning="deepseek_r1")
    assert (parsed.content, parsed.values) == ("", [("f", {"a": 1})])


def test_the_parser_knows_whether_it_is_in_the_reasoning() -> None:
    parser = OutputParser(reasoning="qwen3", tools=None)
    assert not parser.in_reasoning
    parser.feed("<think>")
    assert parser.in_reasoning
    parser.feed("Hm.</thi")
    assert parser.in_reasoning
    parser.feed("nk>")
    assert not parser.in_reasoning
    assert parser.num_reasoning_chars == 3
    assert OutputParser(reasoning="deepseek_r1", tools=None).in_reasoning
    assert not OutputParser(reasoning="deepseek_r1", tools=None, prompt_text=OFF).in_reasoning


def test_without_parallel_calls_only_the_first_is_kept() -> None:
    parsed = parse(f"a{CALL}{CALL.replace('f', 'g', 1)}b", "hermes", parallel_tool_calls=False)
    assert (parsed.content, parsed.calls) == ("ab", [("f", "{}")])


@pytest.mark.parametrize(
    ("reasoning", "tools", "needed"),
    [
        (None, None, False), ("qwen3", None, False), ("qwen3", "qwen3_coder", False),
        ("openai_gptoss", None, True), ("mistral", None, True), (None, "hermes", True),
        (None, "mistral", True), (None, "llama3_json", True), (None, "deepseek_v3", True),
        (None, "pythonic", False), ("gemma4", None, True), (None, "gemma4", True),
        (None, "deepseek_v32", True), (None, "functiongemma", True),
    ],
)  # fmt: skip
def test_a_format_written_with_special_tokens_says_so(
    reasoning: str | None, tools: str | None, needed: bool
) -> None:
    assert OutputParser(reasoning=reasoning, tools=tools).needs_special_tokens is needed


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"tool_call_parser='hermez'.*'hermes'.*qwen3_coder"):
        OutputParser(reasoning=None, tools="hermez")
    with pytest.raises(ConfigError, match=r"reasoning_parser='qwen'.*'qwen3'.*deepseek_r1"):
        OutputParser(reasoning="qwen", tools=None)


def test_a_parser_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TOOL_PARSERS", dict(registry.TOOL_PARSERS))
    monkeypatch.setattr(registry, "REASONING_PARSERS", dict(registry.REASONING_PARSERS))

    class Seed(Qwen3Parser):
        start_tag = "<seed:think>"
        end_tag = "</seed:think>"

    registry.register_tool_parser("mine", HermesParser)
    registry.register_reasoning_parser("seed", Seed)
    parsed = parse(f"<seed:think>Hm.</seed:think>{CALL}", "mine", reasoning="seed")
    assert (parsed.reasoning, parsed.calls) == ("Hm.", [("f", "{}")])


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TREE = {
    "properties": {"root": {"$ref": "#/$defs/Node"}, "$ref": {"type": "string"}},
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"left": {"$ref": "#/$defs/Node"}, "tag": {"const": {"$ref": "#"}}},
            "additionalProperties": False,
        }
    },
}
TOOLS = [tool("weather", CITY), tool("now"), tool("tree/~", TREE)]


def test_only_required_and_named_bring_a_schema() -> None:
    for choice in (None, "none", "auto"):
        assert tool_choice_schema(TOOLS, choice) is None
    assert tool_choice_schema(TOOLS, tool("weather")) == CITY
    assert tool_choice_schema(TOOLS, tool("now")) == {
        "type": "object", "properties": {}, "additionalProperties": False,
    }  # fmt: skip


GOOD = [
    [{"name": "weather", "parameters": {"city": "Bern"}}],
    [{"name": "now", "parameters": {}}, {"name": "weather", "parameters": {"city": "Bern"}}],
    [{"name": "tree/~", "parameters": {"root": {"left": {"left": {}}}, "$ref": "x"}}],
    [{"name": "tree/~", "parameters": {"root": {"tag": {"$ref": "#"}}}}],
]
BAD = [
    [],
    {"name": "now", "parameters": {}},
    [{"name": "now"}],
    [{"name": "then", "parameters": {}}],
    [{"name": "now", "parameters": {"x": 1}}],
    [{"name": "weather", "parameters": {}}],
    [{"name": "weather", "parameters": {"city": "Bern"}, "more": 1}],
    [{"name": "tree/~", "parameters": {"root": {"left": {"right": {}}}}}],
    [{"name": "tree/~", "parameters": {"root": {"tag": {"$ref": "#/$defs"}}}}],
]


def test_required_allows_calls_of_the_tools_and_nothing_else() -> None:
    schema = tool_choice_schema(TOOLS, "required")
    assert schema
    validator = jsonschema.Draft202012Validator(schema)
    assert [value for value in GOOD if not validator.is_valid(value)] == []
    assert [value for value in BAD if validator.is_valid(value)] == []
    single = tool_choice_schema(TOOLS, "required", parallel_tool_calls=False)
    assert single
    validator = jsonschema.Draft202012Validator(single)
    assert validator.is_valid(GOOD[0])
    assert not validator.is_valid(GOOD[1])


@pytest.mark.parametrize("value", GOOD)
def test_what_required_allows_is_read_as_calls(value: list[dict[str, Any]]) -> None:
    parsed = parse(json.dumps(value), JsonListParser)
    assert parsed.values == [(each["name"], each["parameters"]) for each in value]
    assert parsed.content == ""


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (TOOLS, tool("nowhere"), "'nowhere'.*weather, now"),
        (TOOLS, {"type": "function"}, "None, which is not in tools"),
        (TOOLS, "any", "'any'; it must be"),
        ([], "required", "at least one tool"),
    ],
)
def test_a_choice_that_cannot_be_met_is_refused(tools: Any, choice: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        tool_choice_schema(tools, choice)
    assert caught.value.param == "tool_choice"

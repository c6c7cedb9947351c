"""Gemma 4, FunctionGemma: bare keys, marked strings."""

import json
from typing import Any

import pytest

from jaxserve.frontend.parsers.output_parser import OutputParser
from tests.frontend.parsers.reading import Parsed, parse

Q = '<|"|>'
SCHEMA = {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}, "l": {"type": "array"}}}


def gemma(arguments: str, before: str = "", after: str = "<tool_call|>") -> Parsed:
    return parse(f"{before}<|tool_call>call:f{{{arguments}{after}", "gemma4")


def function_gemma(arguments: str) -> Parsed:
    text = f"<start_function_call>call:f{{{arguments}}}<end_function_call>"
    return parse(text, "functiongemma", tool_schemas={"f": SCHEMA})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (f"{Q}Paris{Q}", "Paris"),
        (f"{Q}{Q}", ""),
        (f'{Q}a "b", {{c}}: [d] \\ <tool_call|>\n<|"{Q}', 'a "b", {c}: [d] \\ <tool_call|>\n<|"'),
        (f"{Q}日本🎉{Q}", "日本🎉"),
        ("42", 42),
        (" -2.50 ", -2.5),
        ("1e3", 1000),
        ("true", True),
        ("False", False),
        ("null", None),
        ("None", None),
        ("celsius", "celsius"),
        ("a < b", "a < b"),
        ("9" * 5000, "9" * 5000),
        ("[]", []),
        ("{}", {}),
        (f"[{Q}x{Q},2,[true],{{k:{Q}v{Q}}}]", ["x", 2, [True], {"k": "v"}]),
        (f"{{{Q}k k{Q}:1,b:{{c:[null]}}}}", {"k k": 1, "b": {"c": [None]}}),
        ("[" * 300 + "]" * 300, None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_gemma_reads_a_value(text: str, value: Any) -> None:
    if text.startswith("[[["):
        value = json.loads(text)
    parsed = gemma(f"key:{text},z:1}}")
    assert parsed.content == ""
    assert parsed.values == [("f", {"key": value, "z": 1})]


def test_gemma_reads_parallel_calls_and_text_around_them() -> None:
    second = f"<|tool_call>call:m.g-h{{ a : {Q}x{Q} , b:2 }}<tool_call|>"
    parsed = gemma("}", "Let me look.\n", "<tool_call|>\n" + second + "\nDone.")
    assert parsed.content == "Let me look.\n\nDone."
    assert parsed.values == [("f", {}), ("m.g-h", {"a": "x", "b": 2})]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "{"),
        ("key", '{"key'),
        ("key:12", '{"key": 12'),
        (f"key:{Q}half", '{"key": "half'),
        (f"key:{Q}whole{Q}", '{"key": "whole"'),
        ("key:[1,2", '{"key": [1, 2'),
        ("key:[1}", '{"key": [1}'),
        ("key:,b:1}", '{"key": ,b:1}'),
        ("key:1}", '{"key": 1}'),
    ],
)
def test_gemma_arguments_that_break_off_stay_broken(arguments: str, expected: str) -> None:
    assert gemma(arguments, after="").calls == [("f", expected)]
    if not expected.endswith(("half", "12", "2")):
        assert gemma(arguments).calls == [("f", expected)]


@pytest.mark.parametrize(
    "text",
    ["<|tool_call>", "<|tool_call>call", "<|tool_call>call:", "<|tool_call>call:f", "call:f{}",
     "<|tool_call>call:{}", "<|tool_call>call:f g{}", "<tool_call|>", "a <|too", "<|tool_call>{}"],
)  # fmt: skip
def test_gemma_text_that_is_no_call_is_content(text: str) -> None:
    parsed = parse(text, "gemma4")
    assert (parsed.content, parsed.calls) == (text, [])


def test_gemma_passes_a_string_on_as_it_arrives_and_a_number_when_it_is_complete() -> None:
    parser = OutputParser(reasoning=None, tools="gemma4")
    assert parser.feed("<|tool_call>call:f").tool_calls == ()
    (first,) = parser.feed(f"{{a:{Q}He said").tool_calls
    assert (first.name, first.arguments) == ("f", '{"a": "He said')
    assert parser.feed(' "no<|').tool_calls[0].arguments == ' \\"no'
    assert parser.feed('"|>,n:4').tool_calls[0].arguments == '", "n": '
    assert parser.feed("2").tool_calls == ()
    assert parser.feed("}").tool_calls[0].arguments == "42}"


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ("a:<escape>x, y<escape>", {"a": "x, y"}),
        ("a:<escape>3<escape>", {"a": "3"}),
        ("n:<escape>3<escape>", {"n": 3}),
        ("n:3,l:[1,<escape>b<escape>]", {"n": 3, "l": [1, "b"]}),
        ('l:<escape>[1, "b"]<escape>', {"l": [1, "b"]}),
        ("other:<escape>3<escape>", {"other": "3"}),
        ("", {}),
    ],
)
def test_function_gemma_reads_strings_by_the_tools_schema(
    arguments: str, values: dict[str, Any]
) -> None:
    assert function_gemma(arguments).values == [("f", values)]


def test_gemma_thinks_in_a_channel_before_it_calls() -> None:
    call = f"<|tool_call>call:f{{a:{Q}x{Q}}}<tool_call|>"
    text = f"<|channel>thought\nI should look.\n<channel|>{call}"
    parsed = parse(text, "gemma4", reasoning="gemma4")
    assert parsed.reasoning == "I should look.\n"
    assert (parsed.content, parsed.values) == ("", [("f", {"a": "x"})])

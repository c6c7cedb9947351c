"""What holds for every parser and any text: pieces, loss, time."""

import json
import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.frontend.parsers.forced import JsonListParser, NamedToolParser
from jaxserve.frontend.parsers.output_parser import OutputParser
from jaxserve.frontend.parsers.registry import REASONING_PARSERS, TOOL_PARSERS
from tests.frontend.parsers.reading import read

SCHEMAS = {
    "f": {
        "properties": {
            "a": {"type": "string"},
            "b": {"type": "integer"},
            "c": {"type": ["array", "null"]},
        }
    }
}
JSON_BITS = [
    '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "parameters": {"a": "x"}}', "{", "}",
    "[", "]", '"', "\\", ",", ":", ";", "\n", " ", "1", "-2e3", "true", "null", '"name"', '"f"',
    '"g"', '"arguments"', '"parameters": ', '{"arguments": {"b": [1]}, "name": "g"}',
    '{"name": "f", ',
]  # fmt: skip
BITS = {
    "hermes": ["<tool_call>", "</tool_call>", "<tool_", "</tool", *JSON_BITS],
    "llama": ["<|python_tag|>", "<|python", "; ", *JSON_BITS],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[TOOL", "f", "123456789", *JSON_BITS],
    "deepseek": ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
                 "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "function", "f", "```json", "```",
                 "<｜tool▁", *JSON_BITS],
    "pythonic": ["[f(", "[", "f(", "g.h(", "a=1", "b='x'", 'c="""y"""', "d=[1, {'k': None}]", ", ",
                 ")", "]", "=", "'", '"', "\\", "(", "{", "}", "\n", "x y", "f(a=1)"],
    "qwen": ["<tool_call>", "</tool_call>", "<function=f>", "<function=", "</function>", "<tool_",
             "<parameter=a>", "<parameter=b>", "<parameter=c>", "<parameter=", "</parameter>", "<",
             ">", "\n", "1", "null", "[1]", '"', "é", "</par"],
    "dsml": ["<｜DSML｜function_calls>", "</｜DSML｜function_calls>", '<｜DSML｜invoke name="f">',
             "<｜DSML｜invoke", "</｜DSML｜invoke>", '<｜DSML｜parameter name="a" string="true">',
             '<｜DSML｜parameter name="c" string="false">', "<｜DSML｜parameter",
             "</｜DSML｜parameter>", "<", ">", "\n", "1", "null", '[1, "x"]', '"', "é",
             "</｜DSML｜par"],
    "gemma": ["<|tool_call>call:f{", "<|tool_call>", "<tool_call|>", "call:", '<|"|>', "a:", "b",
              ":", ",", "{", "}", "[", "]", "1", "-2.5", "true", "None", " ", "\n", '"', "é", "<|"],
    "function_gemma": ["<start_function_call>call:f{", "<end_function_call>", "<escape>", "a:",
                       "b:", "c:", ":", ",", "{", "}", "[", "]", "1", "[1]", " ", '"', "<esc"],
    "channel": ["<|channel>", "<channel|>", "thought\n", "thou", "<|", "\n", "text"],
    "harmony": ["<|channel|>", "<|start|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>",
                "<|constrain|>", "analysis", "final", "commentary", " to=functions.f ",
                " to=python", "assistant", "json", '{"a": 1}', "text", "<|", " "],
    "think": ["<think>", "</think>", "[THINK]", "[/THINK]", "<thi", "</", "\n", "text"],
}  # fmt: skip
FORMAT = {
    "deepseek_v32": "dsml", "functiongemma": "function_gemma", "gemma4": "gemma",
    "deepseek_v3": "deepseek", "deepseek_v31": "deepseek", "hermes": "hermes",
    "llama3_json": "llama", "llama4_json": "llama", "mistral": "mistral", "openai": "harmony",
    "pythonic": "pythonic", "qwen3_coder": "qwen", "qwen3_xml": "qwen",
}  # fmt: skip
TOOLS = [*sorted(set(TOOL_PARSERS) - {"deepseek_v31", "llama4_json", "qwen3_xml"}), "list", "named"]


def make(tools: str | None, reasoning: str | None = None, **options: Any) -> OutputParser:
    forced = {"list": JsonListParser, "named": lambda: NamedToolParser("f")}
    parser = forced[tools]() if tools in forced else tools
    return OutputParser(reasoning=reasoning, tools=parser, tool_schemas=SCHEMAS, **options)


def bits_of(tools: str) -> list[str]:
    return BITS[FORMAT.get(tools, "hermes")]


def texts(bits: list[str]) -> st.SearchStrategy[str]:
    piece = st.one_of(st.sampled_from(bits), st.sampled_from(bits), st.text(max_size=3))
    return st.lists(piece, max_size=25).map("".join)


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted(place % (len(text) + 1) for place in places)
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


PLACES = st.lists(st.integers(0, 10_000), max_size=12)


@pytest.mark.parametrize("tools", TOOLS)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_pieces_give_what_the_whole_text_gives(tools: str, data: st.DataObject) -> None:
    text = data.draw(texts(bits_of(tools)))
    whole = read(make(tools), [text])
    assert read(make(tools), cut(text, data.draw(PLACES))).same_as(whole)
    assert read(make(tools), text).same_as(whole)


@pytest.mark.parametrize("reasoning", sorted(REASONING_PARSERS))
@pytest.mark.parametrize("prompt", ["", "<think>\n", "<think>\n\n</think>\n\n"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_pieces_give_the_same_reasoning(
    reasoning: str, prompt: str, data: st.DataObject
) -> None:
    tools = data.draw(st.sampled_from([None, "hermes", "openai"]))
    bits = BITS[{"openai_gptoss": "harmony", "gemma4": "channel"}.get(reasoning, "think")]
    text = data.draw(texts([*bits, *bits, *BITS["hermes"]]))
    whole = read(make(tools, reasoning, prompt_text=prompt), [text])
    pieces = cut(text, data.draw(PLACES))
    assert read(make(tools, reasoning, prompt_text=prompt), pieces).same_as(whole)
    assert read(make(tools, reasoning, prompt_text=prompt), text).same_as(whole)


@pytest.mark.parametrize("tools", sorted(TOOL_PARSERS))
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_text_without_a_call_is_content_to_the_last_character(
    tools: str, data: st.DataObject
) -> None:
    text = data.draw(texts(bits_of(tools)))
    parsed = read(make(tools), text)
    if not parsed.calls and tools != "openai":  # which has markers around content, too
        assert parsed.content == text


@given(text=st.text(), places=PLACES)
@settings(max_examples=60, deadline=None)
def test_without_parsers_all_is_content(text: str, places: list[int]) -> None:
    assert read(make(None), cut(text, places)).content == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.sampled_from(["</tool_call>", "[TOOL_CALLS]", "}", "\\", '"', "\n```"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
CALLS = st.lists(
    st.tuples(st.from_regex(r"[a-zA-Z_]\w{0,10}", fullmatch=True).filter(str.isascii),
              st.dictionaries(st.text(), VALUES, max_size=4)),
    min_size=1, max_size=3,
)  # fmt: skip


def _gemma(value: Any) -> str:
    """As Gemma's template writes it, but with every key between markers."""
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            members = (f'<|"|>{key}<|"|>:{_gemma(each)}' for key, each in value.items())
            return "{" + ",".join(members) + "}"
        case list():
            return f"[{','.join(map(_gemma, value))}]"
        case _:
            return json.dumps(value)


def write(tools: str, name: str, arguments: dict[str, Any], ascii_only: bool) -> str:
    text = json.dumps(arguments, ensure_ascii=ascii_only)
    match FORMAT[tools]:
        case "hermes":
            return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'
        case "llama":
            return f'{{"name": "{name}", "parameters": {text}}}'
        case "mistral":
            return f"[TOOL_CALLS]{name}[ARGS]{text}"
        case "deepseek":
            call = f"function<｜tool▁sep｜>{name}\n```json\n{text}\n```"
            return f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>"
        case "gemma":
            return f"<|tool_call>call:{name}{_gemma(arguments)}<tool_call|>"
        case _:
            header = f"<|start|>assistant<|channel|>commentary to=functions.{name}"
            return f"{header} <|constrain|>json<|message|>{text}<|call|>"


@pytest.mark.parametrize(
    "tools", ["hermes", "llama3_json", "mistral", "deepseek_v3", "openai", "gemma4"]
)
@given(calls=CALLS, places=PLACES, ascii_only=st.booleans())
@settings(max_examples=40, deadline=None)
def test_calls_that_are_written_are_read(
    tools: str, calls: list[tuple[str, dict[str, Any]]], places: list[int], ascii_only: bool
) -> None:
    between = "; " if tools == "llama3_json" else ""
    text = between.join(write(tools, *call, ascii_only) for call in calls)
    parsed = read(make(tools), cut(text, places))
    assert parsed.content == ""
    assert parsed.values == calls


@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(["f", "get_weather", "a.b"]),
            st.dictionaries(
                st.sampled_from(["a", "b2", "_c"]),
                VALUES.filter(lambda value: "\\u" not in json.dumps(value)),
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    places=PLACES,
)
@settings(max_examples=60, deadline=None)
def test_python_literals_are_read_as_python_writes_them(
    calls: list[tuple[str, dict[str, Any]]], places: list[int]
) -> None:
    written = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]
    parsed = read(make("pythonic"), cut(f"[{', '.join(written)}]", places))
    assert parsed.content == ""
    assert parsed.values == calls


LENGTH = 200_000
MARKER = 40  # characters; longer than any


def opening(tools: str) -> str:
    return {
        "hermes": '<tool_call>{"name": "f", "arguments": ', "llama": '{"name": "f", "parameters": ',
        "mistral": "[TOOL_CALLS]f[ARGS]", "pythonic": "[f(a=", "harmony": "<|channel|>analysis to=",
        "qwen": "<tool_call><function=f><parameter=c>",
        "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>",
        "dsml": '<｜DSML｜invoke name="f"><｜DSML｜parameter name="c" string="false">',
        "gemma": "<|tool_call>call:f{a:", "function_gemma": "<start_function_call>call:f{a:",
    }[FORMAT.get(tools, "hermes")]  # fmt: skip


def spend(tools: str, text: str, size: int) -> float:
    """Seconds of the processor to read `text` in pieces; none of it may be left to read again."""
    parser = make(tools)
    start = time.process_time()
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
        assert all(len(stage._text) - stage._at < MARKER for stage in parser._stages)
    parser.finish()
    return time.process_time() - start


@pytest.mark.parametrize("tools", TOOLS)
def test_two_hundred_kilobytes_are_read_once(tools: str) -> None:
    bits = bits_of(tools)
    mixed = "".join(random.Random(0).choices(bits, k=LENGTH // 6))
    for text in (opening(tools) + "[" * LENGTH, opening(tools) + mixed):
        assert spend(tools, text, 10) < 5
        assert spend(tools, text, len(text)) < 5


@pytest.mark.slow
@pytest.mark.parametrize("tools", TOOLS)
@pytest.mark.parametrize("size", [2, LENGTH])
def test_two_hundred_kilobytes_of_anything_take_little_time(tools: str, size: int) -> None:
    start = opening(tools)
    for fill in [
        "{",
        '{"a":',
        "(",
        "-",
        " ",
        "<",
        "a",
        '"',
        "\\",
        "'",
        "\n",
        start,
        bits_of(tools)[0],
    ]:
        fills = fill * (LENGTH // len(fill))
        for text in (start + fills, fills):
            assert spend(tools, text, size) < 5, text[:60]

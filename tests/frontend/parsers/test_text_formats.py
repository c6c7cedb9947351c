"""Pythonic, Qwen3-Coder, DSML and harmony: calls that are not JSON as a whole."""

import json
from typing import Any

import pytest

from jaxserve.frontend.parsers.literals import literal_json, parameter_types, typed_json
from jaxserve.frontend.parsers.output_parser import OutputParser
from tests.frontend.parsers.reading import Parsed, parse


def test_pythonic_reads_parallel_calls_with_every_kind_of_literal() -> None:
    text = """[f(a=1, b="x", c=[1, (2.5, -3)], d={'k': None, "t": True}, e=null), m.g(), """
    text += "h(z=false,),]"
    parsed = parse(text, "pythonic")
    arguments = {"a": 1, "b": "x", "c": [1, [2.5, -3]], "d": {"k": None, "t": True}, "e": None}
    assert parsed.content == ""
    assert parsed.values == [("f", arguments), ("m.g", {}), ("h", {"z": False})]


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        (r"'it\'s'", "it's"),
        ('"a)], b=1"', "a)], b=1"),
        ('"""x"y""" ', 'x"y'),
        ("'''a\n'b'''", "a\n'b"),
        ('""', ""),
        ('"two\nlines"', "two\nlines"),
        (r'"\d\u00e9"', "\\dé"),
        ('"a" "b"', "ab"),
        ("'日本🎉'", "日本🎉"),
        ("1_000", 1000),
        ("{1: 2}", {"1": 2}),
    ],
)
def test_pythonic_reads_a_literal(literal: str, value: Any) -> None:
    assert parse(f"[f(a={literal}, b=1)]", "pythonic").values == [("f", {"a": value, "b": 1})]


@pytest.mark.parametrize(
    "text",
    [
        "[see(x) for x in y]", "[1, 2]", "[f]", "[f(1)]", "[f(a=g())]", "[f(a=1", "[f(a", "[", "[]",
        "[f(a=b'x')]", "[f(a=1e999)]", "[f(a={1})]", "[f(a=1+1)]", "[f(a=)]", "[f(a=(])]",
        "[__import__('os').system('x')]", "f(a=1)", "x [f(a=1)]", "[1f()]", "[.f()]",
        "[f(a=" + "[" * 100 + "]" * 100 + ")]",
    ],
)  # fmt: skip
def test_pythonic_text_that_is_no_call_is_content(text: str) -> None:
    parsed = parse(text, "pythonic")
    assert (parsed.content, parsed.calls) == (text, [])


def test_pythonic_text_after_the_list_is_content() -> None:
    parsed = parse("[f(a=1)]\nDone.", "pythonic")
    assert (parsed.content, parsed.values) == ("\nDone.", [("f", {"a": 1})])


def test_pythonic_arguments_that_go_wrong_after_the_first_are_no_json() -> None:
    assert parse("[f(a=1, b=g(2)), h()]", "pythonic").calls == [
        ("f", '{"a": 1, "b": g(2)}'),
        ("h", "{}"),
    ]
    assert parse("[f(a=1, 2)]", "pythonic").calls == [("f", '{"a": 1, 2)]')]
    assert parse("[f(a=1, b='x", "pythonic").calls == [("f", '{"a": 1, b=\'x')]


def test_pythonic_passes_an_argument_on_when_it_is_complete() -> None:
    parser = OutputParser(reasoning=None, tools="pythonic")
    assert parser.feed("[f(a=1").tool_calls == ()
    assert parser.feed(", b='").tool_calls[0].arguments == '{"a": 1'
    assert parser.feed("x'").tool_calls == ()
    assert parser.feed(")").tool_calls[0].arguments == ', "b": "x"}'


@pytest.mark.parametrize(
    "text", ["", "1 +", "f()", "\x00", "x" * 10, "-" * 10_000 + "1", "9" * 9_999]
)
def test_what_is_no_literal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        literal_json(text)


def test_half_a_surrogate_pair_stays_an_escape() -> None:
    assert literal_json(r"'é\ud800'") == r'"\u00e9\ud800"'


SCHEMA = {
    "properties": {
        "text": {"type": "string"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "count": {"type": "integer"},
        "size": {"type": "number"},
        "flag": {"type": "boolean"},
        "items": {"type": ["array", "null"]},
        "thing": {"$ref": "#/$defs/Thing"},
        "loop": {"$ref": "#/properties/loop"},
        "either": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
        "any": {},
        "odd": 7,
    },
    "$defs": {"Thing": {"type": "object"}},
}


def qwen(text: str, **options: Any) -> Parsed:
    return parse(text, "qwen3_coder", tool_schemas={"f": SCHEMA}, **options)


def call(**values: str) -> str:
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function=f>\n{tags}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "3", "3"),
        ("text", "null", "null"),
        ("text", "", ""),
        ("text", "\n two\nlines \n", "\n two\nlines \n"),
        ("text", 'say "hi" \\ \t', 'say "hi" \\ \t'),
        ("text", "<b>é🎉</b> </parameter> & <tool_call></tool_call>", None),
        ("text", "</function> </parameters>", None),
        ("maybe", "None", None),
        ("maybe", "none of it", "none of it"),
        ("count", "3", 3),
        ("count", "null", None),
        ("count", "three", "three"),
        ("count", "9" * 5000, "9" * 5000),
        ("size", "2.50", 2.5),
        ("size", "3.0", 3),
        ("size", "inf", "inf"),
        ("flag", "True", True),
        ("flag", "yes", "yes"),
        ("items", '[1, {"a": "x"}]', [1, {"a": "x"}]),
        ("items", "[1, 'x', None]", [1, "x", None]),
        ("items", '"[1]"', [1]),
        ("items", "null", None),
        ("items", "[1", "[1"),
        ("items", "[" * 5000, "[" * 5000),
        ("items", "[1e999]", "[1e999]"),
        ("thing", '{"a": {}}', {"a": {}}),
        ("loop", "3", "3"),
        ("either", "3", 3),
        ("either", "x", "x"),
        ("any", "3", "3"),
        ("odd", "3", "3"),
        ("unknown", "3", "3"),
    ],
)
def test_qwen_types_a_value_by_the_schema(key: str, text: str, value: Any) -> None:
    if value is None and "<" in text:
        value = text
    assert qwen(call(**{key: text})).values == [("f", {key: value})]


def test_qwen_reads_parallel_calls_and_text_around_them() -> None:
    second = "<tool_call><function=g></function></tool_call>"
    parsed = qwen(f"Now.\n{call(text='a', count='1')}\n{second}\nSo.")
    assert parsed.content == "Now.\n\nSo."
    assert parsed.calls == [("f", '{"text": "a", "count": 1}'), ("g", "{}")]


def test_qwen_does_without_the_outer_marker_and_without_end_tags() -> None:
    assert qwen("<function=f><parameter=count>1</parameter></function>").values == [
        ("f", {"count": 1})
    ]
    text = "<tool_call><function=f><parameter=count>1</function></tool_call>"
    assert qwen(text).values == [("f", {"count": 1})]
    text = "<tool_call><function=f><parameter=count>1</parameter></tool_call>"
    assert qwen(text).values == [("f", {"count": 1})]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<function=f>", "{"),
        ("<function=f><parameter=te", '{"te'),
        ("<function=f><parameter=text>half</par", '{"text": "half</par'),
        ("<function=f><parameter=text>a line\n", '{"text": "a line\\n'),
        ("<function=f><parameter=count>12", '{"count": 12'),
        ("<function=f><parameter=count>12</parameter>", '{"count": 12'),
        ("<function=f><parameter=count>12</parameter></function>", '{"count": 12}'),
    ],
)
def test_qwen_arguments_cut_off_stay_cut_off(text: str, arguments: str) -> None:
    parsed = qwen(text)
    assert (parsed.content, parsed.calls) == ("", [("f", arguments)])


@pytest.mark.parametrize(
    "text",
    ["<tool_call>", "<tool_call>x", "<tool_call>\n<function", "<function=", "<function=>",
     "<function=f\n>", "<parameter=a>1</parameter>", "</tool_call>", "a < b"],
)  # fmt: skip
def test_qwen_text_that_is_no_call_is_content(text: str) -> None:
    parsed = qwen(text)
    assert (parsed.content, parsed.calls) == (text, [])


def test_qwen_passes_a_string_on_as_it_arrives() -> None:
    parser = OutputParser(reasoning=None, tools="qwen3_xml", tool_schemas={"f": SCHEMA})
    parser.feed("<tool_call>\n<function=f>\n<parameter=text>\n")
    assert parser.feed('He said "').tool_calls[0].arguments == 'He said \\"'
    assert parser.feed("\n</para").tool_calls == ()
    assert parser.feed("graph>").tool_calls[0].arguments == "\\n</paragraph>"


def test_types_come_in_the_order_of_the_schema() -> None:
    assert parameter_types(SCHEMA, "maybe") == ["string", "null"]
    assert parameter_types(SCHEMA, "items") == ["array", "null"]
    assert parameter_types({"properties": 3}, "items") == ["string"]
    assert typed_json("None", ["integer"]) == "null"


def dsml(*parameters: str, name: str = "f") -> str:
    inner = "\n".join(parameters)
    return f'<｜DSML｜invoke name="{name}">\n{inner}\n</｜DSML｜invoke>'


def argument(name: str, value: str, string: bool) -> str:
    start = f'<｜DSML｜parameter name="{name}" string="{str(string).lower()}">'
    return f"{start}{value}</｜DSML｜parameter>"


def deepseek(text: str) -> Parsed:
    return parse(text, "deepseek_v32", tool_schemas={"f": SCHEMA})


@pytest.mark.parametrize(
    ("key", "text", "string", "value"),
    [
        ("text", "杭州", True, "杭州"),
        ("text", '\n"3"\n', True, '\n"3"\n'),
        ("text", "a </｜DSML｜parameter> b", True, "a </｜DSML｜parameter> b"),
        ("count", "3", True, "3"),
        ("count", "3", False, 3),
        ("text", "3", False, 3),
        ("unknown", '{"a": [1]}', False, {"a": [1]}),
        ("maybe", "null", False, None),
        ("items", "[1, 'x']", False, [1, "x"]),
        ("flag", "true", False, True),
        ("size", "2.50", False, 2.5),
        ("thing", "{half", False, "{half"),
    ],
)
def test_dsml_values_are_text_or_json(key: str, text: str, string: bool, value: Any) -> None:
    assert deepseek(dsml(argument(key, text, string))).values == [("f", {key: value})]


def test_dsml_reads_parallel_calls_and_text_around_them() -> None:
    calls = dsml(argument("text", "a", True), argument("count", "1", False)) + "\n" + dsml(name="g")
    block = f"<｜DSML｜function_calls>\n{calls}\n</｜DSML｜function_calls>"
    parsed = deepseek(f"Now.\n\n{block}\nSo.")
    assert parsed.content == "Now.\n\n\nSo."
    assert parsed.calls == [("f", '{"text": "a", "count": 1}'), ("g", "{}")]


@pytest.mark.parametrize(
    "text",
    ["<｜DSML｜function_calls>", "<｜DSML｜function_calls>x", "<｜DSML｜invoke>",
     "<｜DSML｜invoke name=f>", '<｜DSML｜invoke name="">', '<｜DSML｜invoke name="f"',
     "</｜DSML｜function_calls>"],
)  # fmt: skip
def test_dsml_text_that_is_no_call_is_content(text: str) -> None:
    parsed = deepseek(text)
    assert (parsed.content, parsed.calls) == (text, [])


def harmony(channel: str, text: str, to: str = "", end: str = "<|end|>") -> str:
    header = f"<|channel|>{channel}{f' to={to} <|constrain|>json' if to else ''}"
    return f"{header}<|message|>{text}{end}<|start|>assistant"


@pytest.mark.parametrize("reasoning", [None, "openai_gptoss"])
def test_harmony_sorts_channels_into_reasoning_content_and_calls(reasoning: str | None) -> None:
    text = (
        harmony("analysis", "Let me think.")
        + harmony("commentary", "I will look.")
        + harmony("commentary", '{"a": 1}', "functions.f", "<|call|>")
        + "<|channel|>final<|message|>Done"
    )
    parsed = parse(text, "openai", reasoning=reasoning)
    assert parsed.reasoning == "Let me think."
    assert parsed.content == "I will look.Done"
    assert parsed.values == [("f", {"a": 1})]


def test_harmony_takes_the_recipient_in_the_role_and_empty_arguments() -> None:
    text = "<|start|>assistant to=functions.f<|channel|>commentary json<|message|><|call|>"
    assert parse(text, "openai").calls == [("f", "{}")]


def test_harmony_leaves_calls_as_they_are_when_there_are_no_tools() -> None:
    text = '<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>'
    parsed = parse(text, None, reasoning="openai_gptoss")
    assert (parsed.content, parsed.calls) == (text, [])


@pytest.mark.parametrize("text", ["plain", "<|channel|>", "<|channel|>final", "<|start|>x<|end|>"])
def test_harmony_text_that_is_no_message_is_content(text: str) -> None:
    assert parse(text, "openai", reasoning="openai_gptoss").content == text


def test_a_string_is_escaped_so_that_json_reads_it_back() -> None:
    text = "".join(map(chr, range(0x20, 0x7F))) + "\t\r\n\x00é\u2028🎉"
    assert qwen(call(text=text)).values == [("f", {"text": text})]
    assert json.loads(typed_json(text, ["string"])) == text

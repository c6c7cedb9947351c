"""Hermes, Llama, Mistral, DeepSeek, and what tool_choice forces: calls that are JSON."""

import pytest

from jaxserve.frontend.parsers.forced import JsonListParser, NamedToolParser
from jaxserve.frontend.parsers.output_parser import OutputParser
from tests.frontend.parsers.reading import parse

HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    '{"a": "```"}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n"
    "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)


def test_hermes_gives_text_before_and_after_a_call_as_content() -> None:
    parsed = parse(f"Let me look.\n{HERMES}\nThat was it.", "hermes")
    assert parsed.content == "Let me look.\n\nThat was it."
    assert parsed.values == [("f", {"a": 1})]


def test_hermes_reads_parallel_calls_and_drops_the_space_around_them() -> None:
    parsed = parse(f"\n{HERMES}\n{HERMES.replace('"f"', '"g"')}\n", "hermes")
    assert parsed.content == ""
    assert parsed.values == [("f", {"a": 1}), ("g", {"a": 1})]
    assert len(set(parsed.ids)) == 2
    assert all(each.startswith("chatcmpl-tool-") for each in parsed.ids)


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": {"b": [1, {"c": null}], "d": {}}, "e": [[]]}',
        '{"code": "<tool_call></tool_call>}]{["}',
        '{"text": "\\"quoted\\" \\\\ \\u00e9 \\ud83d\\ude00 \\n"}',
        '{"town": "Zürich", "日本": "🎉"}',
        "{}",
        "[1, 2]",
        '"a string"',
        "3.5e-7",
        "null",
    ],
)
@pytest.mark.parametrize("end", ["</tool_call>", "\n</tool_call>", ""])
def test_hermes_passes_arguments_on_as_they_are(arguments: str, end: str) -> None:
    parsed = parse(f'<tool_call>{{"name": "f", "arguments": {arguments}}}{end}', "hermes")
    assert parsed.content == ""
    assert parsed.calls == [("f", arguments)]


def test_hermes_waits_for_a_name_that_comes_last_and_ignores_other_keys() -> None:
    text = '<tool_call>{"id": {"x": "}"}, "arguments": {"a": 1}, "name": "f", "z": 0}</tool_call>'
    assert parse(text, "hermes").calls == [("f", '{"a": 1}')]


def test_hermes_takes_a_call_without_arguments_for_one_with_none() -> None:
    assert parse('<tool_call>{"name": "f"}</tool_call>', "hermes").calls == [("f", "{}")]


def test_hermes_decodes_the_name_and_calls_tools_that_were_not_offered() -> None:
    text = '<tool_call>{"name": "caf\\u00e9", "arguments": {}}</tool_call>'
    assert parse(text, "hermes", tool_schemas={"f": {}}).calls == [("café", "{}")]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>no JSON</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name" "f", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "argu',
        '<tool_call>{"name": "f", "arguments": ',
        "a <tool_call",
        "<tool_cal l>",
        "<<tool_call",
        " \n ",
    ],
)
def test_hermes_gives_what_is_no_call_as_content(text: str) -> None:
    parsed = parse(text, "hermes")
    assert parsed.content == text
    assert parsed.calls == []


def test_a_call_after_one_that_is_none_is_found() -> None:
    parsed = parse(f"<tool_call>oops <tool_call>\n{HERMES}", "hermes")
    assert parsed.content == "<tool_call>oops <tool_call>\n"
    assert parsed.values == [("f", {"a": 1})]


def test_text_that_only_looks_like_a_marker_is_given_at_once() -> None:
    parser = OutputParser(reasoning=None, tools="hermes")
    assert parser.feed("a <tool_").content == "a "
    assert parser.feed("c").content == ""
    assert parser.feed("x").content == "<tool_cx"
    assert parser.feed("<tool_call>").content == ""
    assert parser.feed("\n").content == ""
    assert parser.feed("?").content == "<tool_call>\n?"


def test_the_name_comes_whole_and_once_and_arguments_as_they_arrive() -> None:
    parser = OutputParser(reasoning=None, tools="hermes")
    assert parser.feed('<tool_call>{"name": "get_').tool_calls == ()
    assert parser.feed('weather", "arguments": ').tool_calls == ()
    (first,) = parser.feed('{"city": "Par').tool_calls
    assert (first.index, first.name, first.arguments) == (0, "get_weather", '{"city": "Par')
    (second,) = parser.feed('is"').tool_calls
    assert (second.index, second.id, second.name, second.arguments) == (0, None, None, 'is"')
    (third,) = parser.feed("}}</tool_call>").tool_calls
    assert third.arguments == "}"
    assert parser.finish() == ("", "", ())


def test_arguments_cut_off_stay_cut_off() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "half a str'
    assert parse(text, "hermes").calls == [("f", '{"a": "half a str')]


def test_broken_arguments_reach_to_the_end_marker() -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": 1</tool_call>{HERMES}'
    assert parse(text, "hermes").calls == [("f", '{"a": 1'), ("f", '{"a": 1}')]


def test_a_brace_too_many_is_content_and_not_an_argument() -> None:
    parsed = parse('<tool_call>{"name": "f", "arguments": {}}}</tool_call>', "hermes")
    assert (parsed.content, parsed.calls) == ("}", [("f", "{}")])


def test_what_follows_the_arguments_and_breaks_off_is_content() -> None:
    parsed = parse('<tool_call>{"name": "f", "arguments": {}, "id": "x', "hermes")
    assert (parsed.content, parsed.calls) == (', "id": "x', [("f", "{}")])


def test_only_the_end_marker_of_a_call_is_dropped() -> None:
    parsed = parse(f"</tool_call>{HERMES}</tool_call>", "hermes")
    assert (parsed.content, parsed.calls) == ("</tool_call></tool_call>", [("f", '{"a": 1}')])


def test_a_missing_outer_brace_does_no_harm() -> None:
    parsed = parse('<tool_call>{"name": "f", "arguments": {}</tool_call>', "hermes")
    assert (parsed.content, parsed.calls) == ("", [("f", "{}")])


def test_raw_control_characters_and_lone_backslashes_in_strings_are_escaped() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "x\n\ty\\d \\\n"}}</tool_call>'
    assert parse(text, "hermes").values == [("f", {"a": "x\n\ty\\d \\\n"})]


@pytest.mark.parametrize("start", ["", "\n ", "<|python_tag|>", " <|python_tag|> "])
@pytest.mark.parametrize("key", ["parameters", "arguments"])
@pytest.mark.parametrize("separator", ["; ", ";", "\n"])
def test_llama_calls_may_be_bare_tagged_and_several(start: str, key: str, separator: str) -> None:
    calls = [f'{{"name": "{name}", "{key}": {{"a": {{"b": "}};{{"}}}}}}' for name in "fg"]
    parsed = parse(start + separator.join(calls), "llama3_json")
    assert parsed.content == ""
    assert parsed.values == [("f", {"a": {"b": "};{"}}), ("g", {"a": {"b": "};{"}})]


def test_llama_text_before_the_tag_is_content() -> None:
    parsed = parse('Sure.<|python_tag|>{"name": "f", "parameters": {}}', "llama3_json")
    assert (parsed.content, parsed.calls) == ("Sure.", [("f", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "age": 36}',
        '{"name": "Ada"}',
        '{"people": [{"name": "f", "parameters": {}}]}',
        'See {"name": "f", "parameters": {}}',
        '; {"name": "f", "parameters": {}}',
        "<|python_tag|>print(1)",
        "<|python_tag|>",
        '{"name": "f", "param',
        "{",
    ],
)
def test_llama_json_that_is_no_call_is_content(text: str) -> None:
    parsed = parse(text, "llama3_json")
    assert (parsed.content, parsed.calls) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}}]',
        '[TOOL_CALLS][{"arguments": {"a": "]"}, "name": "f"},{"name": "g"}]',
        '[TOOL_CALLS]f{"a": "]"}[TOOL_CALLS]g{}',
        '[TOOL_CALLS]f[ARGS]{"a": "]"}[TOOL_CALLS]g[ARGS]{}',
        '[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{"a": "]"}[TOOL_CALLS] g [ARGS] {}',
        '[TOOL_CALLS]{"name": "f", "arguments": {"a": "]"}}\n[TOOL_CALLS]{"name": "g"}',
    ],
)
def test_mistral_reads_all_its_forms(text: str) -> None:
    parsed = parse("Ok." + text, "mistral")
    assert parsed.content == "Ok."
    assert parsed.values == [("f", {"a": "]"}), ("g", {})]
    assert all(len(each) == 9 and each.isalnum() for each in parsed.ids)
    assert ("CALL_ID" in text) == (parsed.ids[0] == "abcdefgh1")


@pytest.mark.parametrize(
    "text",
    ["[TOOL_CALLS]", "[TOOL_CALLS] []", "[TOOL_CALLS]f", "[TOOL_CALLS]f(1)", "[TOOL_CALLS]f[ARGS]x",
     "[TOOL_CALLS] [1]", "[TOOL", "[TOOL_CALL]"],
)  # fmt: skip
def test_mistral_text_that_is_no_call_is_content(text: str) -> None:
    parsed = parse(text, "mistral")
    assert (parsed.content, parsed.calls) == (text, [])


def test_deepseek_reads_fenced_and_plain_arguments() -> None:
    parsed = parse("Hm." + DEEPSEEK, "deepseek_v3")
    assert (parsed.content, parsed.values) == ("Hm.", [("f", {"a": "```"}), ("g", {})])
    plain = DEEPSEEK.replace("function<｜tool▁sep｜>", "").replace("\n```json\n", "<｜tool▁sep｜>")
    assert parse(plain.replace("\n```<", "<"), "deepseek_v31").values == parsed.values


@pytest.mark.parametrize("length", [5, 20, 30, 45, 55, 65])
def test_deepseek_text_cut_off_before_the_arguments_is_content(length: int) -> None:
    assert parse(DEEPSEEK[:length], "deepseek_v3").content == DEEPSEEK[:length]


def test_required_reads_a_list_of_calls() -> None:
    text = '[{"name": "f", "parameters": {"a": [1]}}, {"name": "g", "parameters": {}}]'
    parsed = parse(text, JsonListParser)
    assert (parsed.content, parsed.values) == ("", [("f", {"a": [1]}), ("g", {})])
    assert parse(text[:36], JsonListParser).calls == [("f", '{"a": [')]
    assert parse("Sorry, no.", JsonListParser).content == "Sorry, no."


def test_named_takes_all_text_for_arguments() -> None:
    parsed = parse(' {"a": "x"}', lambda: NamedToolParser("f"))
    assert (parsed.content, parsed.calls) == ("", [("f", '{"a": "x"}')])
    assert parse("", lambda: NamedToolParser("f")).calls == []

"""Chat templates render as transformers renders them, and cannot do harm."""

from typing import Any

import pytest
import transformers

from jaxserve.errors import RequestError
from jaxserve.frontend.chat import render_chat
from jaxserve.frontend.tokenizer import Tokenizer

# Uses what real templates use: tools, tojson, namespace, loop controls, macros, generation.
TOOLS = """
{%- macro header(role) %}{{ '<|' ~ role ~ '|>\n' }}{% endmacro %}
{%- set ns = namespace(count=0, names=[]) %}
{%- if tools %}
    {{- header('system') }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\n" ~ (tool | tojson(indent=2)) ~ "\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skipped' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- header(message.role) }}
    {% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<call>' ~ (call.function.arguments | tojson) ~ '</call>' }}
        {%- endfor %}
    {%- else %}
    {%- generation %}
    {{- message.content | trim }}{{ eos_token }}
    {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{{ ns.count }} {{ dict(a=1, **{'b': 2})['b'] }} {{ enable_thinking is defined }} {{ bos_token }}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
"""
PARTS = (
    "{% for m in messages %}{% set c = m['content'] %}{% if c is string %}{{ c }}{% else %}"
    "{% for p in c %}[{{ p['text'] }}]{% endfor %}{% endif %};{% endfor %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "<é & 'x'>", "parameters": {"type": "object"}},
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief.  "},
        {"role": "user", "content": "Was <ist> \n das? 你好 🙂"},
        {"role": "assistant", "content": " Ja. "},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "user", "content": "x", "name": None},
        {"role": "skipped", "content": "?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "hm",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "42"},
    ],
]


@pytest.fixture(scope="module")
def reference(tokenizer: Tokenizer) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, **tokenizer.special_tokens_map
    )


def demo_template(tokenizer: Tokenizer) -> str:
    assert tokenizer.chat_template is not None
    return tokenizer.chat_template


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("kind", ["demo", "tools"])
def test_the_text_is_that_of_transformers(
    tokenizer: Tokenizer, reference: Any, chat: list[dict[str, Any]], add: bool, kind: str
) -> None:
    template = demo_template(tokenizer) if kind == "demo" else TOOLS
    tools = [TOOL] if kind == "tools" else None
    options: dict[str, Any] = {"add_generation_prompt": add, "tools": tools}
    mine = tokenizer.apply_chat_template(
        chat, tokenize=False, chat_template=template, enable_thinking=False, **options
    )
    theirs = reference.apply_chat_template(
        chat, tokenize=False, chat_template=template, enable_thinking=False, **options
    )
    assert mine == theirs
    ids = tokenizer.apply_chat_template(chat, chat_template=template, **options)
    assert ids == reference.apply_chat_template(
        chat, chat_template=template, return_dict=False, **options
    )


@pytest.mark.parametrize("content", ["Once upon", "Once upon  ", " a\n"])
@pytest.mark.parametrize("kind", ["demo", "tools"])
def test_a_continued_message_ends_where_that_of_transformers_ends(
    tokenizer: Tokenizer, reference: Any, content: str, kind: str
) -> None:
    template = demo_template(tokenizer) if kind == "demo" else TOOLS
    chat = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": content}]
    options: dict[str, Any] = {
        "continue_final_message": True, "tokenize": False, "chat_template": template,
    }  # fmt: skip
    mine = tokenizer.apply_chat_template(chat, **options)
    assert mine == reference.apply_chat_template(chat, **options)
    assert chat[-1]["content"] == content  # the caller's messages stay as they were


def test_text_parts_are_joined_or_kept_as_the_template_wants_them(reference: Any) -> None:
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ]
    assert render_chat("{{ messages[0].content }}", chat) == "a\nb"
    assert render_chat(PARTS, chat) == "[a][b];"
    assert render_chat(PARTS, chat) == reference.apply_chat_template(
        chat, tokenize=False, chat_template=PARTS
    )


def test_arguments_of_tool_calls_may_come_as_json_text() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": [1]}'}}
    chat = [{"role": "assistant", "tool_calls": [call]}]
    template = "{{ messages[0].tool_calls[0].function.arguments.a }}"
    assert render_chat(template, chat) == "[1]"
    assert call["function"]["arguments"] == '{"a": [1]}'


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (None, CHATS[0], "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", CHATS[0], "roles must alternate"),
        ("{% for %}", CHATS[0], "not valid Jinja"),
        ("{{ messages[5].content.x }}", CHATS[0], "refuses|cannot be applied"),
        ("{{ 1 / 0 }}", CHATS[0], "ZeroDivisionError"),
        ("x", [], "empty"),
        ("x", "hello", "must be a list"),
        ("x", {"role": "user"}, "must be a list"),
        ("x", ["hello"], r"messages\[0\] is a str"),
        ("x", [{"content": "x"}], r"messages\[0\] has no role"),
        ("x", [{"role": "user", "content": 5}], "content is a int"),
        ("x", [{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
        ("x", [{"role": "user", "tool_calls": [{"function": {"arguments": "{"}}]}], "valid JSON"),
        ("x", [{"role": "user", "tool_calls": 3}], "tool_calls"),
    ],
)
def test_what_cannot_be_rendered_is_a_request_error(
    template: str | None, messages: Any, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        render_chat(template, messages)


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(RequestError, match="exclude each other"):
        render_chat("x", CHATS[0], add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(RequestError, match="no text"):
        render_chat("x", [{"role": "assistant"}], continue_final_message=True)
    with pytest.raises(RequestError, match="leaves out"):
        render_chat("{# content #}", CHATS[0], continue_final_message=True)
    with pytest.raises(RequestError, match="may not set messages"):
        render_chat("x", CHATS[0], template_kwargs={"messages": []})


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages|attr('__class__') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'] }}",
    "{{ dict.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '%s' | format(messages.__class__) }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ range(10000000) | list | length }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_cannot_leave_the_sandbox(template: str) -> None:
    chat = [{"role": "user", "content": "x"}]
    try:
        text = render_chat(template, chat)
    except RequestError:
        text = ""
    assert "class" not in text
    assert "built-in" not in text
    assert "root:" not in text
    assert chat == [{"role": "user", "content": "x"}]


def test_a_template_that_writes_without_end_is_stopped() -> None:
    template = (
        "{% for i in range(90000) %}{% for j in range(90000) %}{{ 'x' * 99999 }}"
        "{% endfor %}{% endfor %}"
    )
    with pytest.raises(RequestError, match="more than"):
        render_chat(template, CHATS[0])


def test_a_constant_is_not_computed_while_compiling() -> None:
    template = "{% if false %}{% set x = [0] * 300000000 %}{{ x | length }}{% endif %}ok"
    assert render_chat(template, CHATS[0]) == "ok"


def test_objects_that_are_not_plain_data_are_seen_as_such() -> None:
    class Message:
        def model_dump(self) -> dict[str, str]:
            return {"a": "b"}

    chat = [{"role": "user", "content": "x", "extra": Message(), "other": object()}]
    assert render_chat("{{ messages[0].extra.a }}{{ messages[0].other }}", chat) == "b<object>"

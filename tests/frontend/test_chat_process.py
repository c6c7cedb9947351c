"""Chat templates in a process of their own: the same text, and a bomb ends nothing but itself."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.frontend.chat import render_chat
from jaxserve.frontend.chat_process import ChatProcess

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tools | tojson }}"
CHAT = [
    {"role": "user", "content": "Grüße \U0001f600\n\u2028"},
    {"role": "assistant", "content": "x"},
]


@pytest.fixture
def process() -> Iterator[ChatProcess]:
    made = ChatProcess(timeout_s=4.0)
    yield made
    made.close()


def test_the_text_is_that_of_the_renderer(process: ChatProcess) -> None:
    options = {"tools": [{"a": 1}], "add_generation_prompt": True, "template_kwargs": {"x": [1]}}
    assert process.render(TEMPLATE, CHAT, **options) == render_chat(TEMPLATE, CHAT, **options)
    long = [{"role": "user", "content": "é" * 3_000_000}]
    assert process.render(TEMPLATE, long) == render_chat(TEMPLATE, long)


def test_refusals_come_through(process: ChatProcess) -> None:
    with pytest.raises(RequestError, match="no good") as refused:
        process.render("{{ raise_exception('no good') }}", CHAT)
    assert refused.value.param == "messages"
    with pytest.raises(RequestError, match="no chat template"):
        process.render(None, CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='ab' * 1000) %}{% for i in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ [0] * 3000000000 }}",
    ],
    ids=["time", "memory", "memory at once"],
)
def test_a_bomb_is_refused_and_the_next_conversation_is_rendered(
    process: ChatProcess, template: str
) -> None:
    with pytest.raises(RequestError):
        process.render(template, CHAT)
    assert process.render(TEMPLATE, CHAT).startswith("<user>")


def test_threads_take_turns(process: ChatProcess) -> None:
    def one(i: int) -> str:
        return process.render(TEMPLATE, [{"role": "user", "content": str(i)}])

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(one, range(64)))
    assert texts == [f"<user>{i}null" for i in range(64)]


def test_a_closed_process_does_not_come_back(process: ChatProcess) -> None:
    process.start()
    process.close()
    process.close()
    with pytest.raises(EngineDeadError):
        process.render(TEMPLATE, CHAT)

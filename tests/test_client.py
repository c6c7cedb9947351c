"""The client over an engine that follows a script: outputs, stop strings, aborts, death."""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest

from jaxserve.async_llm import AsyncLLM
from jaxserve.checkpoint import Checkpoint, open_checkpoint
from jaxserve.client import Client, read_template
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, EngineDeadError, RequestError, UnsupportedError
from jaxserve.frontend.request_state import RequestState
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.outputs import RequestOutput
from jaxserve.request import Request
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.frontend.fake_engine import FakeEngine

EOS = 2
DELTA, FINAL = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("demo", load_format="dummy")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


class Setup:
    """A client whose engine answers with given texts, one a choice."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> None:
        self.checkpoint, self.tokenizer = checkpoint, tokenizer
        self.answers: list[list[int]] = [[EOS]]
        self.llms: list[AsyncLLM] = []

    def client(self, *answers: str | Sequence[int], **engine: Any) -> Client:
        coder = load_tokenizer(self.checkpoint)
        self.answers = [
            [*coder.encode(answer), EOS] if isinstance(answer, str) else list(answer)
            for answer in answers
        ]
        self.engine = FakeEngine(self._script, vocab_size=49_152, **engine)
        return Client(EngineConfig(), self.engine, self.checkpoint, self.tokenizer)

    def llm(self, *answers: str | Sequence[int], **engine: Any) -> AsyncLLM:
        client = self.client(*answers, **engine)
        self.engine.start()
        self.llms.append(AsyncLLM.from_client(client))
        return self.llms[-1]

    def _script(self, request: Request, choice: int) -> Sequence[int]:
        return self.answers[choice % len(self.answers)]


@pytest.fixture
def setup(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[Setup]:
    found = Setup(checkpoint, tokenizer)
    yield found
    for llm in found.llms:
        llm.shutdown()


def run(client: Client, engine: FakeEngine, state: RequestState) -> list[RequestOutput]:
    """Every output of a request, taken after each step."""
    outputs = []
    while not state.finished:
        engine.step()
        message = client.next_message(timeout_s=1)
        assert message is not None
        client.handle(message)
        output = state.take()
        if output is not None:
            outputs.append(output)
    assert state.take() is None
    return outputs


def answer(setup: Setup, text: str | Sequence[int], params: SamplingParams, **engine: Any) -> Any:
    client = setup.client(text, **engine)
    outputs = run(client, setup.engine, client.submit("Say", params))
    return outputs[-1].outputs[0]


def test_an_output_has_every_field(setup: Setup) -> None:
    client = setup.client("Hi you")
    params = SamplingParams(logprobs=1, prompt_logprobs=0)
    state = client.submit("Say it", params, request_id="mine")
    output = run(client, setup.engine, state)[-1]
    assert (output.request_id, output.prompt, output.finished) == ("mine", "Say it", True)
    assert output.prompt_token_ids == list(setup.engine.requests[0].prompt_token_ids)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.num_cached_tokens == 2
    assert output.metrics is not None
    assert output.metrics.first_token_s == 2.0
    (choice,) = output.outputs
    assert choice.text == "Hi you"
    assert choice.token_ids[-1] == EOS
    assert (choice.finish_reason, choice.stop_reason) == ("stop", None)
    assert choice.logprobs is not None
    assert len(choice.logprobs) == len(choice.token_ids)
    assert choice.cumulative_logprob == pytest.approx(-0.5 * len(choice.token_ids))
    assert [*choice.logprobs[0]] == [choice.token_ids[0], 0]
    assert client.num_unfinished == 0
    assert setup.engine.aborts == []
    assert client.recent_stats[-1].num_running == 1


@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_deltas_join_to_the_cumulative_and_the_final_output(
    setup: Setup, tokens_per_step: int
) -> None:
    found = {}
    for kind in RequestOutputKind:
        client = setup.client("Hello 🙂 world, good bye", tokens_per_step=tokens_per_step)
        params = SamplingParams(output_kind=kind, logprobs=0, stop=["bye"])
        found[kind] = run(client, setup.engine, client.submit("Say", params))
    (final,) = found[FINAL]
    last = found[RequestOutputKind.CUMULATIVE][-1]
    assert final.outputs == last.outputs
    assert final.outputs[0].text == "Hello 🙂 world, good "
    deltas = [output.outputs[0] for output in found[DELTA]]
    assert "".join(delta.text for delta in deltas) == final.outputs[0].text
    assert [i for delta in deltas for i in delta.token_ids] == final.outputs[0].token_ids
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    assert logprobs == final.outputs[0].logprobs
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_a_stop_string_ends_the_choice_in_the_engine_and_drops_later_tokens(setup: Setup) -> None:
    for tokens_per_step in (1, 4):
        params = SamplingParams(stop=["wor", "ld, g"], logprobs=0, max_tokens=50)
        choice = answer(setup, "Hello world, good bye all", params, tokens_per_step=tokens_per_step)
        assert choice.text == "Hello "
        assert (choice.finish_reason, choice.stop_reason) == ("stop", "wor")
        assert len(choice.token_ids) == len(choice.logprobs) == 2
        assert choice.cumulative_logprob == pytest.approx(-1.0)
        (abort,) = setup.engine.aborts
        assert (abort.choice, abort.finished) == (0, True)
        assert setup.engine.num_running == 0


def test_tokens_on_their_way_when_the_stop_string_was_found_are_ignored(setup: Setup) -> None:
    client = setup.client("a b c d e f g h")
    state = client.submit("Say", SamplingParams(stop=["c"], n=1))
    for _ in range(6):  # the engine runs ahead
        setup.engine.step()
    while (message := client.next_message(timeout_s=0.01)) is not None:
        client.handle(message)
    output = state.take()
    assert output is not None
    assert output.outputs[0].text == "a b "
    assert len(output.outputs[0].token_ids) == 3
    assert len(setup.engine.aborts) == 1


def test_no_abort_is_sent_for_what_the_engine_has_ended(setup: Setup) -> None:
    client = setup.client("abc", tokens_per_step=9)
    run(client, setup.engine, client.submit("Say", SamplingParams(stop=["b"])))
    assert setup.engine.aborts == []


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, ("one two three", "stop", None)),
        ({"max_tokens": 2}, ("one two", "length", None)),
        ({"stop_token_ids": [1296]}, ("one two", "stop", 1296)),
        ({"stop": "two", "include_stop_str_in_output": True}, ("one two", "stop", "two")),
        ({"stop": "two", "min_tokens": 2}, ("one two three", "stop", None)),
        ({"skip_special_tokens": False}, ("one two three", "stop", None)),
        (
            {"skip_special_tokens": False, "include_stop_str_in_output": True},
            ("one two three<|im_end|>", "stop", None),
        ),
        ({"detokenize": False}, ("", "stop", None)),
    ],
)
def test_how_outputs_end(
    setup: Setup, tokenizer: Tokenizer, params: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    if "stop_token_ids" in params:
        params = {"stop_token_ids": [tokenizer.encode(" three")[0]]}
        expected = ("one two", "stop", params["stop_token_ids"][0])
    choice = answer(setup, "one two three", SamplingParams(**params))
    assert (choice.text, choice.finish_reason, choice.stop_reason) == expected


def test_choices_end_by_themselves(setup: Setup) -> None:
    client = setup.client("a", "b c d e", "b X d e")
    state = client.submit("Say", SamplingParams(n=3, stop=["X"], output_kind=DELTA))
    outputs = run(client, setup.engine, state)
    texts = ["", "", ""]
    for output in outputs:
        for choice in output.outputs:
            texts[choice.index] += choice.text
    assert texts == ["a", "b c d e", "b "]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    # A choice that has ended is not told again.
    ends = [c.index for o in outputs for c in o.outputs if c.finish_reason]
    assert sorted(ends) == [0, 1, 2]
    assert [abort.choice for abort in setup.engine.aborts] == [2]
    assert len(setup.engine.requests) == 1


def test_a_slow_consumer_gets_everything_in_one_delta(setup: Setup) -> None:
    client = setup.client("one two three four")
    state = client.submit("Say", SamplingParams(output_kind=DELTA, max_tokens=9))
    while setup.engine.step():
        message = client.next_message(timeout_s=1)
        assert message is not None
        client.handle(message)
    output = state.take()
    assert output is not None
    assert output.outputs[0].text == "one two three four"
    assert len(output.outputs[0].token_ids) == 5


def test_equal_ids_are_allowed_and_an_abort_ends_them_all(setup: Setup) -> None:
    client = setup.client("a b c")
    states = [client.submit("Say", SamplingParams(), request_id="x") for _ in range(2)]
    other = client.submit("Say", SamplingParams(), request_id="y")
    assert len({request.request_id for request in setup.engine.requests}) == 3
    assert client.abort("x") == states
    assert [abort.finished for abort in setup.engine.aborts] == [False, False]
    for state in states:
        output = state.take()
        assert output is not None
        assert output.outputs[0].finish_reason == "abort"
    assert client.abort(["x", "nobody"]) == []
    assert run(client, setup.engine, other)[-1].outputs[0].text == "a b c"


def test_a_refused_request_leaves_nothing_behind(setup: Setup) -> None:
    client = setup.client("a", refuse_after=0)
    for prompt, params, options in (
        ("Say", SamplingParams(), {}),
        ([-1], SamplingParams(), {}),
        ("Say", {"temperature": 1}, {}),
        ("Say", SamplingParams(), {"lora_request": object()}),
    ):
        with pytest.raises((RequestError, UnsupportedError)):
            client.submit(prompt, params, **options)  # pyright: ignore[reportArgumentType]
    assert client.num_unfinished == 0


def test_when_the_engine_dies_everyone_is_told(setup: Setup) -> None:
    client = setup.client("a b c d")
    states = [client.submit("Say", SamplingParams()) for _ in range(2)]
    setup.engine.die("out of memory")
    message = client.next_message(timeout_s=1)
    assert message is not None
    assert client.handle(message) == states
    for state in states:
        with pytest.raises(EngineDeadError, match="out of memory"):
            state.take()
    with pytest.raises(EngineDeadError, match="out of memory"):
        client.submit("Say", SamplingParams())
    client.shutdown()
    client.shutdown()
    assert setup.engine.num_shutdowns == 1


def test_what_fails_in_one_output_ends_that_request_only(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = setup.client("a b c")
    bad, good = (client.submit("Say", SamplingParams()) for _ in range(2))

    def fail(delta: object) -> bool:
        raise RuntimeError("surprise")

    monkeypatch.setattr(bad, "add", fail)
    with caplog.at_level(logging.CRITICAL):
        assert run(client, setup.engine, good)[-1].outputs[0].text == "a b c"
    output = bad.take()
    assert output is not None
    assert output.outputs[0].finish_reason == "error"


def test_without_a_tokenizer_tokens_come_out(setup: Setup) -> None:
    setup.tokenizer = None
    client = setup.client([5, 6, EOS])
    state = client.submit([1, 2], SamplingParams(logprobs=0))
    choice = run(client, setup.engine, state)[-1].outputs[0]
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("", [5, 6, EOS], "stop")
    assert choice.logprobs is not None
    assert choice.logprobs[0][5].decoded_token is None
    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        client.require_tokenizer()


def test_a_template_is_a_file_or_itself(tmp_path: Any) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert read_template(str(tmp_path / "t.jinja")) == "{{ messages }}"
    assert read_template("{{ x }}") == "{{ x }}"
    with pytest.raises(ConfigError, match="neither"):
        read_template(str(tmp_path / "no.jinja"))


# --- AsyncLLM ---


async def collect(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


def test_streams_run_together(setup: Setup) -> None:
    llm = setup.llm("one two 🙂 three", delay_s=0.001)

    async def go() -> list[list[RequestOutput]]:
        params = SamplingParams(output_kind=DELTA)
        return await asyncio.gather(
            *(collect(llm.generate("Say", params, f"r{i}")) for i in range(20))
        )

    for i, outputs in enumerate(asyncio.run(go())):
        assert "".join(o.outputs[0].text for o in outputs) == "one two 🙂 three"
        assert {o.request_id for o in outputs} == {f"r{i}"}
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    # Another loop, later, works as well; default parameters; no id.
    assert asyncio.run(collect(llm.generate("x")))[-1].outputs[0].text == "one two 🙂 three"
    assert llm.client.num_unfinished == 0
    assert setup.engine.aborts == []
    assert llm._mailboxes == {}


def test_closing_or_cancelling_a_stream_aborts_its_request(setup: Setup) -> None:
    llm = setup.llm([5] * 250, delay_s=0.001)
    params = SamplingParams(max_tokens=250)

    async def close() -> None:
        stream = llm.generate("Say", params)
        await anext(stream)
        await stream.aclose()

    async def cancel() -> None:
        task = asyncio.create_task(collect(llm.generate("Say", params)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for number, ending in enumerate((close, cancel), start=1):
        asyncio.run(ending())
        assert len(setup.engine.aborts) == number
        assert setup.engine.num_running == llm.client.num_unfinished == 0


def test_an_abort_ends_the_stream_with_what_there_is(setup: Setup) -> None:
    llm = setup.llm([5] * 250, delay_s=0.001)

    async def go() -> list[RequestOutput]:
        task = asyncio.create_task(
            collect(llm.generate("Say", SamplingParams(max_tokens=250), "x"))
        )
        await asyncio.sleep(0.02)
        await llm.abort("x")
        return await asyncio.wait_for(task, 5)

    last = asyncio.run(go())[-1]
    assert last.finished
    assert last.outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("how", ["die", "shutdown", "bug"])
def test_streams_end_with_an_error_when_the_engine_ends(
    setup: Setup, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = setup.llm([5] * 250, delay_s=0.001)
    caplog.set_level(logging.CRITICAL)

    async def go() -> None:
        task = asyncio.create_task(collect(llm.generate("Say", SamplingParams(max_tokens=250))))
        await asyncio.sleep(0.02)
        if how == "die":
            setup.engine.die("out of memory")
        elif how == "shutdown":
            await asyncio.to_thread(llm.shutdown)
        else:
            handle = llm.client.handle
            calls = itertools.count()
            monkeypatch.setattr(
                llm.client, "handle", lambda m: 1 / 0 if next(calls) == 0 else handle(m)
            )
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(task, 5)
        with pytest.raises(EngineDeadError):
            await llm.check_health()
        with pytest.raises(EngineDeadError):
            await collect(llm.generate("Say"))

    asyncio.run(go())
    assert not llm.is_running


def test_a_refused_stream_raises_and_others_go_on(setup: Setup) -> None:
    llm = setup.llm("fine")

    async def go() -> Any:
        return await asyncio.gather(
            collect(llm.generate("")), collect(llm.generate("x")), return_exceptions=True
        )

    refused, outputs = asyncio.run(go())
    assert isinstance(refused, RequestError)
    assert outputs[-1].outputs[0].text == "fine"


def test_a_chat_streams(setup: Setup) -> None:
    llm = setup.llm("fine")
    outputs = asyncio.run(collect(llm.chat([{"role": "user", "content": "Hi"}])))
    assert outputs[-1].outputs[0].text == "fine"
    assert outputs[-1].prompt is not None
    assert outputs[-1].prompt.endswith("<|im_start|>assistant\n")
    with pytest.raises(RequestError, match="empty"):
        llm.chat([])


def test_an_async_llm_that_nobody_holds_stops_its_engine(setup: Setup) -> None:
    llm = setup.llm("fine")
    setup.llms.clear()
    reader = llm._reader
    asyncio.run(collect(llm.generate("x")))
    del llm
    reader.join(timeout=5)
    assert not reader.is_alive()
    assert setup.engine.num_shutdowns == 1


def test_a_grammar_compiles_while_the_event_loop_goes_on(setup: Setup) -> None:
    llm = setup.llm("yes")
    bomb = {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949, 9941)]}
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            start = time.monotonic()
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - start)

    async def go() -> None:
        ticking = asyncio.create_task(tick())
        good = StructuredOutputsParams(choice=["yes"])
        await collect(llm.generate("x", SamplingParams(structured_outputs=good)))
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=bomb))
        with pytest.raises(RequestError, match="longer than 2 s") as error:
            await collect(llm.generate("x", params))
        assert error.value.code == "invalid_json_schema"
        ticking.cancel()

    asyncio.run(go())
    assert len(gaps) > 20  # two seconds long
    request = setup.engine.requests[-1]
    assert request.grammar is not None
    assert request.needs_host_tokens

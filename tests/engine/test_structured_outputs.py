"""Grammars through a real engine, with a tiny random model: its tokens are as hostile as can be."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.checkpoint import open_checkpoint
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.frontend.grammar_compiler import Vocabulary
from jaxserve.frontend.matchers import MatcherFactory
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.request import Abort, Grammar, Request
from tests.engine import harness
from tests.engine.harness import SMALL, Answers, answer, collect, request, write_tiny_llama

EOS = 2
# Each of a bounded length, so that random tokens come to its end.
GRAMMARS = (
    "start: /[a-z]{3,9}/",
    'start: "yes" | "no" | "perhaps"',
    'start: "[" /[0-9]{1,4}/ ("," /[0-9]{1,4}/){0,4} "]"',
    'start: a\na: "(" a? ")" | /[xyz]{2,6}/',
    '{"grammars":[{"json_schema":{"type":"object","properties":{"a":{"type":"string",'
    '"maxLength":8},"b":{"enum":[1,22,333]}},"required":["a","b"],"additionalProperties":false,'
    '"x-guidance":{"whitespace_flexible":false}}}]}',
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(open_checkpoint("demo", load_format="dummy"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setitem(harness.TINY_CONFIG, "vocab_size", 49_152)
    patch.setitem(harness.TINY_CONFIG, "hidden_size", 32)
    patch.setitem(harness.TINY_CONFIG, "num_hidden_layers", 1)
    folder = write_tiny_llama(tmp_path_factory.mktemp("wide"))
    patch.undo()
    return folder


@pytest.fixture(scope="module")
def matchers(tokenizer: Tokenizer) -> MatcherFactory:
    return MatcherFactory(
        Vocabulary(
            tokenizer_json=tokenizer.backend.to_str,
            num_tokens=len(tokenizer),
            end_token_ids=(EOS,),
        )
    )


def started(model: Path, matchers: MatcherFactory, **changes: Any) -> Engine:
    config = EngineConfig(model=str(model), **{**SMALL, "max_num_batched_tokens": 16, **changes})
    engine = Engine(config, open_checkpoint(str(model)), matchers)
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine(model: Path, matchers: MatcherFactory) -> Iterator[Engine]:
    found = started(model, matchers)
    yield found
    found.shutdown()


def bound(name: str, index: int, **changes: Any) -> Request:
    given = {"temperature": 1.0, "seed": index, "max_tokens": 60, "eos_token_id": EOS, **changes}
    made = request(name, [5, 6, index], **given)
    grammar = Grammar(text=GRAMMARS[index % len(GRAMMARS)])
    return dataclasses.replace(made, grammar=grammar, needs_host_tokens=True)


def requests() -> list[Request]:
    variants: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"top_p": 0.9, "min_tokens": 3},
        {"temperature": 0.0, "logit_bias": {100: 2.0}},
        {"n": 2, "top_k": 5},
    ]
    found = [bound(f"g{i}", i, **variants[(i * 2) % 5]) for i in range(10)]
    plain = [request(f"p{i}", [9, i], temperature=0.8, seed=i, max_tokens=12) for i in range(3)]
    return [*found[:5], *plain, *found[5:]]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> Answers:
    answers: Answers = {}
    for one in requests():
        answers |= answer(engine, [one])[0]
    return answers


def check_same(got: Answers, want: Answers) -> None:
    assert got.keys() == want.keys()
    for key, one in want.items():
        assert (got[key].token_ids, got[key].finish_reason) == (one.token_ids, one.finish_reason)


def test_every_output_ends_and_follows_its_grammar(
    alone: Answers, matchers: MatcherFactory
) -> None:
    for (name, _), one in alone.items():
        if name.startswith("g"):
            assert one.finish_reason == "stop", (name, one)
            assert one.token_ids[-1] == EOS
            matcher = matchers.make(GRAMMARS[int(name[1:]) % len(GRAMMARS)])
            matcher.accept(one.token_ids)
            assert matcher.ended
    assert len({tuple(one.token_ids) for one in alone.values()}) > 10


def test_batched_and_alone_give_the_same_tokens(engine: Engine, alone: Answers) -> None:
    check_same(answer(engine, requests())[0], alone)


def test_preempted_or_not_and_ahead_or_not_give_the_same_tokens(
    model: Path, matchers: MatcherFactory, alone: Answers
) -> None:
    tight = started(model, matchers, num_gpu_blocks_override=12, async_scheduling=False)
    try:
        got, stats = answer(tight, requests())
    finally:
        tight.shutdown()
    check_same(got, alone)
    assert stats[-1].num_preemptions > 0


def test_only_the_request_without_a_possible_token_ends(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    letters = tokenizer.convert_tokens_to_ids(["a", "b", "c"])  # and no end
    never = bound("never", 1, allowed_token_ids=letters)
    ended = bound("ended", 0, allowed_token_ids=letters)
    got, _ = answer(engine, [never, ended, bound("good", 1)])
    assert got["never", 0].finish_reason == "error"
    assert got["good", 0].finish_reason == "stop"
    # Nothing is left once nine letters are out: it is complete then.
    assert got["ended", 0].finish_reason == "stop"
    assert len(got["ended", 0].token_ids) == 9


def test_without_an_end_token_a_complete_output_still_ends(engine: Engine) -> None:
    got, _ = answer(engine, [bound("free", 1, eos_token_id=None)])
    assert got["free", 0].finish_reason == "stop"


def test_a_grammar_that_does_not_compile_ends_its_request(engine: Engine) -> None:
    bad = dataclasses.replace(bound("bad", 0), grammar=Grammar(text="start: foo"))
    got, _ = answer(engine, [bad, bound("good", 0)])
    assert got["bad", 0].finish_reason == "error"
    assert got["good", 0].finish_reason == "stop"


def test_requests_that_leave_are_forgotten(engine: Engine) -> None:
    for i in range(12):
        engine.submit(bound(f"leave{i}", i))
    time.sleep(0.02)
    for i in range(0, 12, 2):
        engine.abort(Abort(request_id=f"leave{i}"))
    collect(engine, [(f"leave{i}", 0) for i in range(1, 12, 2)])
    got, stats = answer(engine, [bound("after", 0)])
    assert got["after", 0].finish_reason == "stop"
    assert stats[-1].num_used_blocks == 0
    assert engine.num_late_compiles == 0

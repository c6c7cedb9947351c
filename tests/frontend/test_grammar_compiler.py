"""Structured outputs as they come from users: what is allowed, and that nothing hostile hangs."""

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tokenizers

from jaxserve.errors import EngineDeadError, RequestError, UnsupportedError
from jaxserve.frontend import grammar_compiler
from jaxserve.frontend.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.frontend.grammar_compiler import GrammarCompiler, Vocabulary
from jaxserve.frontend.json_schema import MAX_ENUM_VALUES
from jaxserve.frontend.matchers import Matcher, MatcherFactory
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.frontend.test_gguf_tokenizer import sentencepiece

TIMEOUT_S = 2.0
EOS = 2
OBJECT = {"type": "object"}


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(
        tokenizer_json=tokenizer.backend.to_str, num_tokens=len(tokenizer), end_token_ids=(EOS,)
    )


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    found = GrammarCompiler(vocabulary(tokenizer), timeout_s=TIMEOUT_S, max_bytes=1 << 18)
    found.start()
    yield found
    found.close()


@pytest.fixture(scope="module")
def matchers(tokenizer: Tokenizer) -> MatcherFactory:
    return MatcherFactory(vocabulary(tokenizer))


# What needs no model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "none is given; give exactly one of json, regex"),
        ({"json": OBJECT, "regex": "a"}, "json and regex are given"),
        ({"json_object": False}, "none is given"),
        ({"json_object": 1}, "not a boolean"),
        ({"json": 3}, "json is a int"),
        ({"json": ""}, "json is empty"),
        ({"regex": ""}, "regex is empty"),
        ({"regex": "a\0b"}, "NUL"),
        ({"regex": b"a"}, "regex is a bytes"),
        ({"grammar": " "}, "grammar is empty"),
        ({"choice": []}, "choice is not a list"),
        ({"choice": "yes"}, "choice is not a list"),
        ({"choice": [1]}, "choice is not a list"),
        ({"structural_tag": " "}, "structural_tag is empty"),
        ({"structural_tag": {"format": {}}}, "structural_tag is a dict"),
        ({"json": OBJECT, "disable_any_whitespace": 1}, "use true or false"),
        ({"json": OBJECT, "start_after": ((-1,),)}, "not a token id"),
        ({"json": OBJECT, "start_after": (1, 2)}, "sequences of token ids"),
        ({"json": OBJECT, "start_after": ((),)}, "sequences of token ids"),
        ({"json": OBJECT, "start_after": ((1,),), "opened_by": "<think>"}, "not a token id"),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        StructuredOutputsParams(**given)
    assert error.value.param == "structured_outputs"
    assert error.value.code in ("invalid_value", "invalid_json_schema")
    with pytest.raises(RequestError, match="use StructuredOutputsParams"):
        SamplingParams(structured_outputs=given)  # pyright: ignore[reportArgumentType]


# What is refused


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


CYCLE: dict[str, Any] = {"type": "object"}
CYCLE["properties"] = {"a": CYCLE}
PRIMES = (9973, 9967, 9949, 9941)
BAD_SCHEMAS: dict[str, Any] = {
    "unknown type": {"type": "strin"},
    "not an object": "[1]",
    "not JSON": "{",
    "no JSON value": {"const": {1, 2}},
    "NaN": {"const": float("nan")},
    "half a surrogate": {"const": "\ud800"},
    "depth 65": nested(64),
    "depth of text": "[" * 100_000,
    "depth of text with objects": '{"items":' * 100_000 + "{}" + "}" * 100_000,
    "a megabyte": {"enum": ["x" * 1_000_000]},
    "a megabyte of text": json.dumps({"enum": ["x" * 1_000_000]}),
    "enum of 100,000": {"enum": list(range(100_000))},
    "enum just too large": {"enum": list(range(MAX_ENUM_VALUES + 1))},
    "a Python cycle": CYCLE,
    "remote ref": {"$ref": "http://127.0.0.1:9/schema.json"},
    "file ref": {"items": {"$ref": "file:///etc/passwd"}},
    "ref to nothing": {"$ref": "#/$defs/none"},
    "ref to itself": {"$ref": "#"},
    "cycle of refs": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "cycle in allOf": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}},
    },
    "nothing matches": {"type": "integer", "minimum": 5, "maximum": 3},
    "false": {"items": False, "type": "array", "minItems": 1},
    "not implemented": {"not": {"type": "string"}},
    "switched off checks": {"not": {"type": "string"}, "x-guidance": {"lenient": True}},
    "oneOf that overlaps": {"oneOf": [{"type": "object"}, {"type": "object"}]},
    "bad pattern": {"type": "string", "pattern": "(["},
    "look-behind": {"type": "string", "pattern": "(?<=a)b"},
    "allOf of patterns": {
        "type": "string",
        "allOf": [{"pattern": f".*{c}.{{{i + 5}}}"} for i, c in enumerate("abcdefghijklmnopqrst")],
    },
    "allOf of multiples": {"allOf": [{"type": "integer", "multipleOf": p} for p in PRIMES]},
    "allOf of anyOf": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(10)]}
            for i in range(10)
        ]
    },
    "3,000 properties": {
        "type": "object",
        "properties": {f"p{i}": {"type": "string"} for i in range(3000)},
    },
    "tiny multipleOf": {"type": "number", "multipleOf": 1e-300},
    "bad whitespace": None,
}


def refused(compiler: GrammarCompiler, params: StructuredOutputsParams) -> RequestError:
    start = time.monotonic()
    with pytest.raises(RequestError) as error:
        compiler.compile(params)
    # Wall time on a busy machine; the limit itself is two seconds.
    assert time.monotonic() - start < TIMEOUT_S + 1
    assert error.value.param == "structured_outputs"
    return error.value


@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_bad_schemas_are_refused_in_time(compiler: GrammarCompiler, name: str) -> None:
    if name == "bad whitespace":
        params = StructuredOutputsParams(json=OBJECT, whitespace_pattern="([")
    else:
        params = StructuredOutputsParams(json=BAD_SCHEMAS[name])
    assert refused(compiler, params).code == "invalid_json_schema"
    compiler.compile(StructuredOutputsParams(json=OBJECT))


BAD_REGEXES = {
    "unclosed": "([",
    "look-behind": "(?<=a)b",
    "look-ahead": "(?=a)b",
    "back-reference": r"(a)\1",
    "word border": r"\bfoo\b",
    "30,000 parentheses": "(" * 30_000 + ")" * 30_000,
    "too long": "a" * (1 << 19),
    "a million repeats": "(a{1000}){1000}",
    "repeats of repeats": "(((a{100}){100}){100}){100}",
    "stars of stars": "(a*)*" * 2000 + "b",
    "nothing matches": "[^\\x00-\\U0010FFFF]",
    "half a surrogate": "\ud800",
}


@pytest.mark.parametrize("name", BAD_REGEXES)
def test_bad_regexes_are_refused_in_time(compiler: GrammarCompiler, name: str) -> None:
    assert refused(compiler, StructuredOutputsParams(regex=BAD_REGEXES[name])).code == (
        "invalid_value"
    )


BAD_GRAMMARS = {
    "undefined rule": "start: foo",
    "no syntax": "start: :::",
    "undefined GBNF rule": "root ::= foo",
    "30,000 parentheses": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000,
    "30,000 parentheses in GBNF": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000,
    "a million repeats": 'start: "a"{1000000}',
    "intersections": "start: A\nA: "
    + " & ".join(f"/(.|\\n)*{c}(.|\\n){{{i + 3}}}/" for i, c in enumerate("abcdefghijklmnop")),
    "no start": 'foo: "a"',
    "endless": 'start: "a" start',
}


@pytest.mark.parametrize("name", BAD_GRAMMARS)
def test_bad_grammars_are_refused_in_time(compiler: GrammarCompiler, name: str) -> None:
    assert refused(compiler, StructuredOutputsParams(grammar=BAD_GRAMMARS[name])).code == (
        "invalid_value"
    )


@pytest.mark.parametrize("choices", [["\ud800"], ["x" * 300_000], [str(i) for i in range(10_001)]])
def test_bad_choices_are_refused_in_time(compiler: GrammarCompiler, choices: list[str]) -> None:
    assert refused(compiler, StructuredOutputsParams(choice=choices)).code == "invalid_value"


# What is accepted


def follow(matcher: Matcher, num_words: int, seed: int, num_tokens: int) -> list[int]:
    """Random tokens that a grammar allows."""
    rng, words, tokens = np.random.default_rng(seed), np.zeros(num_words, np.uint32), []
    while not matcher.ended and len(tokens) < num_tokens:
        matcher.fill(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        tokens.append(int(rng.choice(allowed)))
        matcher.accept(tokens[-1:])
    return tokens


@pytest.mark.parametrize(
    "given",
    [
        {"regex": "(a|b)*a(a|b){30}"},  # 2**30 states, were they all made
        {"regex": r"[\p{L}\p{N}]{2000}x"},
        {"grammar": 'start: a\na: a a a a | "x" | a a | ""'},
        {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
        {"json": {"type": "string", "minLength": 10**5}},
        {"json": {"enum": [f"{i:020}" for i in range(9000)]}},
    ],
)
def test_what_looks_bad_but_is_cheap_stays_cheap(
    compiler: GrammarCompiler, matchers: MatcherFactory, given: dict[str, Any]
) -> None:
    matcher = matchers.make(compiler.compile(StructuredOutputsParams(**given)))
    start = time.process_time()
    num_tokens = len(follow(matcher, matchers.num_words, 0, 200))
    assert time.process_time() - start < 0.05 * num_tokens


def test_choices_are_taken_literally(
    compiler: GrammarCompiler, matchers: MatcherFactory, tokenizer: Tokenizer
) -> None:
    choices = ['q"uo\\te', "line\nbreak\t\x01", "日本 é \U0001f600", " a", "a", "ab", "$(x)|y*", ""]
    matcher = matchers.make(compiler.compile(StructuredOutputsParams(choice=choices)))
    seen = set()
    for seed in range(60):
        tokens = follow(matcher.copy(), matchers.num_words, seed, 99)
        assert tokens[-1] == EOS
        seen.add(tokenizer.decode(tokens[:-1]))
    assert seen <= set(choices)
    assert len(seen) >= len(choices) - 2


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({}, '{"a" : 1, "b": 2}', '{"a": "x"}'),
        ({"disable_any_whitespace": True}, '{"a":1}', '{"a": 1}'),
        ({"disable_additional_properties": True}, '{"a":1}', '{"a":1,"b":2}'),
        ({"whitespace_pattern": "[ ]?"}, '{"a": 1}', '{"a":\n1}'),
    ],
)
def test_options_change_what_matches(
    compiler: GrammarCompiler,
    matchers: MatcherFactory,
    tokenizer: Tokenizer,
    options: dict[str, Any],
    good: str,
    bad: str,
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    grammar = compiler.compile(StructuredOutputsParams(json=schema, **options))
    matcher = matchers.make(grammar)
    matcher.accept(tokenizer.encode(good))
    assert matcher.may_end
    with pytest.raises(ValueError, match="satisfy"):
        matchers.make(grammar).accept(tokenizer.encode(bad))


def test_a_tagged_union_is_read_as_pydantic_means_it(
    compiler: GrammarCompiler, matchers: MatcherFactory, tokenizer: Tokenizer
) -> None:
    def branch(tag: str, kind: str) -> dict[str, Any]:
        properties = {"tag": {"const": tag, "type": "string"}, "x": {"type": kind}}
        return {"type": "object", "properties": properties, "required": ["tag", "x"]}

    schema = {
        "$defs": {"A": branch("a", "integer"), "B": branch("b", "boolean")},
        "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
        "discriminator": {"propertyName": "tag", "mapping": {"a": "#/$defs/A"}},
    }
    grammar = compiler.compile(StructuredOutputsParams(json=schema))
    matchers.make(grammar).accept(tokenizer.encode('{"tag": "b", "x": true}'))
    with pytest.raises(ValueError, match="satisfy"):
        matchers.make(grammar).accept(tokenizer.encode('{"tag": "b", "x": 1}'))
    same = {"oneOf": [branch("a", "integer"), branch("a", "number")]}
    assert refused(compiler, StructuredOutputsParams(json=same)).code == "invalid_json_schema"


def test_a_sentencepiece_tokenizer_of_a_gguf_file_works() -> None:
    parts = tokenizer_from_gguf(sentencepiece())
    end = parts.eos_token_id
    assert end is not None
    size = parts.tokenizer.get_vocab_size(with_added_tokens=True)
    found = MatcherFactory(
        Vocabulary(tokenizer_json=parts.tokenizer.to_str, num_tokens=size, end_token_ids=(end,))
    )
    matcher = found.make("start: /a+/")
    for seed in range(5):
        tokens = follow(matcher.copy(), found.num_words, seed, 50)
        text = parts.tokenizer.decode(tokens, skip_special_tokens=True)
        assert set(text) == {"a"}


# The process


def test_good_grammars_do_not_wait_for_bad_ones(compiler: GrammarCompiler) -> None:
    bombs = [{**BAD_SCHEMAS["allOf of multiples"], "title": f"{i}"} for i in range(3)]
    slow = [compiler.begin(StructuredOutputsParams(json=bomb)) for bomb in bombs]
    start = time.monotonic()
    compiler.compile(StructuredOutputsParams(regex="[a-z]{3}x"))
    assert not all(future.done() for future in slow)
    assert time.monotonic() - start < TIMEOUT_S
    for future in slow:
        assert isinstance(future.exception(timeout=30), RequestError)


def test_the_queue_of_grammars_is_bounded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_WAITING", 3)
    found = GrammarCompiler(vocabulary(tokenizer), timeout_s=TIMEOUT_S, max_bytes=1 << 18)
    waiting = [found.begin(StructuredOutputsParams(regex=f"a{{{i}}}")) for i in range(1, 4)]
    with pytest.raises(RequestError, match="3 grammars") as error:
        found.begin(StructuredOutputsParams(regex="b"))
    assert error.value.code == "server_overloaded"
    for future in waiting:
        assert future.result(timeout=60)
    found.compile(StructuredOutputsParams(regex="b"))
    found.close()
    found.close()
    with pytest.raises(EngineDeadError):
        found.compile(StructuredOutputsParams(regex="c"))


def test_a_process_that_dies_is_started_again(compiler: GrammarCompiler) -> None:
    worker = compiler._worker
    assert worker is not None
    pending = compiler.begin(StructuredOutputsParams(json=BAD_SCHEMAS["allOf of multiples"]))
    os.kill(worker._process.pid, signal.SIGKILL)
    error = pending.exception(timeout=30)
    assert isinstance(error, RequestError)
    assert error.code == "server_overloaded"
    compiler.compile(StructuredOutputsParams(regex="again"))


def test_what_is_remembered_is_bounded(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED_BYTES", 2000)
    for i in range(20):
        compiler.compile(StructuredOutputsParams(json={"const": f"{i}" * 100}))
    assert 0 < compiler._num_cached_bytes <= 2000
    assert sum(map(len, compiler._cache.values())) == compiler._num_cached_bytes


def test_a_tokenizer_that_cannot_be_read_is_the_operators_to_know() -> None:
    found = GrammarCompiler(
        Vocabulary(tokenizer_json=lambda: "{}", num_tokens=5, end_token_ids=(1,)),
        timeout_s=TIMEOUT_S,
        max_bytes=1 << 18,
    )
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="this model's tokenizer"):
            found.compile(StructuredOutputsParams(regex="a"))
    found.close()


def test_masks_have_a_bit_for_each_token(matchers: MatcherFactory, tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer.backend, tokenizers.Tokenizer)
    words = np.zeros(matchers.num_words, np.uint32)
    matcher = matchers.make("start: /[ab]/")
    matcher.fill(words)
    allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    assert {tokenizer.decode_token(int(i)) for i in allowed} == {"a", "b"}

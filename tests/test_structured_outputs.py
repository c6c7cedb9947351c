"""Structured outputs of the demo model at temperature 1: what finishes is always valid."""

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams, StructuredOutputsParams
from jaxserve.runner.batch import Layout
from jaxserve.step import StepPlan
from tests.demo import DEMO

TIMEOUT_S = 20.0  # to compile a grammar; a busy machine is no reason to fail here
MAX_TOKENS = 96


def obj(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    required = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **required, **more}


def text(length: int = 12, **more: Any) -> dict[str, Any]:
    return {"type": "string", "maxLength": length, **more}


SCHEMAS: dict[str, dict[str, Any]] = {
    "string": text(),
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "two types": {"type": ["integer", "null"]},
    "enum of strings": {"enum": ["red", "green", "blue"]},
    "enum of all kinds": {"enum": [1, "1", None, True, [1], {"a": 2}]},
    "const": {"const": {"version": 3}},
    "bounded integer": {"type": "integer", "minimum": -3, "maximum": 20},
    "exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{2}-[0-9]{3}$"},
    "length": {"type": "string", "minLength": 3, "maxLength": 5},
    "date": {"type": "string", "format": "date"},
    "date and time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email", "maxLength": 24},
    "object": obj({"name": text(), "age": {"type": "integer", "minimum": 0, "maximum": 130}}),
    "optional properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": text(6), "c": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "typed additional": {
        "type": "object",
        "properties": {"id": {"type": "integer"}},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
    "nested": obj({"a": obj({"b": obj({"c": {"type": "boolean"}})})}),
    "array": {"type": "array", "items": {"type": "integer"}, "maxItems": 5},
    "array of a size": {"type": "array", "items": text(4), "minItems": 2, "maxItems": 3},
    "tuple": {
        "type": "array",
        "prefixItems": [text(5), {"type": "integer"}],
        "items": False,
        "minItems": 2,
    },
    "array of objects": {
        "type": "array",
        "items": obj({"x": {"type": "integer", "minimum": 0, "maximum": 99}}),
        "minItems": 1,
        "maxItems": 3,
    },
    "array of arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 2},
        "minItems": 2,
        "maxItems": 2,
    },
    "anyOf": {"anyOf": [{"type": "integer"}, obj({"s": text(6)})]},
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": {}, "b": {}},
    },
    "tagged union": {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "$defs": {
            "cat": obj({"kind": {"const": "cat"}, "lives": {"enum": [7, 9]}}),
            "dog": obj({"kind": {"const": "dog"}, "good": {"type": "boolean"}}),
        },
    },
    "local ref": obj(
        {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        **{"$defs": {"point": obj({"x": {"enum": [0, 1]}, "y": {"enum": [0, 1]}})}},
    ),
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": obj(
                {
                    "v": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                }
            )
        },
    },
    "unicode names": obj({"größe": {"enum": ["é", "日本", "\U0001f600"]}, 'quo"te': {"const": 1}}),
    "annotations": {
        "title": "T",
        "description": "d",
        "default": 1,
        "examples": [2],
        "enum": [1, 2],
    },
}
REGEXES = (
    r"[a-z]{3,8}@[a-z]{3,8}\.(com|org)",
    r"\d{4}-\d{2}-\d{2}",
    r"(yes|no)( maybe)?",
    r"^[A-F0-9]{8}$",
    r"[\u00e9\u65e5]{2,4}",
    r'"[^"\\\n]{1,12}"',
    r"a{2,20}b",
    r"(?i)hello|bye",
)
CHOICES = (
    ["yes", "no"],
    ["a", "ab", "abc"],
    [' "q"', "\\n\t", "日本 é", ""],
    ["positive", "negative"],
)
CALCULATION = r"""
start: sum
sum: term (("+" | "-") term){0,3}
term: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]?/
"""
LIST = 'root ::= "[" item ("," item){0,3} "]"\nitem ::= [0-9]{1,2} | "x"'


def params(index: int, **what: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=1.0,
        seed=1000 + index,
        structured_outputs=StructuredOutputsParams(**what),
    )


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", **DEMO, grammar_compile_timeout_s=TIMEOUT_S) as llm:
        yield llm


def is_valid(schema: dict[str, Any], output: str) -> bool:
    try:
        jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        ).validate(json.loads(output))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def run_schemas(llm: LLM) -> tuple[int, list[str]]:
    """How many of the schemas' outputs finished, and the names of the invalid ones."""
    sampling = [
        # Every other one without whitespace: small models like to go on with it.
        params(i, json=schema if i % 3 else json.dumps(schema), disable_any_whitespace=i % 2 == 0)
        for i, schema in enumerate(SCHEMAS.values())
    ]
    outputs = llm.generate(
        [f"As JSON, something with {name}:\n" for name in SCHEMAS], sampling, use_tqdm=False
    )
    num_finished, wrong = 0, []
    for (name, schema), output in zip(SCHEMAS.items(), outputs, strict=True):
        (choice,) = output.outputs
        reason, why = choice.finish_reason, choice.stop_reason
        assert reason in ("stop", "length"), f"{name}: {reason}: {why}"
        if choice.finish_reason == "stop":
            num_finished += 1
            if not is_valid(schema, choice.text):
                wrong.append(f"{name}: {choice.text}")
    return num_finished, wrong


def test_every_finished_output_is_valid_under_its_schema(llm: LLM) -> None:
    assert len(SCHEMAS) >= 30
    num_finished, wrong = run_schemas(llm)
    assert wrong == []
    assert num_finished >= 0.8 * len(SCHEMAS)


def test_without_the_masks_the_suite_fails(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_masks(layout: Layout, _: StepPlan) -> np.ndarray:
        return np.full((layout.num_rows, layout.shapes.mask_words), 0xFFFFFFFF, np.uint32)

    monkeypatch.setattr("jaxserve.runner.runner.pack_masks", no_masks)
    with pytest.raises(AssertionError, match="error: the grammar cannot go on"):
        run_schemas(llm)


def outputs_of(llm: LLM, sampling: list[SamplingParams]) -> list[str]:
    found = llm.generate(["Write one: "] * len(sampling), sampling, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in found] == ["stop"] * len(found)
    return [output.outputs[0].text for output in found]


def test_regexes_choices_and_grammars_hold(llm: LLM) -> None:
    sampling = [params(i, regex=regex) for i, regex in enumerate(REGEXES)]
    sampling += [params(50 + i, choice=choice) for i, choice in enumerate(CHOICES)]
    sampling += [params(60, grammar=CALCULATION), params(61, grammar=LIST)]
    texts = outputs_of(llm, sampling)
    for regex, output in zip(REGEXES, texts, strict=False):
        assert re.fullmatch(regex, output), (regex, output)
    for choice, output in zip(CHOICES, texts[len(REGEXES) :], strict=False):
        assert output in choice
    calculation, numbers = texts[-2:]
    assert re.fullmatch(r"[0-9+\-()]+", calculation)
    ast.parse(calculation, mode="eval")
    assert re.fullmatch(r"\[(\d{1,2}|x)(,(\d{1,2}|x)){0,3}\]", numbers)


def test_rows_without_a_grammar_have_the_tokens_they_have_alone(llm: LLM) -> None:
    plain = [SamplingParams(max_tokens=24, seed=i, temperature=0.9) for i in range(3)]
    alone = [llm.generate(f"Story {i}:", p, use_tqdm=False)[0] for i, p in enumerate(plain)]
    bound = [params(i, json=SCHEMAS["array of objects"]) for i in range(3)]
    prompts = [f"Story {i}:" for i in range(3)]
    single = [llm.generate("List:", p, use_tqdm=False)[0] for p in bound]
    mixed = llm.generate([*prompts, *["List:"] * 3], [*plain, *bound], use_tqdm=False)
    for together, before in zip(mixed, [*alone, *single], strict=True):
        assert together.outputs[0].token_ids == before.outputs[0].token_ids


def test_log_probabilities_are_those_of_the_allowed_tokens(llm: LLM) -> None:
    sampling = SamplingParams(
        logprobs=3, seed=1, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])
    )
    (choice,) = llm.generate("Is it? ", sampling, use_tqdm=False)[0].outputs
    assert choice.text in ("yes", "no")
    assert choice.logprobs is not None
    assert choice.cumulative_logprob is not None
    assert choice.cumulative_logprob > -10
    last = choice.logprobs[-1][choice.token_ids[-1]]
    assert (last.logprob, last.rank) == (pytest.approx(0, abs=1e-5), 1)  # only the end was left


def test_a_stop_string_ends_a_structured_output(llm: LLM) -> None:
    sampling = params(3, regex=r"[a-c]{4}STOP[a-c]{4}")
    sampling.stop = ["STOP"]
    (output,) = llm.generate("Go", sampling, use_tqdm=False)
    assert re.fullmatch("[a-c]{4}", output.outputs[0].text)
    assert output.outputs[0].stop_reason == "STOP"

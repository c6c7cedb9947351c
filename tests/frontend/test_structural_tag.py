"""Structural tags: what each format lets through, and that random outputs are always valid."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from jaxserve.checkpoint import Checkpoint
from jaxserve.errors import RequestError
from jaxserve.frontend.grammar_compiler import GrammarCompiler
from jaxserve.frontend.matchers import MatcherFactory
from jaxserve.frontend.processor import grammar_vocabulary
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.structured_outputs import StructuredOutputsParams

EOS = 2
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
TIME = {
    "type": "object",
    "properties": {"zone": {"enum": ["utc", "cet"]}, "hour": {"type": "integer", "maximum": 23}},
    "required": ["zone"],
    "additionalProperties": False,
}
ANY_TEXT = {"type": "any_text"}


def const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": value}


def tag(begin: Any, content: Any, end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def name(token: str | int) -> dict[str, Any]:
    return {"type": "token", "token": token}


TOOLS = [tag("<f=city>", schema(CITY), "</f>"), tag("<f=time>", schema(TIME), "</f>")]
TRIGGERED = {"type": "triggered_tags", "triggers": ["<f="], "tags": TOOLS}
SEPARATED = {"type": "tags_with_separator", "tags": TOOLS, "separator": ", "}
CALL, CLOCK = '<f=city>{"city": "Rome"}</f>', '<f=time>{"zone": "utc"}</f>'
DISPATCH = {
    "type": "dispatch",
    "rules": [["<n>", {"type": "regex", "pattern": r"\d{1,3}/"}], ["<yn>", const("y")]],
}
START, END = "<|im_start|>", "<empty_output>"  # special tokens of the demo model
BY_TOKEN = {
    "type": "token_triggered_tags",
    "trigger_tokens": [START],
    "tags": [{"begin": name(START), "content": schema(TIME), "end": name(END)}],
}


@pytest.fixture(scope="module")
def compiler(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    vocabulary = grammar_vocabulary(checkpoint, tokenizer)
    assert vocabulary is not None
    found = GrammarCompiler(vocabulary, timeout_s=5.0, max_bytes=1 << 18)
    yield found
    found.close()


@pytest.fixture(scope="module")
def matchers(checkpoint: Checkpoint, tokenizer: Tokenizer) -> MatcherFactory:
    vocabulary = grammar_vocabulary(checkpoint, tokenizer)
    assert vocabulary is not None
    return MatcherFactory(vocabulary)


def compiled(compiler: GrammarCompiler, given: Any, **options: Any) -> str:
    given = given if "structures" in given else {"type": "structural_tag", "format": given}
    return compiler.compile(StructuredOutputsParams(structural_tag=json.dumps(given), **options))


CASES: list[tuple[str, Any, list[str], list[str]]] = [
    ("const", const('say "hi"\n'), ['say "hi"\n'], ["say", 'say "hi"\n!', ""]),
    ("schema", schema(CITY), ['{"city": "Rome"}', '{ "city":"Oslo" }'], ["{}", '{"city": 1}', "x"]),
    ("ebnf", {"type": "grammar", "grammar": 'root ::= "yes" | "no"'}, ["yes", "no"],
     ["y", "yesno"]),
    ("lark", {"type": "grammar", "grammar": 'start: "a" b\nb: "b"+'}, ["ab", "abbb"], ["a", "ba"]),
    ("regex", {"type": "regex", "pattern": r"[A-Z]{2}/\d+\."}, ["AB/12."], ["AB/12", "A/1."]),
    ("any text", ANY_TEXT, ["", "any\nthing <f= {"], []),
    ("excludes", ANY_TEXT | {"excludes": ["bad", "<f="]}, ["ba d", ""], ["a bad", "x<f=y"]),
    ("max chars", ANY_TEXT | {"max_chars": 3}, ["", "日本🎉"], ["abcd"]),
    ("sequence", {"type": "sequence", "elements": [const("a: "), schema(CITY), ANY_TEXT]},
     ['a: {"city": "Rome"} is it'], ["a: {}", "b"]),
    ("or", {"type": "or", "elements": [const("yes"), const("no"), schema(TIME)]},
     ["yes", "no", '{"zone": "cet"}'], ["", "yesno"]),
    ("optional", {"type": "sequence", "elements": [{"type": "optional", "content": const("a")},
                                                   const("b")]}, ["ab", "b"], ["a", "aab"]),
    ("plus", {"type": "plus", "content": const("ab")}, ["ab", "abab"], ["", "aba"]),
    ("star", {"type": "star", "content": const("ab")}, ["", "ababab"], ["a"]),
    ("repeat", {"type": "repeat", "min": 1, "max": 2, "content": const("ab")},
     ["ab", "abab"], ["", "ababab"]),
    ("repeat without end", {"type": "repeat", "min": 2, "max": -1, "content": const("a")},
     ["aa", "aaaaa"], ["a"]),
    ("tag", tag("<think>", ANY_TEXT, "</think>"), ["<think></think>", "<think>a</th</think>"],
     ["<think>", "a<think></think>", "<think></think>b"]),
    ("several ends", tag("<a>", ANY_TEXT, ["</a>", "</b>"]), ["<a>x</a>", "<a>x</b>"],
     ["<a>x</b></a>", "<a>x"]),
    ("an end that is nothing", tag("A", schema(TIME), ""), ['A{"zone": "utc"}'], ["A", "A{}"]),
    ("tag in tag", tag("<a>", {"type": "sequence", "elements": [tag("<b>", ANY_TEXT, "</b>"),
                                                                ANY_TEXT]}, "</a>"),
     ["<a><b>x</a></b>y</a>"], ["<a>x</a>", "<a><b></b>"]),
    ("triggered", TRIGGERED, ["", "a < b <f", CALL, f"Look: {CALL}{CLOCK} done", "{}"],
     ["<f=", "x <f=other>", "<f=city>{}</f>", CALL[:-1], f"{CALL}<f=city>"]),
    ("at least one", TRIGGERED | {"at_least_one": True}, [CALL, f"{CALL} and {CLOCK}."],
     ["", f"a{CALL}", f"{CALL}<f=x"]),
    ("stops after the first", TRIGGERED | {"stop_after_first": True}, [CALL, f"a{CALL}", "none"],
     [f"{CALL}a", CALL + CLOCK]),
    ("exactly one", TRIGGERED | {"stop_after_first": True, "at_least_one": True}, [CALL, CLOCK],
     ["", "a", f"a{CALL}", CALL + CLOCK]),
    ("two triggers", {"type": "triggered_tags", "triggers": ["<a>", "[b"], "tags": [
        tag("<a>", const("1"), "!"), tag("[b]", const("2"), "!")]},
     ["<a>1!", "x[b]2!<a>1!y"], ["<a>2!", "[b", "x[bc"]),
    ("triggered with excludes", TRIGGERED | {"excludes": ["secret"]}, [f"a{CALL}b"],
     ["secret", f"{CALL}secret", f"secret{CALL}"]),
    ("triggered in a tag", tag("<r>", TRIGGERED, "</r>"), ["<r></r>", f"<r>a{CALL}b</r>"],
     ["<r>", f"<r>{CALL}</r>x", "<r><f=</r>"]),
    ("separated", SEPARATED, ["", CALL, f"{CALL}, {CLOCK}, {CALL}"],
     [f"{CALL}{CLOCK}", f"{CALL}, ", "x"]),
    ("separated, one", SEPARATED | {"at_least_one": True, "stop_after_first": True}, [CALL],
     ["", f"{CALL}, {CLOCK}"]),
    ("dispatch", DISPATCH, ["", "a<n>12/b<yn>y", "<n"], ["<n>x", "<yn>n", "<n>1"]),
    ("dispatch once", DISPATCH | {"loop": False}, ["", "a<n>12/", "<yn>y"], ["<n>12/a", "<yn>yy"]),
    ("dispatch in a tag", tag("(", DISPATCH | {"excludes": [")"]}, ")"), ["(a<yn>yb)"], ["(<n>)"]),
    ("special tokens in strings", tag(f"{START}f", ANY_TEXT, END), [f"{START}fab{END}"],
     [f"fab{END}", f"{START}fab"]),
    ("a special token as trigger", {"type": "triggered_tags", "triggers": [START], "tags": [
        tag(f"{START}f ", schema(TIME), END)]},
     ["x", f'x{START}f {{"zone": "utc"}}{END}y'], [f"{START}g", START]),
    ("tokens", {"type": "sequence", "elements": [name(START), const("a"), name(END)]},
     [f"{START}a{END}"],
     ["a", f"{START}a"]),
    ("one token", {"type": "sequence", "elements": [
        {"type": "exclude_token", "exclude_tokens": [START]}, const("!")]}, [" the!", f"{END}!"],
     [f"{START}!", "!"]),
    ("any tokens", tag(name(START), {"type": "any_tokens"}, name(END)),
     [f"{START}a b c{END}", f"{START}{START}{END}"], [f"a{END}", f"{START}{END}{END}"]),
    ("at most two tokens", {"type": "any_tokens", "max_tokens": 2}, ["", " the the"],
     [" the the the"]),
    ("triggered by tokens", BY_TOKEN, ["", f'Hm{START}{{"zone":"utc"}}{END} so'],
     [START, f"{START}x"]),
    ("at least one by token", BY_TOKEN | {"at_least_one": True, "stop_after_first": True},
     [f'{START}{{"zone":"utc"}}{END}'], ["", f'a{START}{{"zone":"utc"}}{END}']),
    ("dispatched by tokens", {"type": "token_dispatch", "rules": [[START, const("x")]]},
     ["", f"a{START}x b"], [f"{START}y"]),
    ("the older form", {"structures": [{"begin": "<f=city>", "schema": CITY, "end": "</f>"}],
                        "triggers": ["<f="]}, ["", f"a{CALL}b"], [CLOCK, "<f="]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "right", "wrong"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_format_lets_through_what_it_says(
    compiler: GrammarCompiler,
    matchers: MatcherFactory,
    tokenizer: Tokenizer,
    given: Any,
    right: list[str],
    wrong: list[str],
) -> None:
    grammar = compiled(compiler, given)

    def passes(text: str) -> bool:
        matcher = matchers.make(grammar)
        try:
            matcher.accept(tokenizer.encode(text, add_special_tokens=False))
        except ValueError:
            return False
        return matcher.may_end

    assert [text for text in right if not passes(text)] == []
    assert [text for text in wrong if passes(text)] == []


def calls_in(text: str) -> int:
    """How many calls a text has between free text; fails where one is not valid."""
    at = count = 0
    while (at := text.find("<f=", at)) >= 0:
        head = re.match(r"<f=(city|time)>", text[at:])
        assert head, text
        value, length = json.JSONDecoder().raw_decode(text[at + head.end() :].lstrip(" \n\r\t"))
        jsonschema.validate(value, {"city": CITY, "time": TIME}[head[1]])
        rest = text[at + head.end() :].lstrip(" \n\r\t")[length:]
        assert rest.startswith("</f>"), text
        at = len(text) - len(rest)
        count += 1
    return count


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        (TRIGGERED, 0, 99),
        (TRIGGERED | {"at_least_one": True}, 1, 99),
        (TRIGGERED | {"stop_after_first": True, "at_least_one": True}, 1, 1),
        ({"structures": [{"begin": f"<f={key}>", "schema": value, "end": "</f>"}
                         for key, value in (("city", CITY), ("time", TIME))],
          "triggers": ["<f="]}, 0, 99),
    ],
    ids=["any", "at least one", "exactly one", "older form"],
)  # fmt: skip
def test_random_outputs_are_valid_every_time(
    compiler: GrammarCompiler,
    matchers: MatcherFactory,
    tokenizer: Tokenizer,
    given: Any,
    low: int,
    high: int,
) -> None:
    grammar = compiled(compiler, given, disable_any_whitespace=True)
    useful = tokenizer.encode(f"{CALL} so {CLOCK}, 12</f>", add_special_tokens=False)
    total = 0
    for seed in range(25):
        rng = random.Random(seed)
        matcher, out = matchers.make(grammar), []
        words, plan = np.zeros(matchers.num_words, np.uint32), list[int]()
        while not matcher.ended:
            matcher.fill(words)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")
            if not plan and rng.random() < 0.2:
                plan = tokenizer.encode(rng.choice(["<f=city>", "<f=time>"]), False)
            if plan and bits[plan[0]]:
                token = plan.pop(0)
            elif bits[EOS] and (len(out) > 60 or rng.random() < 0.05):
                token = EOS
            else:  # mostly what leads somewhere, but anything that the mask allows
                likely = [each for each in useful if bits[each] and each != EOS]
                allowed = np.flatnonzero(bits)
                if likely and rng.random() < 0.9:
                    token = rng.choice(likely)
                else:
                    token = int(rng.choice(allowed))
                plan = []
            matcher.accept([token])
            out.append(token)
            assert len(out) < 400
        count = calls_in(tokenizer.decode([token for token in out if token != EOS]))
        assert low <= count <= high
        total += count
    assert total >= 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[1]", "not an object"),
        ("{", "not valid JSON"),
        ("{}", "has no format"),
        ({"format": 3}, r"format has the type None"),
        ({"format": {"type": "tags"}}, "has the type 'tags'; use one of const_string"),
        ({"format": {"type": "tag", "begin": "a"}}, "lacks content, end"),
        ({"format": const("a") | {"vlaue": "b"}}, "unknown field vlaue"),
        ({"format": {"type": "const_string", "value": 1}}, "format.value is not a string"),
        ({"format": {"type": "sequence", "elements": []}}, "is not a list with something"),
        ({"format": {"type": "sequence", "elements": [ANY_TEXT, const("a")]}},
         r"format.elements\[0\] is free text"),
        ({"format": {"type": "star", "content": ANY_TEXT}}, "format.content is free text"),
        ({"format": TRIGGERED | {"triggers": ["<g="]}}, "begins with 0 of the triggers"),
        ({"format": TRIGGERED | {"triggers": ["<f=", "<f"]}}, "begins with 2 of the triggers"),
        ({"format": TRIGGERED | {"triggers": []}}, "triggers is empty"),
        ({"format": TRIGGERED | {"tags": [tag("<f=", ANY_TEXT, "")]}}, "nothing ends"),
        ({"format": TRIGGERED | {"at_least_one": 1}}, "neither true nor false"),
        ({"format": tag("a", {"type": "any_tokens"}, "b")}, "use a token"),
        ({"format": name("<|none|>")}, "no token of this model"),
        ({"format": schema({"$ref": "http://x/y"})}, "refers to another document"),
        ({"format": schema(CITY) | {"style": "qwen_xml"}}, "'qwen_xml' is not supported"),
        ({"format": ANY_TEXT | {"max_tokens": 3}}, "max_tokens is not supported; use max_chars"),
        ({"format": {"type": "regex", "pattern": "("}}, "is refused"),
        ({"format": {"type": "grammar", "grammar": "root ::= ("}}, "is refused"),
        ({"format": schema({"type": "nonsense"})}, "is refused"),
        ({"structures": [{"begin": "a"}], "triggers": ["a"]}, "begin, schema and end"),
        ({"structures": [{"begin": "a", "schema": CITY, "end": "b"}]}, "triggers is empty"),
    ],
    ids=str,
)  # fmt: skip
def test_a_tag_that_cannot_be_is_refused_with_its_place(
    compiler: GrammarCompiler, given: Any, message: str
) -> None:
    text = given if isinstance(given, str) else json.dumps(given)
    with pytest.raises(RequestError, match=message) as error:
        compiler.compile(StructuredOutputsParams(structural_tag=text))
    assert error.value.param == "structured_outputs"
    assert error.value.code == "invalid_value"


def test_tags_that_are_deep_or_large_are_refused_quickly(compiler: GrammarCompiler) -> None:
    deep: Any = const("a")
    for _ in range(400):
        deep = {"type": "optional", "content": deep}
    large = {"type": "or", "elements": [const("x" * 1000)] * 300}
    for given, message in ((deep, "nested"), (large, "larger than")):
        with pytest.raises(RequestError, match=message):
            compiled(compiler, given)
    deeper = '{"format":' + '{"type":"star","content":' * 20_000 + "1" + "}" * 20_001
    with pytest.raises(RequestError, match=r"nested|not valid JSON|larger"):
        compiler.compile(StructuredOutputsParams(structural_tag=deeper))

"""`StructuredOutputsParams`: the form that an output must have. vLLM's names and rules."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import RequestError

PARAM = "structured_outputs"
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form of an output: exactly one of the first six, and how to read it.

    Only what needs no model is checked here; the grammar itself when the request is made.

    Attributes:
        json: A JSON Schema (draft 2020-12), as an object or as text.
        regex: The whole output matches it. Rust's syntax: no look-around, no back-references.
        choice: The output is one of these strings.
        grammar: Lark as llguidance reads it (`start: ...`), or GBNF/EBNF (`root ::= ...`).
        json_object: Any JSON object.
        structural_tag: Refused; say the same with `grammar`.
        disable_any_whitespace: JSON without optional whitespace.
        disable_additional_properties: Objects have only the properties that the schema names.
        whitespace_pattern: A regex for the whitespace that JSON may have between tokens.
        start_after: Token ids after which the form begins, looked for in the output; what comes
            before them is free. Empty: it begins at once. For models that think first.

    Raises:
        RequestError: A value is of the wrong type, or there is none or more than one of the six.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    start_after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problem = next(_problems(self), None)
        if problem is not None:
            code = "invalid_json_schema" if problem[0] == "json" else "invalid_value"
            raise RequestError(f"{PARAM}: {problem[1]}", param=PARAM, code=code)

    @property
    def kind(self) -> str:
        """Which of the six is given."""
        return next(kind for kind in KINDS if _is_given(self, kind))


def _is_given(p: StructuredOutputsParams, kind: str) -> bool:
    value = getattr(p, kind)
    return value is not None and not (kind == "json_object" and value is False)


def _problems(p: StructuredOutputsParams) -> Iterator[tuple[str, str]]:
    """Yields (field, sentence) for each thing that is wrong."""
    given = [kind for kind in KINDS if _is_given(p, kind)]
    if len(given) != 1:
        came = "none is given" if not given else f"{' and '.join(given)} are given"
        yield "", f"{came}; give exactly one of {', '.join(KINDS)}"
    if p.structural_tag is not None:
        yield (
            "structural_tag",
            "structural_tag is not supported; use grammar: a Lark grammar can embed JSON schemas "
            "with %json",
        )
    if p.json is not None and not isinstance(p.json, str | dict):
        yield "json", f"json is a {type(p.json).__name__}; use an object, or a string that holds it"
    for name in ("json", "regex", "grammar"):
        value = getattr(p, name)
        if isinstance(value, str) and not (value if name == "regex" else value.strip()):
            yield name, f"{name} is empty; give one, or leave it out"
    for name in ("regex", "grammar", "whitespace_pattern"):
        value = getattr(p, name)
        if value is None:
            continue
        if not isinstance(value, str):
            yield name, f"{name} is a {type(value).__name__}; use a string"
        elif "\0" in value:
            yield name, f"{name} holds a NUL character; leave it out"
    if p.choice is not None and (
        not isinstance(p.choice, list | tuple)
        or not p.choice
        or any(not isinstance(choice, str) for choice in p.choice)
    ):
        yield "choice", "choice is not a list of strings with at least one of them; use one"
    if p.json_object is not None and not isinstance(p.json_object, bool):
        yield "json_object", f"json_object={p.json_object!r:.40} is not a boolean; use true"
    for name in ("disable_any_whitespace", "disable_additional_properties"):
        if not isinstance(getattr(p, name), bool):
            yield name, f"{name} is a {type(getattr(p, name)).__name__}; use true or false"
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in p.start_after):
        yield "start_after", "start_after holds something that is not a token id"

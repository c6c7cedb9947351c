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
        structural_tag: Free text with forms in it, as JSON: XGrammar's `{"format": {...}}`, or the
            older `{"structures": [...], "triggers": [...]}`.
        disable_any_whitespace: JSON without optional whitespace.
        disable_additional_properties: Objects have only the properties that the schema names.
        whitespace_pattern: A regex for the whitespace that JSON may have between tokens.
        start_after: Sequences of token ids; the form begins behind the first of them in the output,
            and what comes before is free. Empty: it begins at once. For models that think first.
        opened_by: With this token id first, the output is free up to `start_after`; with another
            one the form begins at once. None: it is free anyway. For models that may think first.

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
    start_after: tuple[tuple[int, ...], ...] = ()
    opened_by: int | None = None

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
    if p.json is not None and not isinstance(p.json, str | dict):
        yield "json", f"json is a {type(p.json).__name__}; use an object, or a string that holds it"
    for name in ("json", "regex", "grammar", "structural_tag"):
        value = getattr(p, name)
        if isinstance(value, str) and not (value if name == "regex" else value.strip()):
            yield name, f"{name} is empty; give one, or leave it out"
    for name in ("regex", "grammar", "structural_tag", "whitespace_pattern"):
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
    ids = [*(() if p.opened_by is None else (p.opened_by,))]
    for marker in p.start_after:
        if not isinstance(marker, list | tuple) or not marker:
            yield "start_after", "start_after is not made of sequences of token ids; give some"
            return
        ids += marker
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        yield "start_after", "start_after or opened_by holds something that is not a token id"

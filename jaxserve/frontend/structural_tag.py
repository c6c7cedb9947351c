"""Structural tags as grammars: free text with forms in it, such as a model's tool calls.

XGrammar's format (https://xgrammar.mlc.ai/docs: structural tag), and vLLM's older one, which is a
list of structures and triggers.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.frontend.json_schema import SchemaError, read_schema
from jaxserve.frontend.lark import LarkWriter, Piece, one_of, regex, sequence, token
from jaxserve.frontend.structural_fields import (
    StructuralTagError,
    fail,
    is_free,
    items,
    kind_of,
    string,
    strings,
    whole,
)

MAX_DEPTH = 32  # formats within formats
type End = tuple[Piece, ...]
type Ends = tuple[End, ...] | None
"""What may follow a format, each in pieces; None: the end of the output."""


def structural_grammar(
    text: str,
    writer: LarkWriter,
    *,
    token_id: Callable[[str], int | None],
    json_options: Mapping[str, Any],
    max_bytes: int,
    closed: bool,
) -> str:
    """A structural tag as JSON: {"lark": the grammar, "grammars": those it calls, by name}.

    Args:
        token_id: Of a token's name.
        json_options: llguidance's, for JSON schemas.
        max_bytes, closed: Of them; see `read_schema`.

    Raises:
        StructuralTagError: It is none, or uses what is not supported.
    """
    if len(text) > max_bytes:
        raise StructuralTagError(f"it is larger than {max_bytes} bytes; use a smaller one")
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StructuralTagError(f"it is not valid JSON ({error or 'too deep'})") from None
    if not isinstance(given, dict):
        raise StructuralTagError("it is not an object; use {'format': {...}}")
    translator = _Translator(writer, token_id, json_options, max_bytes, closed)
    try:
        start = translator.expression(_root(given), None, "format")
    except RecursionError:
        raise StructuralTagError("its formats are nested too deeply; flatten them") from None
    lark = writer.text(start)
    if len(lark) > 4 * max_bytes:
        raise StructuralTagError("its grammar is too large; use fewer or smaller formats")
    return json.dumps({"lark": lark, "grammars": writer.grammars})


def _root(given: dict[str, Any]) -> Any:
    """The outermost format, also of the older form."""
    if "format" in given or "structures" not in given:
        if "format" not in given:
            raise StructuralTagError("it has no format; use {'format': {'type': ...}}")
        return given["format"]
    structures = given["structures"]
    if not isinstance(structures, list) or any(
        not isinstance(each, dict) or set(each) != {"begin", "schema", "end"} for each in structures
    ):
        raise StructuralTagError("structures is not a list of objects with begin, schema and end")
    tags = [
        {
            "type": "tag",
            "begin": each["begin"],
            "content": {"type": "json_schema", "json_schema": each["schema"]},
            "end": each["end"],
        }
        for each in structures
    ]
    return {"type": "triggered_tags", "triggers": given.get("triggers"), "tags": tags}


class _Translator:
    """Formats as expressions of Lark, each with what follows it.

    Free text ends where what follows begins, so it has to know it.
    """

    def __init__(
        self,
        writer: LarkWriter,
        token_id: Callable[[str], int | None],
        json_options: Mapping[str, Any],
        max_bytes: int,
        closed: bool,
    ) -> None:
        self._writer = writer
        self._token_id = token_id
        self._json_options = json_options
        self._max_bytes = max_bytes
        self._closed = closed

    def expression(self, given: Any, ends: Ends, where: str, depth: int = 1) -> str:
        """A format and one of `ends` behind it."""
        kind = kind_of(given, where)
        if depth > MAX_DEPTH:
            raise fail(where, f"is nested deeper than {MAX_DEPTH} formats; flatten it")
        match kind:
            case "any_text":
                return self._any_text(given, ends, where)
            case "any_tokens":
                return self._any_tokens(given, ends, where)
            case "sequence":
                return self._sequence(given, ends, where, depth)
            case "or":
                elements = items(given, "elements", where)
                return one_of(
                    self.expression(each, ends, f"{where}.elements[{i}]", depth + 1)
                    for i, each in enumerate(elements)
                )
            case "optional":
                content = self.expression(given["content"], ends, f"{where}.content", depth + 1)
                return one_of([content, _end(ends) or '""'])
            case "tag":
                begin = sequence(self._pieces(given["begin"], f"{where}.begin"))
                return f"{begin} {self._behind_begin(given, ends, where, depth)}"
            case "triggered_tags" | "token_triggered_tags" | "dispatch" | "token_dispatch":
                return self._triggered(given, kind, ends, where, depth)
        return f"{self._limited(given, kind, where, depth)} {_end(ends)}"

    def _limited(self, given: dict[str, Any], kind: str, where: str, depth: int) -> str:
        """A format that ends by itself."""
        match kind:
            case "const_string":
                return sequence(self._writer.pieces(string(given, "value", where)))
            case "json_schema":
                return self._json_schema(given, where)
            case "grammar":
                return self._writer.grammar(string(given, "grammar", where))
            case "regex":
                return self._writer.rule(regex(string(given, "pattern", where)))
            case "token":
                return token(self._id(given["token"], f"{where}.token"))
            case "exclude_token":
                return self._writer.other_tokens(self._ids(given, "exclude_tokens", where))
            case "tags_with_separator":
                return self._separated(given, where, depth)
        content = self._closed_format(given["content"], f"{where}.content", depth)
        least, most = {"plus": (1, -1), "star": (0, -1)}.get(kind, (0, 0))
        if kind == "repeat":
            least, most = (whole(given, name, where) for name in ("min", "max"))
            if not (least >= 0 and (most == -1 or most >= max(least, 1))):
                raise fail(where, f"repeats {least} to {most} times; use 0 <= min <= max, or -1")
        return f"{self._writer.rule(content)}{{{least},{'' if most == -1 else most}}}"

    # Free text and free tokens

    def _any_text(self, given: dict[str, Any], ends: Ends, where: str) -> str:
        if given.get("max_tokens") is not None:
            raise fail(f"{where}.max_tokens", "is not supported; use max_chars")
        max_chars = None
        if given.get("max_chars") is not None:
            max_chars = whole(given, "max_chars", where, low=0)
        free = self._writer.free_text(strings(given, "excludes", where), max_chars)
        return self._until(free, ends, where)

    def _until(self, free: str, ends: Ends, where: str) -> str:
        if ends is None:
            return free
        if not all(ends):
            raise fail(where, "is free text that nothing ends; give the tag around it an end")
        return one_of(self._writer.until(free, end) for end in ends)

    def _any_tokens(self, given: dict[str, Any], ends: Ends, where: str) -> str:
        excluded = self._ids(given, "exclude_tokens", where) + _end_tokens(ends, where)
        most = "*"
        if given.get("max_tokens") is not None:
            most = f"{{0,{whole(given, 'max_tokens', where, low=0)}}}"
        return f"{self._writer.other_tokens(excluded)}{most} {_end(ends)}"

    def _triggered(
        self, given: dict[str, Any], kind: str, ends: Ends, where: str, depth: int
    ) -> str:
        """Text or tokens, in which a trigger begins a form."""
        dispatches, by_token = kind.endswith("dispatch"), kind.startswith("token")
        loops = given.get("loop", True) if dispatches else not given.get("stop_after_first")
        if dispatches:
            branches = self._dispatch_branches(given, where, depth)
        else:
            branches = self._tag_branches(given, by_token, where, depth)
        if by_token:
            triggers = [piece for trigger in branches for piece in trigger]
            excluded = [*triggers, *self._ids(given, "exclude_tokens", where)]
            excluded += _end_tokens(ends, where)
            if any(isinstance(piece, str) for piece in triggers):
                raise fail(where, "has a trigger that is text; use token ids or names")
            free = f"{self._writer.other_tokens(i for i in excluded if isinstance(i, int))}*"
            tail = f"{free} {_end(ends)}"
        else:
            free = self._writer.free_text(strings(given, "excludes", where), None)
            tail = self._until(free, ends, where)
        heads = [
            f"{free} {sequence(trigger)}" if by_token else self._writer.until(free, trigger)
            for trigger in branches
        ]
        following = [one_of(forms) for forms in branches.values()]
        again = one_of(f"{head} {each}" for head, each in zip(heads, following, strict=True))
        if given.get("at_least_one"):
            first = one_of(
                f"{sequence(trigger)} {each}"
                for trigger, each in zip(branches, following, strict=True)
            )
            return f"{first} {again}* {tail}" if loops else f"{first} {_end(ends)}"
        return f"{again}* {tail}" if loops else one_of([f"{again} {_end(ends)}", tail])

    def _tag_branches(
        self, given: dict[str, Any], by_token: bool, where: str, depth: int
    ) -> dict[End, list[str]]:
        """By trigger, what follows it: the rest of the begin, the content, the end."""
        name = "trigger_tokens" if by_token else "triggers"
        starts: dict[str | End, End] = {}  # triggers, as a tag's begin has them and in pieces
        if by_token:
            starts.update({(each,): (each,) for each in self._ids(given, name, where)})
        else:
            starts.update({e: self._writer.pieces(e) for e in strings(given, name, where)})
        if not starts:
            raise fail(f"{where}.{name}", "is empty; name at least one")
        branches: dict[End, list[str]] = {trigger: [] for trigger in starts.values()}
        for i, tag in enumerate(items(given, "tags", where)):
            at = f"{where}.tags[{i}]"
            tag = {"type": "tag", **tag} if isinstance(tag, dict) else tag
            if kind_of(tag, at) != "tag":
                raise fail(at, "is not a tag")
            begin = self._pieces(tag["begin"], f"{at}.begin")
            if not by_token and not isinstance(tag["begin"], str):
                raise fail(f"{at}.begin", "is not a string")
            full = begin if by_token else tag["begin"]
            own = [each for each in starts if full[: len(each)] == each]
            if len(own) != 1:
                raise fail(f"{at}.begin", f"begins with {len(own)} of the triggers; use one")
            trigger = starts[own[0]]
            rest = begin[1:] if by_token else self._writer.pieces(tag["begin"][len(own[0]) :])
            form = self._behind_begin(tag, (), at, depth)
            branches[trigger].append(f"{sequence(rest)} {form}")
        self._check_triggers(branches, f"{where}.{name}")
        return {trigger: forms for trigger, forms in branches.items() if forms}

    def _dispatch_branches(
        self, given: dict[str, Any], where: str, depth: int
    ) -> dict[End, list[str]]:
        branches: dict[End, list[str]] = {}
        for i, rule in enumerate(items(given, "rules", where)):
            at = f"{where}.rules[{i}]"
            if not isinstance(rule, list) or len(rule) != 2:
                raise fail(at, "is not a pair of a pattern and a format")
            pattern, content = rule
            if given["type"] == "token_dispatch":
                trigger: End = (self._id(pattern, at),)
            else:
                trigger = self._pieces(pattern, at)
            if not trigger or trigger in branches:
                raise fail(at, "has an empty pattern, or one that another rule has")
            branches[trigger] = [self._closed_format(content, f"{at}[1]", depth)]
        self._check_triggers(branches, f"{where}.rules")
        return branches

    def _check_triggers(self, branches: Mapping[End, object], where: str) -> None:
        for trigger in branches:
            if not trigger:
                raise fail(where, "has an empty trigger")
            if len(trigger) > 1 and isinstance(trigger[0], str):
                raise fail(
                    where, f"has a trigger of text and a special token, {trigger[0]!r:.40} ...; "
                    "use one that begins with the token"
                )  # fmt: skip

    # The others

    def _sequence(self, given: dict[str, Any], ends: Ends, where: str, depth: int) -> str:
        elements = items(given, "elements", where)
        places = [f"{where}.elements[{i}]" for i in range(len(elements))]
        found = [
            self._closed_format(each, at, depth)
            for each, at in zip(elements[:-1], places[:-1], strict=True)
        ]
        return " ".join([*found, self.expression(elements[-1], ends, places[-1], depth + 1)])

    def _separated(self, given: dict[str, Any], where: str, depth: int) -> str:
        tags = [
            self._closed_format({"type": "tag", **tag} if isinstance(tag, dict) else tag,
                                f"{where}.tags[{i}]", depth)
            for i, tag in enumerate(items(given, "tags", where))
        ]  # fmt: skip
        one = self._writer.rule(one_of(tags))
        separator = sequence(self._writer.pieces(string(given, "separator", where)))
        some = one if given.get("stop_after_first") else f"{one} ({separator} {one})*"
        return f"({some})" if given.get("at_least_one") else f"({some})?"

    def _behind_begin(self, tag: dict[str, Any], ends: Ends, where: str, depth: int) -> str:
        """A tag's content and end, and one of `ends`; without an end, what follows is it."""
        own = self._ends(tag["end"], f"{where}.end")
        if own == ((),):
            if ends == () and is_free(tag["content"]):
                raise fail(where, "is free text that nothing ends; give it an end")
            own, ends = ends, None
        return f"{self.expression(tag['content'], own, f'{where}.content', depth + 1)} {_end(ends)}"

    def _closed_format(self, given: Any, where: str, depth: int) -> str:
        """A format that something else may follow."""
        kind_of(given, where)
        if is_free(given):
            raise fail(where, "is free text, which can only come last or in a tag with an end")
        return self.expression(given, (), where, depth + 1)

    def _json_schema(self, given: dict[str, Any], where: str) -> str:
        if given.get("style", "json") != "json":
            raise fail(f"{where}.style", f"{given['style']!r:.40} is not supported; use json")
        schema = {} if given["json_schema"] is True else given["json_schema"]
        try:
            text = read_schema(schema, max_bytes=self._max_bytes, closed=self._closed)
        except SchemaError as error:
            raise fail(f"{where}.json_schema:", str(error)) from None
        if self._json_options:
            text = json.dumps({**json.loads(text), "x-guidance": self._json_options})
        return self._writer.rule(f"%json {text}")

    # Tokens

    def _id(self, given: Any, where: str) -> int:
        found = self._token_id(given) if isinstance(given, str) else given
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise fail(where, f"names {given!r:.40}, which is no token of this model")
        return found

    def _ids(self, given: dict[str, Any], name: str, where: str) -> list[int]:
        values = given.get(name) or []
        if not isinstance(values, list):
            raise fail(f"{where}.{name}", "is not a list of tokens")
        return [self._id(each, f"{where}.{name}[{i}]") for i, each in enumerate(values)]

    def _pieces(self, given: Any, where: str) -> End:
        if isinstance(given, str):
            return self._writer.pieces(given)
        if isinstance(given, dict) and kind_of(given, where) == "token":
            return (self._id(given["token"], where),)
        raise fail(where, "is neither a string nor a token")

    def _ends(self, given: Any, where: str) -> tuple[End, ...]:
        several = given if isinstance(given, list) else [given]
        if not several:
            raise fail(where, "is empty; use a string")
        return tuple(self._pieces(each, where) for each in several)


def _end(ends: Ends) -> str:
    return one_of(map(sequence, ends)) if ends else ""


def _end_tokens(ends: Ends, where: str) -> list[int]:
    """What ends free tokens."""
    found = [end[0] for end in ends or () if end]
    tokens = [piece for piece in found if isinstance(piece, int)]
    if len(tokens) < len(found) or any(not end for end in ends or ()):
        raise fail(where, "is made of tokens, but what ends it is text; use a token")
    return tokens

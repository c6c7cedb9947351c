"""Writes grammars in llguidance's form of Lark: literals, rules, free text that something ends.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence

type Piece = str | int
"""Text, or the id of a token that is no text."""

ANY = "ANY"


class LarkWriter:
    """Collects rules; expressions are plain strings.

    Args:
        special_tokens: Ids by name. In a grammar's text they do not match what they look like, so
            they are written as the tokens they are.
        end_token_ids: Never part of an output.
    """

    def __init__(self, special_tokens: Mapping[str, int], end_token_ids: Iterable[int]) -> None:
        self._special = special_tokens
        self._ends = tuple(end_token_ids)
        names = sorted(special_tokens, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self._rules: list[str] = []
        self.grammars: dict[str, str] = {}  # Lark or GBNF, by the name that rules call them by

    def text(self, start: str) -> str:
        """The whole grammar, for llguidance beside `grammars`."""
        lines = ["%llguidance {}", f"start: {start}", f"{ANY}: /(?s:.*)/", *self._rules]
        return "\n".join(lines) + "\n"

    def rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def terminal(self, body: str) -> str:
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def grammar(self, text: str) -> str:
        """A grammar of its own."""
        name = f"g{len(self.grammars)}"
        self.grammars[name] = text
        return f"@{name}"

    def pieces(self, text: str) -> tuple[Piece, ...]:
        """A text as literals and special tokens."""
        parts = (part for part in self._split.split(text) if part)
        return tuple(self._special.get(part, part) for part in parts)

    def free_text(self, excludes: Sequence[str], max_chars: int | None) -> str:
        """A terminal: any text, as far as it goes, without what is excluded."""
        if not excludes and max_chars is None:
            return ANY
        length = ANY if max_chars is None else f"/(?s:.{{0,{max_chars}}})/"
        others = "".join(f" & ~({ANY} {quoted(each)} {ANY})" for each in excludes)
        return self.terminal(f"{length}{others}")

    def until(self, free: str, end: Sequence[Piece]) -> str:
        """Free text up to the first of `end`, and all of it."""
        first, *rest = end
        if isinstance(first, int):
            head = f"{free} {token(first)}"
        else:
            head = self.rule(f"{free} {quoted(first)}", "[lazy]")
        return " ".join([head, sequence(rest)]) if rest else head

    def other_tokens(self, token_ids: Iterable[int]) -> str:
        """Any one token but these, and but those that end outputs."""
        return f"<[^{','.join(str(i) for i in sorted({*token_ids, *self._ends}))}]>"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def token(token_id: int) -> str:
    return f"<[{token_id}]>"


def sequence(pieces: Sequence[Piece]) -> str:
    found = (token(piece) if isinstance(piece, int) else quoted(piece) for piece in pieces)
    return " ".join(found) or '""'


def one_of(expressions: Iterable[str]) -> str:
    return f"({' | '.join(expressions)})"


def regex(pattern: str) -> str:
    """A pattern between slashes."""
    escaped = re.sub(r"\\.|/", lambda m: r"\/" if m[0] == "/" else m[0], pattern, flags=re.DOTALL)
    return f"/{escaped.replace(chr(10), r'\n')}/"

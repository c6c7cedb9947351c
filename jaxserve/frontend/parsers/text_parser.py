"""`TextParser`: a grammar over text that arrives in pieces, written as a generator."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any, ClassVar

from jaxserve.frontend.parsers.types import ParsedDelta, ToolCallDelta

type Steps[T] = Generator[None, None, T]
"""A part of a grammar: waits for more text by a yield, returns what it found."""

type Sink = Callable[[str], None]
"""Takes text, piece by piece."""

SPACE = re.compile(r"\s+")


@cache
def _finder(markers: tuple[str, ...]) -> re.Pattern[str]:
    """Matches the first marker, or the beginning of one at the end of the text."""
    whole = "|".join(map(re.escape, markers)) or "(?!)"
    begun = [rf"|{re.escape(m[:n])}\Z" for m in markers for n in range(len(m) - 1, 0, -1)]
    return re.compile(f"({whole}){''.join(begun)}")


class TextParser(ABC):
    """Reads text and sorts it into content, reasoning and tool calls.

    A subclass writes its grammar as `_grammar`, with the methods below. Each of them depends on the
    text alone, never on the pieces it came in, and leaves less than a marker's length unread.

    Args:
        prompt_text: The prompt as the model saw it; its end may have begun or ended the reasoning.
        tool_schemas: The JSON schema of each tool's arguments, by name; for formats without types.

    Attributes:
        needs_special_tokens: The format is written with special tokens: the text must have them.
        in_reasoning: What comes next is reasoning.
        num_tool_calls: Calls begun.
    """

    needs_special_tokens: ClassVar[bool] = False

    @property
    def reasoning_ahead(self) -> tuple[str, tuple[str, ...]] | None:
        """Before the first text: what begins reasoning ("": it has begun), and what may end it.

        None: nothing that ends is to come.
        """
        return None

    def __init__(
        self, *, prompt_text: str = "", tool_schemas: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.in_reasoning = False
        self.num_tool_calls = 0
        self._tool_schemas = tool_schemas or {}
        self._text, self._at = "", 0  # what arrived last, and how much of it is read
        self._ended = False
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._held: list[str] | None = None  # what is read of something that may yet be content
        self._steps: Steps[None] | None = None

    def feed(self, text: str) -> ParsedDelta:
        """Read `text`, which goes on where the last piece ended."""
        return self._advance(text) if text else ParsedDelta()

    def finish(self, text: str = "") -> ParsedDelta:
        """Read the last piece, and what was held back. Nothing can be fed after this."""
        self._ended = True
        return self._advance(text)

    @abstractmethod
    def _grammar(self) -> Steps[None]:
        """Read to the end of the text."""

    def _advance(self, text: str) -> ParsedDelta:
        self._text, self._at = self._text[self._at :] + text, 0
        if self._steps is None:
            self._steps = self._grammar()
        next(self._steps, None)
        calls = []
        for _, group in groupby(self._calls, lambda piece: piece.index):
            pieces = list(group)
            calls.append(replace(pieces[0], arguments="".join(p.arguments for p in pieces)))
        delta = ParsedDelta("".join(self._content), "".join(self._reasoning), tuple(calls))
        self._content, self._reasoning, self._calls = [], [], []
        return delta

    # Giving.

    def _give_content(self, text: str) -> None:
        self._content.append(text)

    def _give_reasoning(self, text: str) -> None:
        self._reasoning.append(text)

    def _hold(self) -> None:
        """What is read from here on may turn out to be content."""
        self._held = []

    def _give_held(self) -> None:
        held, self._held = self._held or [], None
        if held:
            self._give_content("".join(held))

    # Reading.

    def _read(self, num_chars: int, sink: Sink | None = None) -> None:
        """Read the next characters, which must have arrived."""
        text = self._text[self._at : self._at + num_chars]
        self._at += num_chars
        if self._held is not None:
            self._held.append(text)
        if sink:
            sink(text)

    def _peek(self) -> Steps[str]:
        """The next character, unread; "" at the end."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def _skip(self, char: str) -> Steps[bool]:
        """Read `char`, if it is next."""
        found = (yield from self._peek()) == char
        if found:
            self._read(1)
        return found

    def _read_run(self, pattern: re.Pattern[str], sink: Sink | None = None) -> Steps[str]:
        """Read what `pattern`, a repeated class of characters, matches; returns what is next."""
        while True:
            if match := pattern.match(self._text, self._at):
                self._read(match.end() - self._at, sink)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            yield

    def _read_until(self, sink: Sink, *markers: str) -> Steps[str]:
        """Read up to the first of `markers`; returns it, unread, or "" at the end of the text."""
        finder = _finder(markers)
        while True:
            match = finder.search(self._text, self._at)
            stop = match.start() if match and not (self._ended and not match[1]) else None
            end = len(self._text) if stop is None else stop
            if end > self._at:
                self._read(end - self._at, sink)
            if match and match[1]:
                return match[1]
            if self._ended:
                return ""
            yield

    def _find(self, *markers: str) -> Steps[str]:
        """Which of `markers` is next, unread; "" if none."""
        while True:
            if found := next((m for m in markers if self._text.startswith(m, self._at)), ""):
                return found
            rest = self._text[self._at : self._at + max(map(len, markers))]
            if self._ended or not any(marker.startswith(rest) for marker in markers):
                return ""
            yield

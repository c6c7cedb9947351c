"""Llama 3.2 and 4, ToolACE: calls as Python writes them, `[f(a=1, b="x"), g()]`."""

import re

from jaxserve.frontend.parsers.literals import literal_json
from jaxserve.frontend.parsers.text_parser import SPACE, Sink, Steps
from jaxserve.frontend.parsers.tool_parser import NoCall, ToolParser

_NAME = re.compile(r"[\w.]+")
_PLAIN = re.compile(r"[^\[\](){},\"']+")
_PLAIN_IN_STRING = re.compile(r"[^\\\"'\r\n]+")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_NEWLINES = {"\n": "\\n", "\r": "\\r"}


class PythonicParser(ToolParser):
    """One list of calls at the start of the text; all arguments by keyword, all values literals.

    An argument is passed on when it is complete; a call begins with its first one, or its end. A
    raw newline in a string is read as one.
    """

    _due = True

    def _part(self) -> Steps[None]:
        if not self._due:
            yield from self._read_until(self._give_content)
            return
        self._due = False
        self._hold()
        yield from self._read_run(SPACE)
        if not (yield from self._skip("[")):
            raise NoCall
        more = True
        while more or (yield from self._peek()) != "]":
            if not more:
                raise NoCall
            yield from self._read_run(SPACE)
            yield from self._read_call()
            self._hold()
            yield from self._read_run(SPACE)
            more = yield from self._skip(",")
            if more and (yield from self._read_run(SPACE)) == "]":
                more = False
        self._read(1)
        self._held = None

    def _read_call(self) -> Steps[None]:
        pieces: list[str] = []
        yield from self._read_run(_NAME, pieces.append)
        name = "".join(pieces)
        if not all(map(str.isidentifier, name.split("."))) or not (yield from self._skip("(")):
            raise NoCall
        begun = False
        while (yield from self._read_run(SPACE)) != ")":
            argument = yield from self._read_argument(begun)
            if not argument:
                if not begun:
                    raise NoCall
                self._give_arguments(", " + "".join(self._held or []).lstrip())
                self._held = None
                yield from self._read_until(self._give_arguments)
                return
            if not begun:
                self._begin_call(name)
            self._give_arguments((", " if begun else "{") + argument)
            begun = True
            yield from self._skip(",")
            self._hold()
        self._read(1)
        if not begun:
            self._begin_call(name)
        self._give_arguments("}" if begun else "{}")
        self._held = None

    def _read_argument(self, begun: bool) -> Steps[str]:
        """`key=value` as a member of a JSON object; "" if it is broken.

        Raises:
            NoCall: The value is no literal; with `begun`, it is given as it is instead.
        """
        key: list[str] = []
        yield from self._read_run(_NAME, key.append)
        name = "".join(key)
        yield from self._read_run(SPACE)
        if not name.isidentifier() or not (yield from self._skip("=")):
            return ""
        pieces: list[str] = []
        if not (yield from self._read_value(pieces.append)):
            return ""
        text = "".join(pieces)
        try:
            value = literal_json(text)
        except ValueError as error:
            if not begun:
                raise NoCall from error
            value = text.strip()
        return f'"{name}": {value}'

    def _read_value(self, sink: Sink) -> Steps[bool]:
        """An expression, up to the comma or parenthesis that ends it; whether one does."""
        closing: list[str] = []
        while char := (yield from self._read_run(_PLAIN, sink)):
            if char in "\"'":
                if not (yield from self._read_string(char, sink)):
                    return False
                continue
            if not closing and char in ",)":
                return True
            if char in _CLOSING:
                closing.append(_CLOSING[char])
            elif char != "," and char != (closing.pop() if closing else ""):
                return False
            self._read(1, sink)
        return False

    def _read_string(self, quote: str, sink: Sink) -> Steps[bool]:
        """A string, at its first quote; whether it came to its end."""
        self._read(1, sink)
        if (yield from self._skip(quote)):
            sink(quote)
            if not (yield from self._skip(quote)):
                return True
            sink(quote)
            return (yield from self._read_long_string(quote * 3, sink))
        while char := (yield from self._read_run(_PLAIN_IN_STRING, sink)):
            if char in _NEWLINES:
                self._read(1)
                sink(_NEWLINES[char])
                continue
            self._read(1, sink)
            if char == quote:
                return True
            if char == "\\" and (yield from self._peek()):
                self._read(1, sink)
        return False

    def _read_long_string(self, quotes: str, sink: Sink) -> Steps[bool]:
        while marker := (yield from self._read_until(sink, quotes, "\\")):
            self._read(len(marker), sink)
            if marker == quotes:
                return True
            if (yield from self._peek()):
                self._read(1, sink)
        return False

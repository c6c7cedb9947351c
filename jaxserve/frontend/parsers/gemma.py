"""Gemma 4 and FunctionGemma: `call:name{key:value}`, keys bare, strings between markers."""

import re
from typing import ClassVar

from jaxserve.frontend.parsers.literals import escaped, parameter_types, typed_json
from jaxserve.frontend.parsers.text_parser import SPACE, Steps
from jaxserve.frontend.parsers.tool_parser import NoCall, ToolParser

_CALL = "call:"
_NAME = re.compile(r"[\w.-]+")
_BETWEEN = re.compile(r"[\s,]+")
_KEY = re.compile(r"[^\s:,{}\[\]<]+")
_BARE = re.compile(r"[^,{}\[\]<]+")
_CLOSING = {"{": "}", "[": "]"}
_BARE_TYPES = ["integer", "number", "boolean"]  # else a string


class GemmaParser(ToolParser):
    """Gemma 4: `<|tool_call>call:name{key:<|"|>text<|"|>,other:[1,true]}<tool_call|>`.

    A string is passed on as it arrives, any other value when it is complete. Arguments that break
    off, or whose brackets do not match, are given as they are.

    Attributes:
        start, end: Around a call.
        quote: Before and after a string.
        typed: A string that is an argument is read by the type that the tool's schema has for it.
    """

    needs_special_tokens = True
    start: ClassVar[str] = "<|tool_call>"
    end: ClassVar[str] = "<tool_call|>"
    quote: ClassVar[str] = '<|"|>'
    typed: ClassVar[bool] = False

    _open = False  # an end marker is due

    def _part(self) -> Steps[None]:
        markers = (self.start, self.end) if self._open else (self.start,)
        marker = yield from self._read_until(self._give_content, *markers)
        self._open = False
        if marker == self.end:
            self._read_end(self.end)
        elif marker:
            self._hold()
            self._read(len(self.start))
            yield from self._read_run(SPACE)
            if not (yield from self._find(_CALL)):
                raise NoCall
            self._read(len(_CALL))
            name: list[str] = []
            yield from self._read_run(_NAME, name.append)
            if not name or not (yield from self._skip("{")):
                raise NoCall
            self._begin_call("".join(name))
            self._open = True
            if not (yield from self._read_arguments("".join(name))):
                yield from self._read_until(self._give_arguments, self.end)

    def _read_arguments(self, tool: str) -> Steps[bool]:
        """Behind the first brace; whether they came to their end. A loop, for any depth."""
        self._give_arguments("{")
        closing, begun = ["}"], False
        while closing:
            char = yield from self._read_run(_BETWEEN)
            if char == closing[-1]:
                self._read(1, self._give_arguments)
                closing.pop()
                begun = True
                continue
            marked = char == "<"
            if not char or char in "}]" or (marked and (yield from self._find(self.end))):
                return False
            self._give_arguments(", " if begun else "")
            begun, key = True, ""
            if closing[-1] == "}":
                key = yield from self._read_key()
                if not (yield from self._skip(":")):
                    self._give_arguments(f'"{escaped(key)}')
                    return False
                self._give_arguments(f'"{escaped(key)}": ')
                char = yield from self._read_run(SPACE)
            if char in _CLOSING:
                self._read(1, self._give_arguments)
                closing.append(_CLOSING[char])
                begun = False
            elif char == "<" and (yield from self._find(self.quote)):
                types = ["string"]
                if self.typed and len(closing) == 1:
                    types = parameter_types(self._tool_schemas.get(tool, {}), key)
                if not (yield from self._read_string(types)):
                    return False
            elif not (yield from self._read_bare()):
                return False
        return True

    def _read_key(self) -> Steps[str]:
        pieces: list[str] = []
        if (yield from self._find(self.quote)):
            self._read(len(self.quote))
            marker = yield from self._read_until(pieces.append, self.quote)
            self._read(len(marker))
        else:
            yield from self._read_run(_KEY, pieces.append)
        yield from self._read_run(SPACE)
        return "".join(pieces)

    def _read_string(self, types: list[str]) -> Steps[bool]:
        """A string, at its quote; whether it came to its end."""
        self._read(len(self.quote))
        if types == ["string"]:
            self._give_arguments('"')
            marker = yield from self._read_until(
                lambda text: self._give_arguments(escaped(text)), self.quote
            )
            self._give_arguments('"' if marker else "")
        else:
            pieces: list[str] = []
            marker = yield from self._read_until(pieces.append, self.quote)
            text = "".join(pieces)
            self._give_arguments(typed_json(text, types) if marker else text)
        self._read(len(marker))
        return bool(marker)

    def _read_bare(self) -> Steps[bool]:
        """A number, a word; whether it came to its end."""
        pieces: list[str] = []
        while (yield from self._read_run(_BARE, pieces.append)) == "<":
            if (yield from self._find(self.end)):
                break
            self._read(1, pieces.append)
        text = "".join(pieces).strip()
        ended = bool((yield from self._peek()))
        self._give_arguments(typed_json(text, _BARE_TYPES) if ended and text else text)
        return ended and bool(text)


class FunctionGemmaParser(GemmaParser):
    """`<start_function_call>call:name{key:<escape>text<escape>}<end_function_call>`."""

    start = "<start_function_call>"
    end = "<end_function_call>"
    quote = "<escape>"
    typed = True

"""Tool calls written as JSON objects: `{"name": ..., "arguments": {...}}`."""

import json
import re
from typing import ClassVar

from jaxserve.frontend.parsers.text_parser import SPACE, Sink, Steps
from jaxserve.frontend.parsers.tool_parser import NoCall, ToolParser

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # in a string, nothing that needs a look
_SCALARS = re.compile(r"[\w\s.,:+-]+")  # in an object or array, outside strings and brackets
_SCALAR = re.compile(r"[\w.+-]+")
_ESCAPES = ["", *'"\\/bfnrtu']
_CLOSING = {"{": "}", "[": "]"}
_ARGUMENTS = ("arguments", "parameters")
_KNOWN_KEYS = {"name", "type", "id", *_ARGUMENTS}


class JsonCallParser(ToolParser):
    """Reads calls that are JSON objects, and arguments that are JSON values.

    Values are followed by their brackets and strings, not checked: what is in between is passed on.
    On the way, a raw control character in a string, such as the newlines of a program, is escaped,
    and so is a backslash that begins no escape.

    Attributes:
        marked: Calls stand behind a marker. Those that do not are only taken for calls if they have
            arguments and no unknown key before them, as a JSON answer might be meant.
        call_end: Ends the arguments whose JSON is broken; "": nothing does.
    """

    marked: ClassVar[bool] = True
    call_end: ClassVar[str] = ""

    def _read_call(self) -> Steps[None]:
        """A call's object, at its brace.

        Raises:
            NoCall: It is none, or what follows its arguments is broken.
        """
        name, begun = "", False
        early: list[str] = []  # arguments that came before the name
        if not (yield from self._skip("{")):
            raise NoCall
        while (yield from self._read_run(SPACE)) == '"':
            key = yield from self._read_string_value()
            yield from self._read_run(SPACE)
            if not (yield from self._skip(":")) or not (self.marked or begun or key in _KNOWN_KEYS):
                raise NoCall
            first = yield from self._read_run(SPACE)
            if key == "name" and not name:
                name = yield from self._read_string_value()
            elif key in _ARGUMENTS and not (early or begun) and first:
                if name:
                    self._begin_call(name)
                    begun = True
                    yield from self._read_arguments()
                    self._hold()
                else:
                    yield from self._read_value(early.append)
            else:
                yield from self._read_value(None)
            if name and early and not begun:
                self._begin_call(name)
                begun = True
                self._give_arguments("".join(early))
                self._hold()
            yield from self._read_run(SPACE)
            if not (yield from self._skip(",")):
                break
        if not (yield from self._skip("}")):
            raise NoCall
        if not begun:
            if not (name and self.marked):
                raise NoCall
            self._begin_call(name)
            self._give_arguments("{}")
        self._held = None

    def _read_calls(self) -> Steps[None]:
        """An array of calls, at its bracket.

        Raises:
            NoCall: The rest of it is none.
        """
        if not (yield from self._skip("[")):
            raise NoCall
        while True:
            yield from self._read_run(SPACE)
            yield from self._read_call()
            yield from self._read_run(SPACE)
            self._hold()
            if not (yield from self._skip(",")):
                break
        if not (yield from self._skip("]")):
            raise NoCall
        self._held = None

    def _read_arguments(self) -> Steps[None]:
        """Arguments of the call that has begun; all up to `call_end` if their JSON is broken."""
        if not (yield from self._read_value(self._give_arguments)):
            markers = [self.call_end] if self.call_end else []
            yield from self._read_until(self._give_arguments, *markers)

    def _read_value(self, sink: Sink | None) -> Steps[bool]:
        """A JSON value; whether it came to its end, and is one as far as brackets tell."""
        char = yield from self._peek()
        if char == '"':
            return (yield from self._read_string(sink))
        if char not in _CLOSING:
            yield from self._read_run(_SCALAR, sink)
            return _SCALAR.match(char) is not None
        closing: list[str] = []
        while True:
            if char == '"':
                if not (yield from self._read_string(sink)):
                    return False
            elif char in _CLOSING or (closing and char == closing[-1]):
                self._read(1, sink)
                if char in _CLOSING:
                    closing.append(_CLOSING[char])
                else:
                    closing.pop()
                if not closing:
                    return True
            else:
                return False
            char = yield from self._read_run(_SCALARS, sink)

    def _read_string_value(self) -> Steps[str]:
        """A JSON string, decoded.

        Raises:
            NoCall: It is none.
        """
        pieces: list[str] = []
        if (yield from self._peek()) == '"' and (yield from self._read_string(pieces.append)):
            try:
                value = json.loads("".join(pieces))
                value.encode()  # half a surrogate pair could not be sent
                return value
            except ValueError:
                pass
        raise NoCall

    def _read_string(self, sink: Sink | None) -> Steps[bool]:
        """A JSON string, at its quote; whether it came to its end."""
        self._read(1, sink)
        while char := (yield from self._read_run(_PLAIN, sink)):
            if char == '"':
                self._read(1, sink)
                return True
            if char == "\\":
                self._read(1, sink)
                if (escaped := (yield from self._peek())) in _ESCAPES:
                    self._read(len(escaped), sink)
                elif sink:
                    sink("\\")
            else:
                self._read(1)
                if sink:
                    sink(json.dumps(char)[1:-1])
        return False

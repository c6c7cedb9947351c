"""Calls in tags: one around each call, one around each argument, whose value is plain text."""

import re
from abc import abstractmethod
from typing import ClassVar

from jaxserve.frontend.parsers.literals import escaped, typed_json
from jaxserve.frontend.parsers.text_parser import SPACE, Sink, Steps
from jaxserve.frontend.parsers.tool_parser import NoCall, ToolParser

_HEADER = re.compile(r"[^<>\n]+")


class TagCallParser(ToolParser):
    """`start call NAME> parameter KEY> VALUE parameter_end ... call_end end`.

    `start` and `end` may lack. A value known to be a string is passed on as it arrives, any other
    when it is complete.

    Attributes:
        start, end: Around one call, or all of them.
        call, parameter: Begin tags, up to where the name is.
        call_end, parameter_end: Where the tag that must follow one does not, it is part of the
            value.
        newlines: The first and the last newline of a value belong to the format.
    """

    start: ClassVar[str]
    end: ClassVar[str]
    call: ClassVar[str]
    call_end: ClassVar[str]
    parameter: ClassVar[str]
    parameter_end: ClassVar[str]
    newlines: ClassVar[bool] = False

    _open = False  # an end marker is due

    @abstractmethod
    def _name(self, header: str) -> str:
        """The function's name in what stands between `call` and `>`; "": there is none."""

    @abstractmethod
    def _key(self, tool: str, header: str) -> tuple[str, list[str]]:
        """The argument's name in what stands between `parameter` and `>`, and its JSON types."""

    def _part(self) -> Steps[None]:
        markers = (self.start, self.call, self.end) if self._open else (self.start, self.call)
        marker = yield from self._read_until(self._give_content, *markers)
        self._open = False
        if marker == self.end:
            self._read_end(self.end)
        elif marker:
            self._hold()
            if marker == self.start:
                self._read(len(self.start))
                yield from self._read_run(SPACE)
                if not (yield from self._find(self.call)):
                    raise NoCall
            yield from self._read_call()

    def _read_call(self) -> Steps[None]:
        self._read(len(self.call))
        header: list[str] = []
        yield from self._read_run(_HEADER, header.append)
        tool = self._name("".join(header))
        if not tool or not (yield from self._skip(">")):
            raise NoCall
        self._begin_call(tool)
        self._open = True
        self._give_arguments("{")
        before = ""
        while True:
            markers = (self.parameter, self.call_end, self.end)
            marker = yield from self._read_until(self._give_content, *markers)
            if marker == self.parameter:
                self._read(len(self.parameter))
                self._give_arguments(before)
                marker = yield from self._read_parameter(tool)
            elif marker == self.call_end:
                self._read(len(self.call_end))
            if marker != self.parameter_end:
                break
            before = ", "
        if marker:
            self._give_arguments("}")

    def _read_parameter(self, tool: str) -> Steps[str]:
        """One argument, behind its `parameter`; returns the tag that ended it, if one did."""
        pieces: list[str] = []
        yield from self._read_run(_HEADER, pieces.append)
        name, types = self._key(tool, "".join(pieces))
        if not (yield from self._skip(">")):
            self._give_arguments(f'"{escaped(name)}')
            yield from self._read_until(self._give_arguments, self.end)
            return ""
        self._give_arguments(f'"{escaped(name)}": ')
        if types == ["string"]:
            self._give_arguments('"')
            marker = yield from self._read_text(lambda text: self._give_arguments(escaped(text)))
            self._give_arguments('"' if marker else "")
        else:
            pieces = []
            marker = yield from self._read_text(pieces.append)
            text = "".join(pieces)
            self._give_arguments(typed_json(text, types) if marker else text)
        return marker

    def _read_text(self, sink: Sink) -> Steps[str]:
        """The text of a value; returns the tag that ended it, if one did."""
        if self.newlines:
            yield from self._skip("\n")
        after = {
            self.parameter_end: (self.parameter, self.call_end, self.end),
            self.call_end: (self.call, self.end),
        }
        withheld = ""  # the last newline

        def give(text: str) -> None:
            nonlocal withheld
            text = withheld + text
            withheld = "\n" if self.newlines and text.endswith("\n") else ""
            if text := text.removesuffix(withheld):
                sink(text)

        while marker := (yield from self._read_until(give, *after)):
            self._read(len(marker))
            space: list[str] = []
            ended = not (yield from self._read_run(SPACE, space.append))
            if ended or (yield from self._find(*after[marker])):
                return marker
            give(marker + "".join(space))
        sink(withheld)
        return ""

"""Qwen3-Coder, Qwen3.5: calls in tags, each parameter a tag, its value plain text."""

import json
import re

from jaxserve.frontend.parsers.literals import parameter_types, typed_json
from jaxserve.frontend.parsers.text_parser import SPACE, Sink, Steps
from jaxserve.frontend.parsers.tool_parser import NoCall, ToolParser

_START, _END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
# What must follow an end tag; where it does not, the tag is part of the value.
_AFTER = {_PARAMETER_END: (_PARAMETER, _FUNCTION_END, _END), _FUNCTION_END: (_END,)}
_NAME = re.compile(r"[^<>\n]+")


class QwenXmlParser(ToolParser):
    """`<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>`.

    The tool's schema gives the types. A string is passed on as it arrives, any other value when it
    is complete. The first and the last newline of a value belong to the format.
    """

    _open = False  # an end marker is due

    def _part(self) -> Steps[None]:
        markers = (_START, _FUNCTION, _END) if self._open else (_START, _FUNCTION)
        marker = yield from self._read_until(self._give_content, *markers)
        self._open = False
        if marker == _END:
            self._read_end(_END)
        elif marker:
            self._hold()
            if marker == _START:
                self._read(len(_START))
                yield from self._read_run(SPACE)
                if not (yield from self._find(_FUNCTION)):
                    raise NoCall
            yield from self._read_call()

    def _read_call(self) -> Steps[None]:
        self._read(len(_FUNCTION))
        name: list[str] = []
        yield from self._read_run(_NAME, name.append)
        if not name or not (yield from self._skip(">")):
            raise NoCall
        tool = "".join(name).strip()
        self._begin_call(tool)
        self._open = True
        self._give_arguments("{")
        before = ""
        while True:
            markers = (_PARAMETER, _FUNCTION_END, _END)
            marker = yield from self._read_until(self._give_content, *markers)
            if marker == _PARAMETER:
                self._read(len(_PARAMETER))
                self._give_arguments(before)
                marker = yield from self._read_parameter(tool)
            elif marker == _FUNCTION_END:
                self._read(len(_FUNCTION_END))
            if marker != _PARAMETER_END:
                break
            before = ", "
        if marker:
            self._give_arguments("}")

    def _read_parameter(self, tool: str) -> Steps[str]:
        """One parameter, behind its `<parameter=`; returns the tag that ended it, if one did."""
        pieces: list[str] = []
        yield from self._read_run(_NAME, pieces.append)
        name = "".join(pieces).strip()
        if not (yield from self._skip(">")):
            self._give_arguments(f'"{_escape(name)}')
            yield from self._read_until(self._give_arguments, _END)
            return ""
        self._give_arguments(f'"{_escape(name)}": ')
        types = parameter_types(self._tool_schemas.get(tool, {}), name)
        if types == ["string"]:
            self._give_arguments('"')
            marker = yield from self._read_text(lambda text: self._give_arguments(_escape(text)))
            self._give_arguments('"' if marker else "")
        else:
            pieces = []
            marker = yield from self._read_text(pieces.append)
            text = "".join(pieces)
            self._give_arguments(typed_json(text, types) if marker else text)
        return marker

    def _read_text(self, sink: Sink) -> Steps[str]:
        """The text of a value; returns the tag that ended it, if one did."""
        yield from self._skip("\n")
        withheld = ""  # the last newline

        def give(text: str) -> None:
            nonlocal withheld
            text = withheld + text
            withheld = "\n" if text.endswith("\n") else ""
            if text := text.removesuffix("\n"):
                sink(text)

        while marker := (yield from self._read_until(give, *_AFTER)):
            self._read(len(marker))
            space: list[str] = []
            ended = not (yield from self._read_run(SPACE, space.append))
            if ended or (yield from self._find(*_AFTER[marker])):
                return marker
            give(marker + "".join(space))
        sink(withheld)
        return ""


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]

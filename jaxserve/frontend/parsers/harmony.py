"""gpt-oss: messages on channels, OpenAI's harmony format."""

import re
from typing import ClassVar

from jaxserve.frontend.parsers.text_parser import Steps
from jaxserve.frontend.parsers.tool_parser import NoCall, ToolParser

_START, _CHANNEL, _CONSTRAIN = "<|start|>", "<|channel|>", "<|constrain|>"
_MESSAGE = "<|message|>"
_END, _CALL, _RETURN = "<|end|>", "<|call|>", "<|return|>"
_HEADER = re.compile(r"[\w .=:/-]+")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."
_FINAL = tuple(
    f"{_CHANNEL}final{kind}{_MESSAGE}"
    for kind in ("", f" {_CONSTRAIN}json", f" {_CONSTRAIN}JSON", " json")
)


class HarmonyParser(ToolParser):
    """`<|channel|>NAME<|message|>TEXT<|end|>`, the next one behind `<|start|>assistant`.

    The channel analysis is reasoning, commentary and final are content; a message to a function,
    `to=functions.NAME`, is a call, its text the arguments. A message to anyone else is content,
    with its header.
    """

    needs_special_tokens = True
    finds_calls: ClassVar[bool] = True

    @property
    def reasoning_ahead(self) -> tuple[str, tuple[str, ...]] | None:
        return "", _FINAL

    def _part(self) -> Steps[None]:
        if not (yield from self._read_until(self._give_content, _CHANNEL, _START)):
            return
        self._hold()
        header = yield from self._read_header()
        channel, recipient = _CHANNEL_NAME.search(header), _RECIPIENT.search(header)
        ends = (_END, _CALL, _RETURN, _START)
        function = recipient[1].removeprefix(_FUNCTIONS) if recipient else ""
        if recipient and self.finds_calls and function != recipient[1] and function:
            self._begin_call(function)
            begun = yield from self._find(*ends)
            self._give_arguments("{}" if begun else "")
            marker = yield from self._read_until(self._give_arguments, *ends)
        elif recipient:
            self._give_held()
            marker = yield from self._read_until(self._give_content, *ends)
            if marker != _START:
                self._give_content(marker)
        elif channel and channel[1] == "analysis":
            self._held = None
            self.in_reasoning = True
            marker = yield from self._read_until(self._give_reasoning, *ends)
            self.in_reasoning = False
        else:
            self._held = None
            marker = yield from self._read_until(self._give_content, *ends)
        if marker != _START:
            self._read(len(marker))

    def _read_header(self) -> Steps[str]:
        """A message up to where its text begins.

        Raises:
            NoCall: It is none.
        """
        pieces: list[str] = []
        while True:
            marker = yield from self._find(_START, _CHANNEL, _CONSTRAIN, _MESSAGE)
            if not marker:
                raise NoCall
            self._read(len(marker), pieces.append)
            if marker == _MESSAGE:
                return "".join(pieces)
            yield from self._read_run(_HEADER, pieces.append)


class HarmonyReasoningParser(HarmonyParser):
    """Leaves calls in the content, as they are, for a `HarmonyParser` to find."""

    finds_calls = False

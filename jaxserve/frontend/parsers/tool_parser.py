"""`ToolParser`: what every format of tool calls shares."""

import uuid
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxserve.frontend.parsers.text_parser import Steps, TextParser
from jaxserve.frontend.parsers.types import ToolCallDelta


class NoCall(Exception):
    """What began like a call is none: the text held back is content."""


class ToolParser(TextParser):
    """Finds tool calls in text.

    A subclass writes `_part`, which reads on until at least one call or the end of the text.
    """

    def __init__(
        self, *, prompt_text: str = "", tool_schemas: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        super().__init__(prompt_text=prompt_text, tool_schemas=tool_schemas)
        self._blank: list[str] | None = []  # white space since the start or a call; None: text came

    @abstractmethod
    def _part(self) -> Steps[None]:
        """Read some content, calls, or both.

        Raises:
            NoCall: What is held is content.
        """

    def _grammar(self) -> Steps[None]:
        while (yield from self._peek()):
            try:
                yield from self._part()
            except NoCall:
                self._give_held()
        self._give_held()
        if self._blank and not self.num_tool_calls:
            self._content.extend(self._blank)

    def _new_id(self) -> str:
        return f"chatcmpl-tool-{uuid.uuid4().hex}"

    def _give_content(self, text: str) -> None:
        if self._blank is None:
            super()._give_content(text)
        else:
            self._blank.append(text)
            if not text.isspace():
                self._content.extend(self._blank)
                self._blank = None

    def _read_end(self, marker: str) -> None:
        """Read the marker that ends a call; white space before it belongs to the format."""
        if self._blank:
            self._blank = []
        self._read(len(marker))

    def _begin_call(self, name: str, call_id: str | None = None) -> None:
        self._held = None
        self._blank = []
        self._calls.append(ToolCallDelta(self.num_tool_calls, call_id or self._new_id(), name, ""))
        self.num_tool_calls += 1

    def _give_arguments(self, text: str) -> None:
        """More argument text of the call that began last."""
        if text:
            self._calls.append(ToolCallDelta(self.num_tool_calls - 1, None, None, text))

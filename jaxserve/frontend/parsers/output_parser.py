"""`OutputParser`: the text of one choice, sorted into reasoning, content and tool calls."""

from collections.abc import Mapping
from typing import Any

from jaxserve.frontend.parsers.registry import reasoning_parser, tool_parser
from jaxserve.frontend.parsers.text_parser import TextParser
from jaxserve.frontend.parsers.tool_parser import ToolParser
from jaxserve.frontend.parsers.types import ParsedDelta


class OutputParser:
    """A reasoning parser, and a tool parser that reads the content the first one leaves.

    Give it the detokenizer's text deltas in order, then call `finish` once. The deltas put together
    depend on the whole text alone.

    Args:
        reasoning: Name of the reasoning parser; None: the model does not reason.
        tools: Name of the tool parser, or for tool_choice "required" and named a `JsonListParser`
            or `NamedToolParser`; None: no calls are looked for.
        tool_schemas: The JSON schema of each tool's arguments, by name.
        prompt_text: The prompt as the model saw it: its end may have begun the reasoning, or ended
            it.
        parallel_tool_calls: Whether calls after the first are kept.

    Attributes:
        num_reasoning_chars: Reasoning given so far.

    Raises:
        ConfigError: There is no parser of that name.
    """

    def __init__(
        self,
        *,
        reasoning: str | None,
        tools: str | ToolParser | None,
        tool_schemas: Mapping[str, Mapping[str, Any]] | None = None,
        prompt_text: str = "",
        parallel_tool_calls: bool = True,
    ) -> None:
        self._stages: list[TextParser] = []
        if reasoning is not None:
            self._stages.append(reasoning_parser(reasoning)(prompt_text=prompt_text))
        if isinstance(tools, str):
            tools = tool_parser(tools)(tool_schemas=tool_schemas)
        if tools is not None:
            self._stages.append(tools)
        self._max_calls = None if parallel_tool_calls else 1
        self.num_reasoning_chars = 0

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the request must set skip_special_tokens=False."""
        return any(stage.needs_special_tokens for stage in self._stages)

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as the text so far tells."""
        return any(stage.in_reasoning for stage in self._stages)

    @property
    def reasoning_ahead(self) -> tuple[str, tuple[str, ...]] | None:
        """See `TextParser.reasoning_ahead`."""
        found = (stage.reasoning_ahead for stage in self._stages)
        return next((ahead for ahead in found if ahead is not None), None)

    @property
    def num_tool_calls(self) -> int:
        """Calls given so far, complete or not."""
        found = sum(stage.num_tool_calls for stage in self._stages)
        return found if self._max_calls is None else min(found, self._max_calls)

    def feed(self, text: str) -> ParsedDelta:
        """What new text brought."""
        return self._pass(text, ended=False)

    def finish(self) -> ParsedDelta:
        """What was held back, at the end of the text."""
        return self._pass("", ended=True)

    def _pass(self, content: str, *, ended: bool) -> ParsedDelta:
        reasoning, calls = "", ()
        for stage in self._stages:
            delta = stage.finish(content) if ended else stage.feed(content)
            content = delta.content
            reasoning += delta.reasoning
            calls += delta.tool_calls
        self.num_reasoning_chars += len(reasoning)
        if self._max_calls is not None:
            calls = tuple(call for call in calls if call.index < self._max_calls)
        return ParsedDelta(content, reasoning, calls)

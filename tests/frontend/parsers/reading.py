"""What the tests of the parsers share: a text, read in pieces, and what came of it together."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxserve.frontend.parsers.output_parser import OutputParser
from jaxserve.frontend.parsers.tool_parser import ToolParser
from jaxserve.frontend.parsers.types import ParsedDelta


@dataclass
class Parsed:
    """All deltas of one choice, put together as a client does it.

    Attributes:
        calls: Name and argument text of each call.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def add(self, delta: ParsedDelta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning
        for call in delta.tool_calls:
            if call.index == len(self.calls):
                assert call.id
                assert call.name
                self.calls.append((call.name, ""))
                self.ids.append(call.id)
            else:
                assert call.index == len(self.calls) - 1
                assert call.id is None
                assert call.name is None
                assert call.arguments
            name, arguments = self.calls[call.index]
            self.calls[call.index] = name, arguments + call.arguments

    @property
    def values(self) -> list[tuple[str, Any]]:
        """The calls with their arguments read; raises if they are no JSON."""
        return [(name, json.loads(arguments)) for name, arguments in self.calls]

    def same_as(self, other: "Parsed") -> bool:
        mine = self.content, self.reasoning, self.calls
        return mine == (other.content, other.reasoning, other.calls)


def read(parser: OutputParser, pieces: Iterable[str]) -> Parsed:
    """What `parser` makes of the pieces of one text."""
    parsed = Parsed()
    for piece in pieces:
        parsed.add(parser.feed(piece))
    parsed.add(parser.finish())
    assert parser.num_tool_calls == len(parsed.calls)
    assert parser.num_reasoning_chars == len(parsed.reasoning)
    return parsed


def parse(
    text: str,
    tools: str | Callable[[], ToolParser] | None = None,
    *,
    reasoning: str | None = None,
    **options: Any,
) -> Parsed:
    """Read a text whole, and character by character; both must give the same."""

    def parser() -> OutputParser:
        return OutputParser(
            reasoning=reasoning, tools=tools() if callable(tools) else tools, **options
        )

    whole, single = read(parser(), [text]), read(parser(), text)
    assert whole.same_as(single), (whole, single)
    return whole

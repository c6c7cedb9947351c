"""What parsers give: `ParsedDelta`, with the `ToolCallDelta`s in it."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of one tool call.

    Attributes:
        index: Of the call in its choice, from 0.
        id: In the first piece of a call only.
        name: Whole, in the first piece of a call only.
        arguments: The next piece of the arguments' JSON text.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


class ParsedDelta(NamedTuple):
    """What new text brought; any part may be empty."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

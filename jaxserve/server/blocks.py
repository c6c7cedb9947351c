"""An answer as a row of blocks: reasoning, text, calls, each begun, grown and ended in its turn.

The Responses and the Messages API both show an answer in this way, whole and streamed.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxserve.async_llm import OutputStream
from jaxserve.frontend.parsers.types import ParsedDelta, ToolCallDelta
from jaxserve.server.chat_job import ChatJob, Piece
from jaxserve.server.errors import APIError

type Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    """One of them, as it grows.

    Attributes:
        index: Its place in the answer.
        text: Of reasoning and text; of a call, the JSON of its arguments.
        call_id, name: Of a call.
    """

    kind: Kind
    index: int
    text: str = ""
    call_id: str = ""
    name: str = ""


class Change(NamedTuple):
    """What happens to a block; `text` is what it grows by."""

    what: Literal["begin", "grow", "end"]
    block: Block
    text: str = ""


class Blocks:
    """The only choice of a job, sorted into blocks. Whole, reasoning comes first and calls last; a
    stream has them in the order they come.

    White space next to a call is dropped: it sets calls apart and says nothing.

    Attributes:
        all: The blocks so far.
        finish_reason: "stop", "length" or "tool_calls", at the end.
        stop_reason: The stop string or token that ended it.
    """

    def __init__(self) -> None:
        self.all: list[Block] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._open: Block | None = None
        self._call = -1  # the open call's index among calls
        self._space = ""  # white space that a call may follow

    @property
    def has_calls(self) -> bool:
        return self._call >= 0

    async def read(
        self, job: ChatJob, stream: OutputStream
    ) -> AsyncGenerator[tuple[list[Change], Piece]]:
        """What each piece changes, in order.

        Raises:
            APIError: 500, when something but the model ended the request.
        """
        looks_for_calls = bool(job.body.tools) and job.body.tool_choice != "none"
        async for piece in job.pieces(stream):
            changes = self._feed(piece.delta, trims=looks_for_calls)
            reason = piece.finish_reason
            if reason is not None:
                if reason not in ("stop", "length", "tool_calls"):
                    raise APIError(500, "the request was aborted; send it again", code="aborted")
                self.finish_reason, self.stop_reason = reason, piece.choice.stop_reason
                changes += self._finish()
            yield changes, piece

    def _feed(self, delta: ParsedDelta, *, trims: bool) -> list[Change]:
        changes: list[Change] = []
        if delta.reasoning:
            changes += self._grow("reasoning", delta.reasoning)
        if delta.content:
            changes += self._text(delta.content) if trims else self._grow("text", delta.content)
        for call in delta.tool_calls:
            changes += self._grow_call(call)
        return changes

    def _finish(self) -> list[Change]:
        after_call = self._open is not None and self._open.kind == "call"
        changes = [] if after_call or not self._space else self._grow("text", self._space)
        return changes + self._end()

    def _text(self, new: str) -> list[Change]:
        text = self._space + new
        body = text.rstrip()
        self._space = text[len(body) :]
        if self._open is not None and self._open.kind == "call":
            body = body.lstrip()
        return self._grow("text", body) if body else []

    def _grow(self, kind: Kind, text: str) -> list[Change]:
        block, changes = self._open, []
        if block is None or block.kind != kind:
            block, changes = self._begin(Block(kind, len(self.all)))
        block.text += text
        return [*changes, Change("grow", block, text)]

    def _grow_call(self, call: ToolCallDelta) -> list[Change]:
        block, changes = self._open, []
        self._space = ""
        if block is None or call.index != self._call:
            self._call = call.index
            block, changes = self._begin(
                Block("call", len(self.all), call_id=call.id or "", name=call.name or "")
            )
        if call.arguments:
            block.text += call.arguments
            changes.append(Change("grow", block, call.arguments))
        return changes

    def _begin(self, block: Block) -> tuple[Block, list[Change]]:
        changes = [*self._end(), Change("begin", block)]
        self.all.append(block)
        self._open = block
        return block, changes

    def _end(self) -> list[Change]:
        block, self._open = self._open, None
        return [] if block is None else [Change("end", block)]

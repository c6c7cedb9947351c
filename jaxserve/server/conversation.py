"""Builds the messages of a chat from the items or blocks of other APIs.

Those have reasoning, text and calls of one turn apart; a chat has them in one message.
"""

from collections.abc import Sequence
from typing import Any

from jaxserve.server.errors import invalid


class Conversation:
    """Messages as they grow.

    Args:
        merges_all: Messages of one role in a row become one; else only the assistant's.
    """

    def __init__(self, *, merges_all: bool) -> None:
        self.messages: list[dict[str, Any]] = []
        self._merges_all = merges_all
        self._call_ids: set[str] = set()

    def say(self, role: str, texts: Sequence[str]) -> None:
        """A message, or more of the last one."""
        self._message(role)["texts"] += texts

    def think(self, text: str) -> None:
        """Reasoning of the assistant."""
        message = self._message("assistant")
        message["reasoning"] = message.get("reasoning", "") + text

    def call(self, call_id: str, name: str, arguments: str | dict[str, Any]) -> None:
        """A call that the assistant made; `arguments` are JSON or an object."""
        self._call_ids.add(call_id)
        function = {"name": name, "arguments": arguments}
        self._message("assistant").setdefault("tool_calls", []).append(
            {"id": call_id, "type": "function", "function": function}
        )

    def answer(self, call_id: str, texts: Sequence[str], where: str) -> None:
        """What a call gave.

        Args:
            where: The field that holds `call_id`.

        Raises:
            APIError: There was no such call.
        """
        if call_id not in self._call_ids:
            raise invalid(f"{where}={call_id!r:.60} answers no call that came before it", where)
        self.messages.append({"role": "tool", "tool_call_id": call_id, "texts": list(texts)})

    def finished(self) -> list[dict[str, Any]]:
        """The messages as chat completions take them."""
        return [
            {"role": message.pop("role"), "content": _content(message.pop("texts")), **message}
            for message in (dict(message) for message in self.messages)
        ]

    def _message(self, role: str) -> dict[str, Any]:
        last = self.messages[-1] if self.messages else None
        merges = self._merges_all or role == "assistant"
        if last is None or last["role"] != role or not merges:
            last = {"role": role, "texts": []}
            self.messages.append(last)
        return last


def _content(texts: list[str]) -> str | list[dict[str, str]]:
    if len(texts) < 2:
        return texts[0] if texts else ""
    return [{"type": "text", "text": text} for text in texts]

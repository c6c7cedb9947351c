"""Hermes 2 Pro, Qwen2.5, Qwen3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from jaxserve.frontend.parsers.json_calls import JsonCallParser
from jaxserve.frontend.parsers.text_parser import SPACE, Steps

_START, _END = "<tool_call>", "</tool_call>"


class HermesParser(JsonCallParser):
    """One object behind each marker; a call that lacks the end marker is a call."""

    needs_special_tokens = True  # some models have the markers as special tokens
    call_end = _END

    _open = False  # an end marker is due

    def _part(self) -> Steps[None]:
        markers = (_START, _END) if self._open else (_START,)
        marker = yield from self._read_until(self._give_content, *markers)
        self._open = False
        if marker == _START:
            self._hold()
            self._read(len(_START))
            yield from self._read_run(SPACE)
            yield from self._read_call()
        elif marker == _END:
            self._read_end(_END)

    def _begin_call(self, name: str, call_id: str | None = None) -> None:
        super()._begin_call(name, call_id)
        self._open = True

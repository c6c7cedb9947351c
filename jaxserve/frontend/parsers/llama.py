"""Llama 3.1 to 4: `{"name": ..., "parameters": {...}}`, bare, several separated by `;`."""

from jaxserve.frontend.parsers.json_calls import JsonCallParser
from jaxserve.frontend.parsers.text_parser import SPACE, Steps

_TAG = "<|python_tag|>"


class LlamaJsonParser(JsonCallParser):
    """Calls stand at the start of the text, after `<|python_tag|>`, and after another call.

    An object anywhere else is content, as in vLLM's streams.
    """

    needs_special_tokens = True  # the tag
    marked = False

    _due = True  # a call may stand here

    def _part(self) -> Steps[None]:
        if not self._due:
            if (yield from self._read_until(self._give_content, _TAG)):
                self._hold()
                self._read(len(_TAG))
                self._due = True
        else:
            self._due = False
            if self._held is None:
                self._hold()
            char = yield from self._read_run(SPACE)
            if char == ";" and self.num_tool_calls:
                self._read(1)
                yield from self._read_run(SPACE)
            elif char == "<" and (yield from self._find(_TAG)):
                self._read(len(_TAG))
                yield from self._read_run(SPACE)
            yield from self._read_call()
            self._due = True

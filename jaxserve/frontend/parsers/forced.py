"""What the model writes when tool_choice leaves it no choice: JSON, by a grammar."""

from jaxserve.frontend.parsers.json_calls import JsonCallParser
from jaxserve.frontend.parsers.text_parser import SPACE, Steps
from jaxserve.frontend.parsers.tool_parser import ToolParser


class JsonListParser(JsonCallParser):
    """tool_choice "required": `[{"name": ..., "parameters": {...}}, ...]` and nothing else."""

    _due = True

    def _part(self) -> Steps[None]:
        if self._due:
            self._due = False
            self._hold()
            yield from self._read_run(SPACE)
            yield from self._read_calls()
        else:
            yield from self._read_until(self._give_content)


class NamedToolParser(ToolParser):
    """tool_choice names a tool: all text is its arguments."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _part(self) -> Steps[None]:
        yield from self._read_run(SPACE)
        if (yield from self._peek()):
            self._begin_call(self._name)
            yield from self._read_until(self._give_arguments)

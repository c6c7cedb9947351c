"""DeepSeek V3, R1 and V3.1: calls between special tokens."""

import re

from jaxserve.frontend.parsers.json_calls import JsonCallParser
from jaxserve.frontend.parsers.text_parser import SPACE, Steps
from jaxserve.frontend.parsers.tool_parser import NoCall

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_FENCE, _FENCE_END = "```json", "```"
_WORD = re.compile(r"[^\s<`{]+")


class DeepSeekParser(JsonCallParser):
    """Between call begin and call end, one of two forms, told apart by what follows the separator.

    V3 and R1: `function`, separator, name, newline, the arguments in a fenced block.
    V3.1: name, separator, arguments.
    """

    needs_special_tokens = True
    call_end = _CALL_END

    _open = False  # end markers are due

    def _part(self) -> Steps[None]:
        ends = (_CALL_END, _CALLS_END) if self._open else ()
        marker = yield from self._read_until(self._give_content, _CALLS, _CALL, *ends)
        if marker in (_CALL_END, _CALLS_END):
            self._read_end(marker)
            self._open = marker == _CALL_END
        elif marker:
            self._open = False
            self._hold()
            self._read(len(marker))
            if marker == _CALLS:
                yield from self._read_run(SPACE)
                if not (yield from self._find(_CALL)):
                    raise NoCall
                self._read(len(_CALL))
            yield from self._read_marked_call()

    def _read_marked_call(self) -> Steps[None]:
        name = yield from self._read_word()
        if not (yield from self._find(_SEPARATOR)):
            raise NoCall
        self._read(len(_SEPARATOR))
        if (yield from self._read_run(SPACE)) != "{":
            name = yield from self._read_word()
            if not (yield from self._find(_FENCE)):
                raise NoCall
            self._read(len(_FENCE))
        if not name or (yield from self._read_run(SPACE)) != "{":
            raise NoCall
        self._begin_call(name)
        self._open = True
        yield from self._read_arguments()
        yield from self._read_run(SPACE)
        if (yield from self._find(_FENCE_END)):
            self._read(len(_FENCE_END))

    def _read_word(self) -> Steps[str]:
        pieces: list[str] = []
        yield from self._read_run(_WORD, pieces.append)
        yield from self._read_run(SPACE)
        return "".join(pieces)

"""Mistral: `[TOOL_CALLS]` before an array of calls, or before each call `name{...}`."""

import re
import secrets
import string

from jaxserve.frontend.parsers.json_calls import JsonCallParser
from jaxserve.frontend.parsers.text_parser import SPACE, Steps
from jaxserve.frontend.parsers.tool_parser import NoCall

_START, _ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ID_CHARS, _ID_LENGTH = string.ascii_letters + string.digits, 9
_NAME = re.compile(r"[^\s\[\]{}\"]+")
_ALPHANUMERIC = re.compile(r"[a-zA-Z0-9]+")


class MistralParser(JsonCallParser):
    """All three forms: an array, `name{...}`, and `name[CALL_ID]id[ARGS]{...}`."""

    needs_special_tokens = True
    call_end = _START

    def _new_id(self) -> str:
        return "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))

    def _part(self) -> Steps[None]:
        if not (yield from self._read_until(self._give_content, _START)):
            return
        self._hold()
        self._read(len(_START))
        char = yield from self._read_run(SPACE)
        if char == "[":
            yield from self._read_calls()
        elif char == "{":
            yield from self._read_call()
        else:
            yield from self._read_named_call()

    def _read_named_call(self) -> Steps[None]:
        name, call_id = [], []
        yield from self._read_run(_NAME, name.append)
        yield from self._read_run(SPACE)
        if (yield from self._find(_ID)):
            self._read(len(_ID))
            yield from self._read_run(_ALPHANUMERIC, call_id.append)
        if (yield from self._find(_ARGS)):
            self._read(len(_ARGS))
        if not name or (yield from self._read_run(SPACE)) != "{":
            raise NoCall
        given = "".join(call_id)
        self._begin_call("".join(name), given if len(given) == _ID_LENGTH else None)
        yield from self._read_arguments()

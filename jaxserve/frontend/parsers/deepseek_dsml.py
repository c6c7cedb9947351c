"""DeepSeek V3.2: calls in its markup language, DSML."""

import re

from jaxserve.frontend.parsers.literals import parameter_types
from jaxserve.frontend.parsers.tag_calls import TagCallParser

_ATTRIBUTE = re.compile(r'\s(\w+)="([^"]*)"')


class DeepSeekDsmlParser(TagCallParser):
    """`<｜DSML｜invoke name="f">`, in it `<｜DSML｜parameter name="a" string="true">`.

    With string="true" the text is the value; with "false" it is JSON, or what the tool's schema
    makes of it.
    """

    needs_special_tokens = True
    start, end = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
    call, call_end = "<｜DSML｜invoke", "</｜DSML｜invoke>"
    parameter, parameter_end = "<｜DSML｜parameter", "</｜DSML｜parameter>"

    def _name(self, header: str) -> str:
        return dict(_ATTRIBUTE.findall(header)).get("name", "")

    def _key(self, tool: str, header: str) -> tuple[str, list[str]]:
        given = dict(_ATTRIBUTE.findall(header))
        name = given.get("name", "")
        if given.get("string") == "true":
            return name, ["string"]
        types = parameter_types(self._tool_schemas.get(tool, {}), name)
        # Any JSON is an object's text here; only what is none stays a string.
        return name, [*(kind for kind in types if kind != "string"), "object"]

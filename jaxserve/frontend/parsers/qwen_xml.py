"""Qwen3-Coder, Qwen3.5: calls in tags, each parameter a tag, its value plain text."""

from jaxserve.frontend.parsers.literals import parameter_types
from jaxserve.frontend.parsers.tag_calls import TagCallParser


class QwenXmlParser(TagCallParser):
    """`<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>`.

    The tool's schema gives the types.
    """

    start, end = "<tool_call>", "</tool_call>"
    call, call_end = "<function=", "</function>"
    parameter, parameter_end = "<parameter=", "</parameter>"
    newlines = True

    def _name(self, header: str) -> str:
        return header.strip()

    def _key(self, tool: str, header: str) -> tuple[str, list[str]]:
        name = header.strip()
        return name, parameter_types(self._tool_schemas.get(tool, {}), name)

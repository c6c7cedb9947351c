"""The parsers by name; the names are vLLM's."""

import difflib

from jaxserve.errors import ConfigError
from jaxserve.frontend.parsers.deepseek import DeepSeekParser
from jaxserve.frontend.parsers.deepseek_dsml import DeepSeekDsmlParser
from jaxserve.frontend.parsers.gemma import FunctionGemmaParser, GemmaParser
from jaxserve.frontend.parsers.harmony import HarmonyParser, HarmonyReasoningParser
from jaxserve.frontend.parsers.hermes import HermesParser
from jaxserve.frontend.parsers.llama import LlamaJsonParser
from jaxserve.frontend.parsers.mistral import MistralParser
from jaxserve.frontend.parsers.pythonic import PythonicParser
from jaxserve.frontend.parsers.qwen_xml import QwenXmlParser
from jaxserve.frontend.parsers.reasoning import (
    DeepSeekR1Parser,
    Gemma4ReasoningParser,
    MistralReasoningParser,
    Qwen3Parser,
)
from jaxserve.frontend.parsers.text_parser import TextParser
from jaxserve.frontend.parsers.tool_parser import ToolParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "deepseek_v3": DeepSeekParser,
    "deepseek_v31": DeepSeekParser,
    "deepseek_v32": DeepSeekDsmlParser,
    "functiongemma": FunctionGemmaParser,
    "gemma4": GemmaParser,
    "hermes": HermesParser,
    "llama3_json": LlamaJsonParser,
    "llama4_json": LlamaJsonParser,
    "mistral": MistralParser,
    "openai": HarmonyParser,
    "pythonic": PythonicParser,
    "qwen3_coder": QwenXmlParser,
    "qwen3_xml": QwenXmlParser,
}
REASONING_PARSERS: dict[str, type[TextParser]] = {
    "deepseek_r1": DeepSeekR1Parser,
    "gemma4": Gemma4ReasoningParser,
    "mistral": MistralReasoningParser,
    "openai_gptoss": HarmonyReasoningParser,
    "qwen3": Qwen3Parser,
}


def register_tool_parser(name: str, parser: type[ToolParser]) -> None:
    """Make `parser` available as `name`, in place of one that has that name."""
    TOOL_PARSERS[name] = parser


def register_reasoning_parser(name: str, parser: type[TextParser]) -> None:
    """Make `parser` available as `name`, in place of one that has that name."""
    REASONING_PARSERS[name] = parser


def tool_parser(name: str) -> type[ToolParser]:
    """The tool parser called `name`.

    Raises:
        ConfigError: There is none.
    """
    return _named(name, TOOL_PARSERS, "tool_call_parser")


def reasoning_parser(name: str) -> type[TextParser]:
    """The reasoning parser called `name`.

    Raises:
        ConfigError: There is none.
    """
    return _named(name, REASONING_PARSERS, "reasoning_parser")


def _named[P](name: str, parsers: dict[str, P], argument: str) -> P:
    if name in parsers:
        return parsers[name]
    near = difflib.get_close_matches(name, parsers, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{argument}={name!r} is unknown.{hint} Use one of {', '.join(sorted(parsers))}."
    )

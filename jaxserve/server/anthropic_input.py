"""A request of the Messages API as a chat completion's."""

from typing import Any, Literal

from msgspec import Struct

from jaxserve.server.anthropic_protocol import (
    REFUSED,
    CountTokensRequest,
    MessagesRequest,
    OutputFormat,
    Thinking,
)
from jaxserve.server.chat_protocol import ChatCompletionRequest
from jaxserve.server.conversation import Conversation
from jaxserve.server.errors import invalid
from jaxserve.server.fields import refuse, refuse_unsupported
from jaxserve.server.messages import (
    FunctionDefinition,
    FunctionName,
    NamedToolChoice,
    Tool,
)
from jaxserve.server.messages import ToolChoice as ChatToolChoice
from jaxserve.server.schema import read
from jaxserve.server_config import RequestLimits

# Fields of a chat request that an error may name, and what they are here.
NAMES = {
    r"messages(?:\[\d+\][\w.\[\]]*)?": "messages",
    r"response_format(?:\.json_schema)?": "output_config.format",
    r"(tools\[\d+\])\.function": r"\1",
    r"stop": "stop_sequences",
}


class _Block(Struct, kw_only=True, forbid_unknown_fields=True):
    cache_control: dict[str, Any] | None = None  # no effect: every prefix is cached


class _Text(_Block, kw_only=True):
    type: Literal["text"]
    text: str
    citations: list[dict[str, Any]] | None = None


class _Thinking(_Block, kw_only=True):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None  # not checked


class _RedactedThinking(_Block, kw_only=True):
    type: Literal["redacted_thinking"]
    data: str  # nobody here can read it


class _ToolUse(_Block, kw_only=True):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    toolset_name: str | None = None


class _ToolResult(_Block, kw_only=True):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None
    toolset_name: str | None = None


class _Message(Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


_BLOCKS: dict[str, dict[str, type[Struct]]] = {
    "user": {"text": _Text, "tool_result": _ToolResult},
    "system": {"text": _Text},
    "tool": {"text": _Text},
    "assistant": {
        "text": _Text,
        "thinking": _Thinking,
        "redacted_thinking": _RedactedThinking,
        "tool_use": _ToolUse,
    },
}


class _Tool(_Block, kw_only=True):
    type: Literal["custom"] | None = None
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # input is always streamed as it comes
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    input_examples: list[dict[str, Any]] | None = None


def as_chat(body: CountTokensRequest, limits: RequestLimits) -> ChatCompletionRequest:
    """The same request as a conversation. An answer that the last message begins is continued.

    Raises:
        APIError: Something is malformed or not supported.
    """
    refuse_unsupported(body, REFUSED)
    tools, choice, parallel = _tools(body)
    messages = _messages(body, limits)
    output = body.output_config
    chat = ChatCompletionRequest(
        model=body.model,
        messages=messages,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        reasoning_effort=None if output is None else output.effort,
        response_format=None if output is None else _response_format(output.format),
        continue_final_message=messages[-1]["role"] == "assistant",
    )
    if body.thinking is not None:
        _think(chat, body.thinking)
    if isinstance(body, MessagesRequest):
        chat.max_tokens = body.max_tokens
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
        chat.stop = body.stop_sequences or None
        chat.stream = body.stream
    return chat


def _think(chat: ChatCompletionRequest, thinking: Thinking) -> None:
    if thinking.type == "between_tools":
        raise invalid(
            "thinking.type='between_tools' is not supported; use enabled, adaptive or disabled",
            "thinking.type",
            "unsupported_parameter",
        )
    thinks = thinking.type != "disabled"
    # The names that models' templates have for it.
    chat.chat_template_kwargs = {"enable_thinking": thinks, "thinking": thinks}
    chat.include_reasoning = thinking.display != "omitted"


def _response_format(form: OutputFormat | None) -> dict[str, Any] | None:
    if form is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form.schema}}


def _messages(body: CountTokensRequest, limits: RequestLimits) -> list[dict[str, Any]]:
    if not body.messages:
        raise invalid("messages is empty; send at least one message", "messages", "empty_array")
    if len(body.messages) > limits.max_messages:
        raise invalid(
            f"messages has {len(body.messages)} entries; use at most {limits.max_messages}",
            "messages",
            "array_above_max_length",
        )
    conversation = Conversation(merges_all=True)
    if body.system:
        _add(conversation, "system", "system", body.system)
    for i, data in enumerate(body.messages):
        message = read(_Message, data, prefix=f"messages[{i}]")
        _add(conversation, message.role, f"messages[{i}].content", message.content)
    messages = conversation.finished()
    if "tool_calls" in messages[-1]:
        raise invalid("messages ends with a tool_use; send its tool_result", "messages")
    return messages


def _add(
    conversation: Conversation, role: str, where: str, content: str | list[dict[str, Any]]
) -> None:
    if isinstance(content, str):
        conversation.say(role, [content])
        return
    if not content:
        raise invalid(f"{where} is empty; send at least one block", where, "empty_array")
    for i, data in enumerate(content):
        match _block(role, f"{where}[{i}]", data):
            case _Text(text=text):
                conversation.say(role, [text])
            case _Thinking(thinking=text):
                conversation.think(text)
            case _ToolUse() as call:
                conversation.call(call.id, call.name, call.input)
            case _ToolResult() as result:
                texts = _result_texts(result, f"{where}[{i}].content")
                conversation.answer(result.tool_use_id, texts, f"{where}[{i}].tool_use_id")


def _result_texts(result: _ToolResult, where: str) -> list[str]:
    texts = ["Error:"] if result.is_error else []  # a chat has no other place for it
    if isinstance(result.content, str):
        return [*texts, result.content]
    for i, data in enumerate(result.content or []):
        block = _block("tool", f"{where}[{i}]", data)
        if isinstance(block, _Text):
            texts.append(block.text)
    return texts


def _block(role: str, where: str, data: dict[str, Any]) -> Struct:
    kinds = _BLOCKS[role]
    kind = data.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise invalid(
            f"{where}.type={kind!r:.60} is not supported here; use {' or '.join(kinds)}",
            f"{where}.type",
            "unsupported_value" if isinstance(kind, str) else "invalid_type",
        )
    return read(kinds[kind], data, prefix=where)


def _tools(
    body: CountTokensRequest,
) -> tuple[list[Tool] | None, ChatToolChoice | None, bool | None]:
    """Tools, what to choose of them, and whether calls may be many."""
    tools = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(body.tools or [])] or None
    given = body.tool_choice
    if given is None:
        return tools, None, None
    parallel = not given.disable_parallel_tool_use
    match given.type:
        case "auto":
            return tools, "auto" if tools else None, parallel
        case "any":
            return tools, "required", parallel
        case "none":
            return tools, "none", parallel
    if given.name is None:
        raise invalid(
            "tool_choice.name is missing; send it", "tool_choice.name", "missing_required_parameter"
        )
    return tools, NamedToolChoice(function=FunctionName(name=given.name)), parallel


def _tool(where: str, data: dict[str, Any]) -> Tool:
    kind = data.get("type")
    if isinstance(kind, str) and kind != "custom":
        raise invalid(
            f"{where}.type={kind!r:.60} is not supported; only custom tools are",
            f"{where}.type",
            "unsupported_parameter",
        )
    tool = read(_Tool, data, prefix=where)
    refuse(
        tool,
        {
            "allowed_callers": (None, ["direct"]),
            "defer_loading": (None, False),
            "input_examples": (None, []),
        },
        where,
    )
    definition = FunctionDefinition(
        name=tool.name,
        description=tool.description,
        parameters=tool.input_schema,
        strict=tool.strict,
    )
    return Tool(function=definition)

"""A request of the Responses API as a chat completion's."""

from typing import Any, Literal

import msgspec
from msgspec import Struct

from jaxserve.server.chat_protocol import ChatCompletionRequest
from jaxserve.server.conversation import Conversation
from jaxserve.server.errors import APIError, invalid
from jaxserve.server.fields import refuse, refuse_unsupported
from jaxserve.server.messages import FunctionDefinition, FunctionName, NamedToolChoice, Tool
from jaxserve.server.responses_protocol import LOGPROBS, REFUSED, ResponsesRequest, TextFormat
from jaxserve.server.schema import read
from jaxserve.server_config import RequestLimits

# Fields of a chat request that an error may name, and what they are here.
NAMES = {
    r"messages(?:\[\d+\][\w.\[\]]*)?": "input",
    r"max_completion_tokens|max_tokens": "max_output_tokens",
    r"response_format\.json_schema|response_format": "text.format",
    r"(tools\[\d+\])\.function": r"\1",
    r"truncate_prompt_tokens": "truncation",
}
_SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop", "logit_bias", "ignore_eos", "skip_special_tokens",
    "include_stop_str_in_output", "chat_template_kwargs", "structured_outputs", "priority",
    "cache_salt", "parallel_tool_calls", "stream", "vllm_xargs", "kv_transfer_params",
)  # fmt: skip
_TEXT = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")


class _Item(Struct, kw_only=True, forbid_unknown_fields=True):
    """What every item has and nothing depends on."""

    id: str | None = None
    status: str | None = None


class _Message(_Item, kw_only=True):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    phase: str | None = None


class _Call(_Item, kw_only=True):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str  # JSON
    caller: dict[str, Any] | None = None
    namespace: str | None = None


class _CallOutput(_Item, kw_only=True):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]
    name: str | None = None
    caller: dict[str, Any] | None = None
    namespace: str | None = None


class _Reasoning(_Item, kw_only=True):
    type: Literal["reasoning"]
    summary: list[dict[str, Any]] = []
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None


_ITEMS: dict[str, type[Struct]] = {
    "message": _Message,
    "function_call": _Call,
    "function_call_output": _CallOutput,
    "reasoning": _Reasoning,
}


class _Tool(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    async_: bool | None = msgspec.field(name="async", default=None)
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None


class _ToolName(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str


class _AllowedTools(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[_ToolName]


def as_chat(body: ResponsesRequest, limits: RequestLimits) -> ChatCompletionRequest:
    """The same request as a conversation.

    Raises:
        APIError: Something is malformed or not supported.
    """
    refuse_unsupported(body, REFUSED)
    reasoning = body.reasoning
    if reasoning is not None and reasoning.context == "current_turn":
        raise _unsupported("reasoning.context", "current_turn", "all_turns")
    if reasoning is not None and reasoning.mode == "pro":
        raise _unsupported("reasoning.mode", "pro", "standard")
    logprobs = LOGPROBS in (body.include or [])
    if body.top_logprobs and not logprobs:
        raise invalid(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")
    tools, choice = _tools(body)
    return ChatCompletionRequest(
        messages=_messages(body, limits),
        tools=tools,
        tool_choice=choice,
        max_completion_tokens=body.max_output_tokens,
        logprobs=logprobs,
        top_logprobs=body.top_logprobs if logprobs else None,
        reasoning_effort=None if reasoning is None else reasoning.effort,
        response_format=None if body.text is None else _response_format(body.text.format),
        truncate_prompt_tokens=-1 if body.truncation == "auto" else None,
        **{name: getattr(body, name) for name in _SAME},
    )


def _response_format(form: TextFormat | None) -> dict[str, Any] | None:
    if form is None or form.type != "json_schema":
        return None if form is None else {"type": form.type}
    spec = {
        "name": form.name,
        "schema": form.schema,
        "description": form.description,
        "strict": form.strict,
    }
    spec = {name: value for name, value in spec.items() if value is not None}
    return {"type": "json_schema", "json_schema": spec}


def _messages(body: ResponsesRequest, limits: RequestLimits) -> list[dict[str, Any]]:
    conversation = Conversation(merges_all=False)
    if body.instructions:
        conversation.say("system", [body.instructions])
    if isinstance(body.input, str):
        conversation.say("user", [body.input])
        return conversation.finished()
    if not body.input:
        raise invalid("input is empty; send a text or at least one item", "input", "empty_array")
    if len(body.input) > limits.max_messages:
        raise invalid(
            f"input has {len(body.input)} items; use at most {limits.max_messages}",
            "input",
            "array_above_max_length",
        )
    for i, item in enumerate(body.input):
        _add(conversation, f"input[{i}]", item)
    return conversation.finished()


def _add(conversation: Conversation, where: str, item: dict[str, Any]) -> None:
    kind = item.get("type", "message")
    if kind == "item_reference":
        raise invalid(
            f"{where} refers to a stored item; nothing is stored here: send the item itself",
            where,
            "unsupported_parameter",
        )
    if not isinstance(kind, str) or kind not in _ITEMS:
        raise invalid(
            f"{where}.type={kind!r:.60} is not supported; use {', '.join(_ITEMS)}",
            f"{where}.type",
            "unsupported_value" if isinstance(kind, str) else "invalid_type",
        )
    match read(_ITEMS[kind], item, prefix=where):
        case _Message() as message:
            conversation.say(message.role, _texts(message.content, f"{where}.content"))
        case _Call() as call:
            conversation.call(call.call_id, call.name, call.arguments)
        case _CallOutput() as output:
            texts = _texts(output.output, f"{where}.output")
            conversation.answer(output.call_id, texts, f"{where}.call_id")
        case _Reasoning() as reasoning:
            parts = reasoning.content or reasoning.summary
            name = "content" if reasoning.content else "summary"
            if text := "\n".join(_texts(parts, f"{where}.{name}")):
                conversation.think(text)


def _texts(content: str | list[dict[str, Any]], where: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type")
        if kind not in _TEXT:
            raise invalid(
                f"{where}[{i}].type={kind!r:.60} is not supported; this model takes text only: "
                '{"type": "input_text", "text": "..."}',
                f"{where}[{i}].type",
                "unsupported_value" if isinstance(kind, str) else "invalid_type",
            )
        name = "refusal" if kind == "refusal" else "text"
        if not isinstance(part.get(name), str):
            raise invalid(
                f"{where}[{i}].{name} is not a string", f"{where}[{i}].{name}", "invalid_type"
            )
        texts.append(part[name])
    return texts


def _tools(
    body: ResponsesRequest,
) -> tuple[list[Tool] | None, Literal["none", "auto", "required"] | NamedToolChoice | None]:
    tools = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(body.tools or [])]
    choice = body.tool_choice
    if isinstance(choice, dict):
        match choice.get("type"):
            case "function":
                name = read(_ToolName, choice, prefix="tool_choice").name
                choice = NamedToolChoice(function=FunctionName(name=name))
            case "allowed_tools":
                allowed = read(_AllowedTools, choice, prefix="tool_choice")
                names = {tool.name for tool in allowed.tools}
                if missing := names - {tool.function.name for tool in tools}:
                    raise invalid(
                        f"tool_choice allows {min(missing)!r:.80}, which is not among the tools",
                        "tool_choice.tools",
                    )
                tools = [tool for tool in tools if tool.function.name in names]
                choice = allowed.mode
            case kind:
                raise invalid(
                    f"tool_choice.type={kind!r:.60} is not supported; use function or "
                    "allowed_tools, or one of none, auto, required",
                    "tool_choice.type",
                    "unsupported_parameter" if isinstance(kind, str) else "invalid_type",
                )
    if not tools:  # clients send the defaults tools: [] and tool_choice: auto
        return None, None if choice == "auto" else choice
    return tools, choice


def _tool(where: str, data: dict[str, Any]) -> Tool:
    kind = data.get("type")
    if isinstance(kind, str) and kind != "function":
        raise invalid(
            f"{where}.type={kind!r:.60} is not supported; only function tools are",
            f"{where}.type",
            "unsupported_parameter",
        )
    tool = read(_Tool, data, prefix=where)
    refuse(
        tool,
        {
            "async_": (None, False),
            "allowed_callers": (None, ["direct"]),
            "defer_loading": (None, False),
            "output_schema": (None,),
        },
        where,
    )
    definition = FunctionDefinition(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return Tool(function=definition)


def _unsupported(param: str, value: str, instead: str) -> APIError:
    return invalid(
        f"{param}={value!r} is not supported; use {instead}", param, "unsupported_parameter"
    )

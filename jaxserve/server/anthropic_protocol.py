"""The bodies of POST /v1/messages and /v1/messages/count_tokens: Anthropic's."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from jaxserve.server.fields import Name, Positive


class Thinking(Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether to think. `budget_tokens` is a wish: `max_tokens` bounds thought and answer."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Positive | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ToolChoice(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """A conversation."""

    model: Name | None = None
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None  # no effect: every prefix is cached
    user_profile_id: str | None = None  # no effect
    workspace_id: str | None = None  # no effect

    # Known, and refused unless they say what holds anyway
    speed: Literal["standard", "fast"] | None = None
    context_management: dict[str, Any] | None = None
    mcp_servers: list[dict[str, Any]] | None = None


class MessagesRequest(CountTokensRequest, kw_only=True, forbid_unknown_fields=True):
    """A conversation to answer."""

    max_tokens: Positive
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None  # no effect
    service_tier: Literal["auto", "standard_only"] | None = None  # no effect

    # Known, and refused
    container: str | dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    inference_geo: str | None = None


_KEPT = {"type": "clear_thinking_20251015", "keep": "all"}
REFUSED: dict[str, tuple[Any, ...]] = {
    "speed": (None, "standard"),
    "context_management": (None, {}, {"edits": []}, {"edits": [_KEPT]}),
    "mcp_servers": (None, []),
    "container": (None,),
    "diagnostics": (None,),
    "inference_geo": (None,),
}


class TextBlock(Struct, kw_only=True, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(Struct, kw_only=True, tag_field="type", tag="thinking"):
    """Thought, unsigned: what comes back is not checked."""

    thinking: str
    signature: str = ""


class ToolUseBlock(Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


type ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class ThinkingTokens(Struct, kw_only=True):
    thinking_tokens: int


class MessagesUsage(Struct, kw_only=True):
    """Tokens: `input_tokens` are those that were not read from the cache."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int
    output_tokens_details: ThinkingTokens | UnsetType = UNSET


class MessageObject(Struct, kw_only=True, tag_field="type", tag="message"):
    """The answer; when a stream begins, without what comes in it."""

    id: str
    role: str = "assistant"
    model: str
    content: list[ContentBlock]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage


class TokenCount(Struct, kw_only=True):
    input_tokens: int

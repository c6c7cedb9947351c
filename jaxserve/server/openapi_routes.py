"""What each route takes and answers, for /openapi.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.server.anthropic_protocol import REFUSED as MESSAGES_REFUSED
from jaxserve.server.anthropic_protocol import (
    CountTokensRequest,
    MessageObject,
    MessagesRequest,
    TokenCount,
)
from jaxserve.server.chat_protocol import REFUSED as CHAT_REFUSED
from jaxserve.server.chat_protocol import ChatChunk, ChatCompletion, ChatCompletionRequest
from jaxserve.server.completions import REFUSED as COMPLETION_REFUSED
from jaxserve.server.completions import Completion, CompletionRequest
from jaxserve.server.embeddings import EmbeddingRequest, EmbeddingResponse
from jaxserve.server.error_shapes import AnthropicErrorResponse
from jaxserve.server.errors import ErrorResponse
from jaxserve.server.fields import REFUSED
from jaxserve.server.openapi_fields import (
    AnthropicMessage,
    AnthropicText,
    AnthropicTool,
    InputMessage,
)
from jaxserve.server.responses_protocol import REFUSED as RESPONSES_REFUSED
from jaxserve.server.responses_protocol import ResponseObject, ResponsesRequest
from jaxserve.server.routes_health import Version
from jaxserve.server.routes_models import ModelCard, ModelList
from jaxserve.server.routes_tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from jaxserve.server.structured import ResponseFormat, StructuredOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one route.

    Attributes:
        body: The struct of the request's JSON body; None: it takes none.
        answer: The struct of a JSON answer; `dict`: any object.
        event: The struct of a streamed event, or `dict`; None: it never streams.
        media: The answer's types when it is no JSON; none, without `answer`: it has no body.
        error: The struct of its errors.
        succeeds: False: it always answers an error.
        required: Fields of the body that its struct lets be left out, so that the error says more.
        parts: Structs of what the body's struct takes as plain objects and others check later.
        refused: Fields that are known but not supported, with the values that change nothing.
        statuses: Errors beyond those that every route, and every route with a body, can give.
    """

    summary: str
    tag: str
    body: type | None = None
    answer: type | None = None
    event: type | None = None
    media: tuple[str, ...] = ()
    error: type = ErrorResponse
    succeeds: bool = True
    required: tuple[str, ...] = ()
    parts: Mapping[str, type] = field(default_factory=dict)
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    statuses: tuple[int, ...] = ()


_CONSTRAINTS = {"response_format": ResponseFormat, "structured_outputs": StructuredOutputs}
_GENERATES = (404, 503, 504)
_HEALTH = "Health"
_HTML = ("text/html",)
_PAGES = "Pages"
_MODELS = "Models"
_TEXT = "Text"
_TOKENS = "Tokens"

_RESPONSES_SHARED = ("vllm_xargs", "kv_transfer_params")
_ANTHROPIC = {
    "messages": AnthropicMessage,
    "system": AnthropicText,
    "tools": AnthropicTool,
}
_NOT_STORED = Operation(
    summary="Always 404: responses are not stored", tag=_TEXT, succeeds=False, statuses=(404,)
)

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        summary="Answer a conversation",
        tag=_TEXT,
        body=ChatCompletionRequest,
        answer=ChatCompletion,
        event=ChatChunk,
        required=("model",),
        parts={"messages": InputMessage, **_CONSTRAINTS},
        refused=REFUSED | CHAT_REFUSED,
        statuses=_GENERATES,
    ),
    ("POST", "/v1/completions"): Operation(
        summary="Continue a text, or several",
        tag=_TEXT,
        body=CompletionRequest,
        answer=Completion,
        event=Completion,
        required=("model",),
        parts=_CONSTRAINTS,
        refused=REFUSED | COMPLETION_REFUSED,
        statuses=_GENERATES,
    ),
    ("POST", "/v1/responses"): Operation(
        summary="Answer a conversation, as OpenAI's Responses API does",
        tag=_TEXT,
        body=ResponsesRequest,
        answer=ResponseObject,
        event=dict,
        required=("model",),
        parts={"structured_outputs": StructuredOutputs},
        refused={name: REFUSED[name] for name in _RESPONSES_SHARED} | RESPONSES_REFUSED,
        statuses=_GENERATES,
    ),
    ("GET", "/v1/responses/{name}"): _NOT_STORED,
    ("DELETE", "/v1/responses/{name}"): _NOT_STORED,
    ("POST", "/v1/responses/{name}/cancel"): _NOT_STORED,
    ("GET", "/v1/responses/{name}/input_items"): _NOT_STORED,
    ("POST", "/v1/messages"): Operation(
        summary="Answer a conversation, as Anthropic's Messages API does",
        tag=_TEXT,
        body=MessagesRequest,
        answer=MessageObject,
        event=dict,
        error=AnthropicErrorResponse,
        required=("model",),
        parts=_ANTHROPIC,
        refused=MESSAGES_REFUSED,
        statuses=_GENERATES,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        summary="Count the tokens of a conversation",
        tag=_TEXT,
        body=CountTokensRequest,
        answer=TokenCount,
        error=AnthropicErrorResponse,
        required=("model",),
        parts=_ANTHROPIC,
        refused=MESSAGES_REFUSED,
        statuses=(404,),
    ),
    ("POST", "/v1/embeddings"): Operation(
        summary="Texts as vectors",
        tag=_TEXT,
        body=EmbeddingRequest,
        answer=EmbeddingResponse,
        required=("model",),
        statuses=_GENERATES,
    ),
    ("GET", "/v1/models"): Operation(summary="List the models", tag=_MODELS, answer=ModelList),
    ("GET", "/v1/models/{name}"): Operation(
        summary="Describe a model", tag=_MODELS, answer=ModelCard, statuses=(404,)
    ),
    ("POST", "/tokenize"): Operation(
        summary="Tokens of a text or of a conversation",
        tag=_TOKENS,
        body=TokenizeRequest,
        answer=TokenizeResponse,
        parts={"messages": InputMessage},
        statuses=(404,),
    ),
    ("POST", "/detokenize"): Operation(
        summary="Text of tokens",
        tag=_TOKENS,
        body=DetokenizeRequest,
        answer=DetokenizeResponse,
        statuses=(404,),
    ),
    ("GET", "/health"): Operation(
        summary="Is it alive: the engine runs and makes progress", tag=_HEALTH, statuses=(503,)
    ),
    ("GET", "/ping"): Operation(summary="The same as /health", tag=_HEALTH, statuses=(503,)),
    ("POST", "/ping"): Operation(summary="The same as /health", tag=_HEALTH, statuses=(503,)),
    ("GET", "/ready"): Operation(
        summary="Does it take new work: 503 while it shuts down", tag=_HEALTH, statuses=(503,)
    ),
    ("GET", "/version"): Operation(summary="The version", tag=_HEALTH, answer=Version),
    ("GET", "/metrics"): Operation(
        summary="Metrics for Prometheus",
        tag=_HEALTH,
        media=("text/plain", "application/openmetrics-text"),
    ),
    ("GET", "/"): Operation(summary="A page to chat with the model", tag=_PAGES, media=_HTML),
    ("GET", "/docs"): Operation(summary="This document as a page", tag=_PAGES, media=_HTML),
    ("GET", "/openapi.json"): Operation(summary="This document", tag=_PAGES, answer=dict),
}

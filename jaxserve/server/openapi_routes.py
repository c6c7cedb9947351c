"""What each route takes and answers, for /openapi.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.server.chat_protocol import REFUSED as CHAT_REFUSED
from jaxserve.server.chat_protocol import ChatChunk, ChatCompletion, ChatCompletionRequest
from jaxserve.server.completions import REFUSED as COMPLETION_REFUSED
from jaxserve.server.completions import Completion, CompletionRequest
from jaxserve.server.fields import REFUSED
from jaxserve.server.openapi_fields import InputMessage
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
        answer: The struct of a JSON answer.
        event: The struct of a streamed event; None: it never streams.
        media: The answer's type when it is no JSON; None, without `answer`: it has no body.
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
    media: str | None = None
    required: tuple[str, ...] = ()
    parts: Mapping[str, type] = field(default_factory=dict)
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    statuses: tuple[int, ...] = ()


_CONSTRAINTS = {"response_format": ResponseFormat, "structured_outputs": StructuredOutputs}
_GENERATES = (404, 503, 504)
_HEALTH = "Health"
_PAGES = "Pages"
_MODELS = "Models"
_TEXT = "Text"
_TOKENS = "Tokens"

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
        summary="Metrics for Prometheus", tag=_HEALTH, media="text/plain"
    ),
    ("GET", "/"): Operation(summary="A page to chat with the model", tag=_PAGES, media="text/html"),
    ("GET", "/docs"): Operation(summary="This document as a page", tag=_PAGES, media="text/html"),
    ("GET", "/openapi.json"): Operation(summary="This document", tag=_PAGES, answer=dict),
}

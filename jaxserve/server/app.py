"""The application: routes, and the layers that every request passes."""

import contextlib
import copy
import hashlib
import json
from collections.abc import Sequence
from functools import partial

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.async_llm import AsyncLLM
from jaxserve.errors import RequestError
from jaxserve.frontend.chat_process import ChatProcess
from jaxserve.frontend.parsers.registry import reasoning_parser, tool_parser
from jaxserve.server.anthropic_messages import count_tokens, messages
from jaxserve.server.auth import Authentication
from jaxserve.server.chat import chat_completions
from jaxserve.server.completions import completions
from jaxserve.server.context import Context
from jaxserve.server.embeddings import embeddings
from jaxserve.server.guards import Guard
from jaxserve.server.http_metrics import HTTPMetrics
from jaxserve.server.openapi import openapi_route
from jaxserve.server.request_log import AccessLog
from jaxserve.server.responses import no_response, responses
from jaxserve.server.routes_health import health, own_version, ready, show_version
from jaxserve.server.routes_metrics import metrics
from jaxserve.server.routes_models import model, models
from jaxserve.server.routes_pages import docs, playground
from jaxserve.server.routes_tokens import detokenize, tokenize
from jaxserve.server.telemetry import Telemetry
from jaxserve.server_config import ServerConfig


def make_app(llm: AsyncLLM, config: ServerConfig) -> "Application":
    """The ASGI application over an engine that runs.

    Args:
        llm: Stays the caller's to shut down.
        config: Of the server.

    Raises:
        ConfigError: A parser is unknown, or what traces need is not installed.
    """
    check_parsers(config)
    chat_process = ChatProcess()
    if llm.client.tokenizer is not None:  # else the first such request would hold up the others
        chat_process.start()
        # A copy, for others may use the tokenizer after this server has ended.
        llm.client.tokenizer = copy.copy(llm.client.tokenizer)
        llm.client.tokenizer.render_chat = chat_process.render
        with contextlib.suppress(RequestError):  # no end token: refused when asked for
            llm.client.prepare_structured_outputs()
    names = _names(llm, config)
    context = Context(
        llm=llm,
        config=config,
        names=names,
        fingerprint=_print(llm),
        telemetry=Telemetry(llm, config, names[0]),
        chat_process=chat_process,
    )
    routes = _routes(config)
    layered: ASGIApp = Authentication(
        Router(routes, redirect_slashes=False),
        config.api_keys,
        protect_metrics=config.protect_metrics,
        max_concurrent=config.max_concurrent_requests_per_key,
        on_limit=partial(context.telemetry.metrics.reject, "rate_limit"),
    )
    if config.allowed_origins:
        layered = CORSMiddleware(
            layered,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=("x-request-id", "retry-after"),
        )
    layered = HTTPMetrics(Guard(layered, config.allowed_hosts), context.telemetry.metrics.registry)
    return Application(AccessLog(layered, enabled=not config.disable_access_log), context, routes)


def check_parsers(config: ServerConfig) -> None:
    """Raises ConfigError for the name of a parser that does not exist."""
    if config.tool_call_parser is not None:
        tool_parser(config.tool_call_parser)
    if config.reasoning_parser is not None:
        reasoning_parser(config.reasoning_parser)


class Application:
    """The ASGI application, with what whoever serves it must reach."""

    def __init__(self, app: ASGIApp, context: Context, routes: Sequence[Route]) -> None:
        self._app = app
        self.context = context
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # the router raises for what it does not find, instead of answering
        scope.setdefault("state", {})["context"] = self.context
        await self._app(scope, receive, send)


def _routes(config: ServerConfig) -> list[Route]:
    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/version", show_version, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/responses/{name}", no_response, methods=["GET", "DELETE"]),
        Route("/v1/responses/{name}/cancel", no_response, methods=["POST"]),
        Route("/v1/responses/{name}/input_items", no_response, methods=["GET"]),
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]
    if not config.disable_playground:
        routes.append(Route("/", playground, methods=["GET"]))
    if not config.disable_docs:
        routes.append(Route("/docs", docs, methods=["GET"]))
        routes.append(Route("/openapi.json", openapi_route(routes), methods=["GET"]))
    return routes


def _names(llm: AsyncLLM, config: ServerConfig) -> tuple[str, ...]:
    if config.served_model_name:
        return config.served_model_name
    return (llm.config.served_model_name or llm.config.model,)


def _print(llm: AsyncLLM) -> str:
    """`jaxserve-VERSION-HASH`: the same for the same version, model and settings that count."""
    summary = llm.summary()
    facts = {name: str(summary.get(name)) for name in ("model", "dtype", "device", "parameters")}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"jaxserve-{own_version()}-{digest[:8]}"

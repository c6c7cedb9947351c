"""GET /v1/models: what is served."""

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.answers import json_response
from jaxserve.server.context import Context
from jaxserve.server.errors import APIError


class ModelCard(Struct, kw_only=True):
    """A model under one of its names."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "jaxserve"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[dict[str, str]] = []


class ModelList(Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


async def models(request: Request) -> Response:
    context = Context.of(request)
    return json_response(ModelList(data=[_card(context, name) for name in context.names]))


async def model(request: Request) -> Response:
    context = Context.of(request)
    name = request.path_params["name"]
    if name not in context.names:
        raise APIError(
            404,
            f"the model {name[:100]!r} does not exist; use {' or '.join(context.names)}",
            param="model",
            code="model_not_found",
        )
    return json_response(_card(context, name))


def _card(context: Context, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=context.created_s,
        root=context.llm.config.model,
        max_model_len=context.llm.max_model_len,
    )

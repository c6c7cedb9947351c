"""POST /v1/embeddings: texts as vectors, from the model's last hidden state."""

import base64
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.async_llm import OutputStream
from jaxserve.errors import RequestError
from jaxserve.frontend.pooling import check_dimensions, embedding, pooling_params
from jaxserve.server.answers import CLIENT_LEFT, json_response, unless_gone
from jaxserve.server.body import read_object
from jaxserve.server.completions import list_of_prompts
from jaxserve.server.context import Context
from jaxserve.server.errors import APIError
from jaxserve.server.fields import Name, Positive, Priority
from jaxserve.server.schema import read
from jaxserve.server.submitting import priority_of, request_name, submit
from jaxserve.server.usage import Counter, Usage


class EmbeddingRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Texts, or token ids."""

    input: str | list[Any]
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None  # no effect
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    priority: Priority | None = None
    request_id: Annotated[str, Meta(max_length=128)] | None = None
    cache_salt: str | None = None


class EmbeddingData(Struct, kw_only=True):
    index: int
    object: str = "embedding"
    embedding: list[float] | str  # base64 of little-endian float32


class EmbeddingResponse(Struct, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[EmbeddingData]
    usage: Usage


async def embeddings(request: Request) -> Response:
    context = Context.of(request)
    limits = context.config.limits
    data = await read_object(request, limits)
    body = read(EmbeddingRequest, data, allow_unknown=context.config.allow_unknown_fields)
    model = context.check_model(body.model)
    check_dimensions(body.dimensions, context.llm.hidden_size)
    prompts = []
    for prompt in list_of_prompts(body.input, limits, "input"):
        try:
            parsed = await context.llm.parse(
                prompt,
                add_special_tokens=body.add_special_tokens is not False,
                truncate_prompt_tokens=body.truncate_prompt_tokens,
                truncation_side=body.truncation_side or "right",
                pools=True,
            )
        except RequestError as error:
            param = "input" if error.param == "prompt" else error.param
            raise RequestError(str(error), param=param, code=error.code) from None
        prompts.append(parsed)
    name = request_name(request, "embd", body.request_id)
    stream = await submit(
        request,
        context,
        prompts,
        pooling_params(),
        name=name,
        cache_salt=body.cache_salt,
        priority=priority_of(request, body.priority),
        pools=True,
    )
    answer = _Answer(body, name, model, context.created_s)
    try:
        whole = await unless_gone(
            request, answer.whole(stream), timeout_s=context.config.request_timeout_s
        )
    finally:
        stream.close()
    return Response(status_code=CLIENT_LEFT) if whole is None else json_response(whole)


@dataclass(slots=True)
class _Answer:
    body: EmbeddingRequest
    name: str
    model: str
    created: int

    async def whole(self, stream: OutputStream) -> EmbeddingResponse:
        counter = Counter(with_cached=False)
        found: dict[int, EmbeddingData] = {}
        async for index, output in stream:
            counter.add(index, output)
            if output.pooled is None:
                raise APIError(500, "the engine gave no embedding", code="engine_error")
            vector = _encoded(
                embedding(output.pooled, self.body.dimensions), self.body.encoding_format
            )
            found[index] = EmbeddingData(index=index, embedding=vector)
        counter.num_output = 0  # no token comes out
        data = [found[index] for index in sorted(found)]
        return EmbeddingResponse(
            id=self.name,
            created=self.created,
            model=self.model,
            data=data,
            usage=counter.usage(),
        )


def _encoded(vector: np.ndarray, form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()

"""POST /tokenize and /detokenize."""

from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.answers import json_response
from jaxserve.server.body import read_object
from jaxserve.server.chat_job import render_prompt
from jaxserve.server.chat_protocol import ChatCompletionRequest
from jaxserve.server.context import Context
from jaxserve.server.errors import invalid
from jaxserve.server.fields import Name
from jaxserve.server.messages import Tool, check_messages, check_tools
from jaxserve.server.schema import read


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """A text, or a conversation as the model would see it."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None  # true for a prompt, false for messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    model: Name | None = None
    tokens: list[int]


class DetokenizeResponse(Struct, kw_only=True):
    prompt: str


async def tokenize(request: Request) -> Response:
    context = Context.of(request)
    body = read(TokenizeRequest, await read_object(request, context.config.limits))
    context.check_model(body.model, required=False)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("send either prompt or messages", "prompt", "missing_required_parameter")
    tokenizer = context.llm.get_tokenizer()
    special = body.add_special_tokens
    if body.prompt is not None:
        text, special = body.prompt, special is not False
    else:
        messages = body.messages or []
        check_messages(messages, context.config.limits)
        if body.tools is not None:
            check_tools(body.tools, None, context.config.limits)
        text = await render_prompt(
            context,
            ChatCompletionRequest(
                messages=messages,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
            ),
        )
        special = bool(special)
    ids = list((await context.llm.parse(text, add_special_tokens=special)).token_ids)
    return json_response(
        TokenizeResponse(
            count=len(ids),
            max_model_len=context.llm.max_model_len,
            tokens=ids,
            token_strs=tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None,
        )
    )


async def detokenize(request: Request) -> Response:
    context = Context.of(request)
    body = read(DetokenizeRequest, await read_object(request, context.config.limits))
    context.check_model(body.model, required=False)
    size = context.llm.vocab_size
    bad = next((i for i in body.tokens if not 0 <= i < size), None)
    if bad is not None:
        raise invalid(f"tokens holds {bad!r:.40}; use ids from 0 to {size - 1}", "tokens")
    text = context.llm.get_tokenizer().decode(body.tokens)
    return json_response(DetokenizeResponse(prompt=text))

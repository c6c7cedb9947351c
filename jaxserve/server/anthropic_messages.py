"""POST /v1/messages and /v1/messages/count_tokens."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.async_llm import LONG_TEXT_CHARS, OutputStream
from jaxserve.server.answers import EventStream, event, json_response, respond
from jaxserve.server.anthropic_input import NAMES, as_chat
from jaxserve.server.anthropic_protocol import (
    ContentBlock,
    CountTokensRequest,
    MessageObject,
    MessagesRequest,
    MessagesUsage,
    TextBlock,
    ThinkingBlock,
    ThinkingTokens,
    TokenCount,
    ToolUseBlock,
)
from jaxserve.server.blocks import Block, Blocks, Change
from jaxserve.server.body import read_object
from jaxserve.server.chat_job import ChatJob, render_prompt
from jaxserve.server.context import Context
from jaxserve.server.error_shapes import anthropic_error
from jaxserve.server.errors import APIError
from jaxserve.server.messages import check_messages, check_tools
from jaxserve.server.renaming import told_as
from jaxserve.server.schema import read
from jaxserve.server.submitting import request_name
from jaxserve.server.usage import PromptTokensDetails


async def messages(request: Request) -> Response | EventStream:
    context = Context.of(request)
    config = context.config
    data = await read_object(request, config.limits)
    body = read(MessagesRequest, data, allow_unknown=config.allow_unknown_fields)
    chat = as_chat(body, config.limits)
    request_id = request.scope["state"]["request_id"]
    with told_as(NAMES):
        job = await ChatJob.prepare(context, chat)
        answer = _Answer(job, request_name(request, "msg", None, "_"), request_id)
        stream = await job.submit(request, answer.id)
    return await respond(
        request,
        answer,
        stream,
        streamed=bool(body.stream),
        headers={"request-id": request_id},
        error_event=answer.failed,
    )


async def count_tokens(request: Request) -> Response:
    context = Context.of(request)
    config = context.config
    data = await read_object(request, config.limits)
    body = read(CountTokensRequest, data, allow_unknown=config.allow_unknown_fields)
    context.check_model(body.model)
    chat = as_chat(body, config.limits)
    with told_as(NAMES):
        check_messages(chat.messages, config.limits)
        if chat.tools is not None:
            check_tools(chat.tools, chat.tool_choice, config.limits)
        text = await render_prompt(context, chat)
    # Not `parse`: what is longer than the context is counted, too.
    encode = partial(context.llm.get_tokenizer().encode, text, add_special_tokens=False)
    ids = await asyncio.to_thread(encode) if len(text) > LONG_TEXT_CHARS else encode()
    answer = json_response(TokenCount(input_tokens=len(ids)))
    return _with_id(answer, request.scope["state"]["request_id"])


def _with_id(response: Response, request_id: str) -> Response:
    response.headers["request-id"] = request_id  # the name that Anthropic's clients know
    return response


@dataclass(slots=True)
class _Answer:
    job: ChatJob
    id: str
    request_id: str
    blocks: Blocks = field(default_factory=Blocks)

    async def whole(self, stream: OutputStream) -> MessageObject:
        async for _ in self.blocks.read(self.job, stream):
            pass
        reason, sequence = self._stop()
        return self._message(
            content=[_content(block) for block in self.blocks.all],
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._usage(),
        )

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes]:
        try:
            usage = MessagesUsage(input_tokens=len(self.job.prompt.token_ids), output_tokens=0)
            yield _event("message_start", message=self._message(content=[], usage=usage))
            yield _event("ping")
            async for changes, _ in self.blocks.read(self.job, stream):
                for change in changes:
                    for each in _told(change):
                        yield each
            reason, sequence = self._stop()
            delta = {"stop_reason": reason, "stop_sequence": sequence}
            yield _event("message_delta", delta=delta, usage=self._usage())
            yield _event("message_stop")
        finally:
            stream.close()

    def failed(self, error: APIError) -> bytes:
        """The last event of a stream in which something went wrong."""
        return event(anthropic_error(error, self.request_id), "error")

    def _message(self, **fields: Any) -> MessageObject:
        return MessageObject(id=self.id, model=self.job.model, **fields)

    def _stop(self) -> tuple[str, str | None]:
        """Why the answer ended, and the stop sequence if it was one."""
        if self.blocks.finish_reason == "length":
            return "max_tokens", None
        if self.blocks.has_calls:
            return "tool_use", None
        if isinstance(self.blocks.stop_reason, str):
            return "stop_sequence", self.blocks.stop_reason
        return "end_turn", None

    def _usage(self) -> MessagesUsage:
        counter = self.job.counter
        usage = counter.usage()
        details = usage.prompt_tokens_details
        # Zero unless the operator lets cache hits be told.
        num_cached = details.cached_tokens if isinstance(details, PromptTokensDetails) else 0
        result = MessagesUsage(
            input_tokens=usage.prompt_tokens - num_cached,
            cache_read_input_tokens=num_cached,
            output_tokens=usage.completion_tokens,
        )
        if counter.with_reasoning:
            result.output_tokens_details = ThinkingTokens(thinking_tokens=counter.num_reasoning)
        return result


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)


def _told(change: Change) -> Iterator[bytes]:
    """The event of a change."""
    block = change.block
    match change.what:
        case "begin":
            begun = _content(Block(block.kind, block.index, "", block.call_id, block.name))
            yield _event("content_block_start", index=block.index, content_block=begun)
        case "grow":
            yield _event("content_block_delta", index=block.index, delta=_delta(change))
        case "end":
            yield _event("content_block_stop", index=block.index)


def _delta(change: Change) -> dict[str, str]:
    match change.block.kind:
        case "text":
            return {"type": "text_delta", "text": change.text}
        case "reasoning":
            return {"type": "thinking_delta", "thinking": change.text}
        case "call":
            return {"type": "input_json_delta", "partial_json": change.text}


def _content(block: Block) -> ContentBlock:
    match block.kind:
        case "text":
            return TextBlock(text=block.text)
        case "reasoning":
            return ThinkingBlock(thinking=block.text)
        case "call":
            return ToolUseBlock(id=block.call_id, name=block.name, input=_input(block.text))


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments. What is no JSON object, as when the answer was cut within, is kept in the
    form that Anthropic's guides give to it."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}

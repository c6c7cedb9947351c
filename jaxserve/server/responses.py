"""POST /v1/responses. Nothing is stored, so what could be asked of a response later is not here."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.async_llm import OutputStream
from jaxserve.server.answers import EventStream, event, respond
from jaxserve.server.blocks import Block, Blocks, Change
from jaxserve.server.body import read_object
from jaxserve.server.chat_job import ChatJob, Piece
from jaxserve.server.context import Context
from jaxserve.server.errors import APIError, invalid
from jaxserve.server.logprobs import ChatTokenLogprob, chat_logprobs
from jaxserve.server.renaming import told_as
from jaxserve.server.responses_input import NAMES, as_chat
from jaxserve.server.responses_protocol import (
    IncompleteDetails,
    InputTokensDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    Reasoning,
    ReasoningText,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    Status,
    TextConfig,
    TextFormat,
)
from jaxserve.server.schema import read
from jaxserve.server.submitting import request_name
from jaxserve.server.usage import PromptTokensDetails

_ID_PREFIX = {"text": "msg", "reasoning": "rs", "call": "fc"}


async def responses(request: Request) -> Response | EventStream:
    context = Context.of(request)
    config = context.config
    data = await read_object(request, config.limits)
    body = read(ResponsesRequest, data, allow_unknown=config.allow_unknown_fields)
    chat = as_chat(body, config.limits)
    with told_as(NAMES):
        job = await ChatJob.prepare(context, chat)
        if chat.logprobs and job.parsers[0] is not None:
            raise invalid(
                "log-probabilities are not supported where reasoning or calls are set apart from "
                "text; leave include out",
                "include",
                "unsupported_parameter",
            )
        answer = _Answer(body, job, request_name(request, "resp", body.request_id, "_"))
        stream = await job.submit(request, answer.id)
    return await respond(
        request, answer, stream, streamed=bool(body.stream), error_event=answer.failed
    )


async def no_response(request: Request) -> Response:
    """What is asked of a stored response."""
    raise APIError(
        404,
        f"there is no response {request.path_params['name'][:100]!r}; responses are not stored "
        "here: send the whole conversation as input",
        param="response_id",
        code="response_not_found",
    )


@dataclass(slots=True)
class _Answer:
    body: ResponsesRequest
    job: ChatJob
    id: str
    created: int = field(default_factory=lambda: int(time.time()))
    blocks: Blocks = field(default_factory=Blocks)
    _num_events: int = 0
    _ids: list[str] = field(default_factory=list)  # of the items
    _logprobs: list[ChatTokenLogprob] = field(default_factory=list)
    _num_told: int = 0  # of `_logprobs`

    async def whole(self, stream: OutputStream) -> ResponseObject:
        async for _, piece in self.blocks.read(self.job, stream):
            self._keep_logprobs(piece)
        return self._response(self._final_status())

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes]:
        try:
            for name in ("created", "in_progress"):
                yield self._event(f"response.{name}", response=self._response("in_progress"))
            async for changes, piece in self.blocks.read(self.job, stream):
                self._keep_logprobs(piece)
                for change in changes:
                    for each in self._told(change):
                        yield each
            status = self._final_status()
            yield self._event(f"response.{status}", response=self._response(status))
        finally:
            stream.close()

    def failed(self, error: APIError) -> bytes:
        """The last event of a stream in which something went wrong."""
        response = self._response("failed")
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        response.error = ResponseError(code=code, message=error.body().error.message)
        return self._event("response.failed", response=response)

    def _event(self, name: str, **fields: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return event({"type": name, "sequence_number": number, **fields}, name)

    def _told(self, change: Change) -> Iterator[bytes]:
        """The events of a change."""
        block = change.block
        item: dict[str, Any] = {"output_index": block.index}
        if change.what == "begin":
            begun = self._item(block, "in_progress", empty=True)
            yield self._event("response.output_item.added", item=begun, **item)
        item["item_id"] = self._item_id(block)
        if block.kind == "call":
            yield from self._told_of_call(change, item)
        else:
            yield from self._told_of_text(change, item | {"content_index": 0})
        if change.what == "end":
            done = self._item(block, self._item_status(block))
            yield self._event("response.output_item.done", output_index=block.index, item=done)

    def _told_of_call(self, change: Change, item: dict[str, Any]) -> Iterator[bytes]:
        name = "response.function_call_arguments"
        if change.what == "grow":
            yield self._event(f"{name}.delta", delta=change.text, **item)
        elif change.what == "end":
            yield self._event(f"{name}.done", arguments=change.block.text, **item)

    def _told_of_text(self, change: Change, item: dict[str, Any]) -> Iterator[bytes]:
        is_text = change.block.kind == "text"
        name = "response.output_text" if is_text else "response.reasoning_text"
        if change.what == "begin":
            part = OutputText(text="") if is_text else ReasoningText(text="")
            yield self._event("response.content_part.added", part=part, **item)
        elif change.what == "grow":
            new = {"logprobs": self._logprobs[self._num_told :]} if is_text else {}
            self._num_told = len(self._logprobs)
            yield self._event(f"{name}.delta", delta=change.text, **new, **item)
        else:
            part = self._part(change.block)
            whole = {"logprobs": part.logprobs} if isinstance(part, OutputText) else {}
            yield self._event(f"{name}.done", text=part.text, **whole, **item)
            yield self._event("response.content_part.done", part=part, **item)

    def _keep_logprobs(self, piece: Piece) -> None:
        chat = self.job.body
        if chat.logprobs:
            found = chat_logprobs(piece.choice.logprobs or [], chat.top_logprobs)
            self._logprobs += found.content or []

    def _final_status(self) -> Status:
        return "incomplete" if self.blocks.finish_reason == "length" else "completed"

    def _item_status(self, block: Block) -> Status:
        """Only the last item can be cut."""
        is_last = block is self.blocks.all[-1]
        return self._final_status() if is_last else "completed"

    def _item_id(self, block: Block) -> str:
        while len(self._ids) <= block.index:
            prefix = _ID_PREFIX[self.blocks.all[len(self._ids)].kind]
            self._ids.append(f"{prefix}_{uuid.uuid4().hex}")
        return self._ids[block.index]

    def _item(self, block: Block, status: Status, *, empty: bool = False) -> OutputItem:
        name = self._item_id(block)
        if block.kind == "call":
            return OutputCall(
                id=name,
                status=status,
                call_id=block.call_id,
                name=block.name,
                arguments="" if empty else block.text,
            )
        part = self._part(block)
        if isinstance(part, OutputText):
            return OutputMessage(id=name, status=status, content=[] if empty else [part])
        return OutputReasoning(id=name, status=status, content=[] if empty else [part])

    def _part(self, block: Block) -> OutputText | ReasoningText:
        if block.kind == "text":
            return OutputText(text=block.text, logprobs=self._logprobs)
        return ReasoningText(text=block.text)

    def _response(self, status: Status) -> ResponseObject:
        body, sampling = self.body, self.job.sampling
        ended = status in ("completed", "incomplete")
        cut = status == "incomplete"
        items = [self._item(block, self._item_status(block)) for block in self.blocks.all]
        if status == "failed" and items:
            items[-1].status = "incomplete"
        return ResponseObject(
            id=self.id,
            created_at=self.created,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if cut else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            metadata=body.metadata or {},
            model=self.job.model,
            output=items,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            prompt_cache_key=body.prompt_cache_key,
            reasoning=body.reasoning or Reasoning(),
            safety_identifier=body.safety_identifier,
            service_tier=body.service_tier,
            temperature=sampling.temperature,
            text=body.text or TextConfig(format=TextFormat(type="text")),
            tool_choice=body.tool_choice or "auto",
            tools=[{"parameters": None, "strict": None} | tool for tool in body.tools or []],
            top_logprobs=body.top_logprobs or 0,
            top_p=sampling.top_p,
            truncation=body.truncation or "disabled",
            usage=self._usage() if ended else None,
            user=body.user,
        )

    def _usage(self) -> ResponseUsage:
        counter = self.job.counter
        usage = counter.usage()
        cached = usage.prompt_tokens_details
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            # Zero unless the operator lets cache hits be told.
            input_tokens_details=InputTokensDetails(
                cached_tokens=cached.cached_tokens if isinstance(cached, PromptTokensDetails) else 0
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=counter.num_reasoning),
            total_tokens=usage.total_tokens,
        )

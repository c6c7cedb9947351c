"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.async_llm import OutputStream
from jaxserve.frontend.parsers.types import ToolCallDelta
from jaxserve.server.answers import DONE, EventStream, event, respond
from jaxserve.server.body import read_object
from jaxserve.server.chat_job import ChatJob, Piece
from jaxserve.server.chat_protocol import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatCompletionRequest,
    ChunkChoice,
    FunctionCall,
    Message,
    ToolCall,
)
from jaxserve.server.context import Context
from jaxserve.server.logprobs import ChatLogprobs, chat_logprobs, prompt_logprobs
from jaxserve.server.schema import read
from jaxserve.server.submitting import request_name


async def chat_completions(request: Request) -> Response | EventStream:
    context = Context.of(request)
    data = await read_object(request, context.config.limits)
    body = read(ChatCompletionRequest, data, allow_unknown=context.config.allow_unknown_fields)
    job = await ChatJob.prepare(context, body)
    answer = _Answer(job, request_name(request, "chatcmpl", body.request_id), int(time.time()))
    stream = await job.submit(request, answer.name)
    return await respond(request, answer, stream, streamed=bool(body.stream))


@dataclass(slots=True)
class _Choice:
    """One choice as it grows."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, ToolCall] = field(default_factory=dict)
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] = field(default_factory=list)

    def add(self, delta_calls: tuple[ToolCallDelta, ...]) -> None:
        for delta in delta_calls:
            call = self.calls.get(delta.index)
            if call is None:
                call = self.calls[delta.index] = ToolCall(
                    id=delta.id or "", type="function", function=FunctionCall(name=delta.name or "")
                )
            call.function.arguments += delta.arguments


@dataclass(slots=True)
class _Answer:
    job: ChatJob
    name: str
    created: int

    async def whole(self, stream: OutputStream) -> ChatCompletion:
        body = self.job.body
        choices = [_Choice() for _ in range(body.n or 1)]
        done: list[ChatChoice] = []
        last: Piece | None = None
        async for piece in self.job.pieces(stream):
            last = piece
            choice = choices[piece.choice.index]
            choice.content += piece.delta.content
            choice.reasoning += piece.delta.reasoning
            choice.add(piece.delta.tool_calls)
            choice.token_ids += piece.choice.token_ids
            if (found := self._logprobs(piece)) is not None:
                content = [*((choice.logprobs and choice.logprobs.content) or []),
                           *(found.content or [])]  # fmt: skip
                choice.logprobs = ChatLogprobs(content=content)
            if piece.finish_reason is not None:
                done.append(self._finished(choice, piece))
        done.sort(key=lambda choice: choice.index)
        answer = ChatCompletion(
            id=self.name,
            created=self.created,
            model=self.job.model,
            choices=done,
            usage=self.job.counter.usage(),
            system_fingerprint=self.job.context.fingerprint,
        )
        if body.prompt_logprobs is not None and last is not None:
            answer.prompt_logprobs = prompt_logprobs(last.output.prompt_logprobs)
        if body.return_token_ids:
            answer.prompt_token_ids = list(self.job.prompt.token_ids)
        if body.return_prompt_text:
            answer.prompt_text = self.job.text
        return answer

    def _finished(self, choice: _Choice, piece: Piece) -> ChatChoice:
        calls = [choice.calls[index] for index in sorted(choice.calls)]
        content = self._echo + choice.content
        message = Message(
            role=self._role, content=content if content or not calls else None, refusal=None
        )
        if self.job.context.config.reasoning_parser is not None:
            message.reasoning = choice.reasoning or None
        if calls:
            message.tool_calls = calls
        result = ChatChoice(
            index=piece.choice.index,
            message=message,
            logprobs=choice.logprobs,
            finish_reason=piece.finish_reason,
            stop_reason=piece.choice.stop_reason,
        )
        if self.job.body.return_token_ids:
            result.token_ids = choice.token_ids
        return result

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes]:
        job, config = self.job, self.job.context.config
        force = config.enable_force_include_usage
        continuous = job.body.continuous_usage or force
        begun = False
        try:
            async for piece in job.pieces(stream):
                chunks = [] if begun else self._first_chunks()
                begun = True
                chunk = self._chunk(piece)
                for each in [*chunks, *([] if chunk is None else [chunk])]:
                    if continuous:
                        each.usage = job.counter.usage()
                    yield event(each)
            if job.body.include_usage or force:
                last = self._new_chunk([])
                last.usage = job.counter.usage()
                last.system_fingerprint = job.context.fingerprint
                yield event(last)
            yield DONE
        finally:
            stream.close()

    def _new_chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self.name, created=self.created, model=self.job.model, choices=choices)

    def _first_chunks(self) -> list[ChatChunk]:
        """The role of each choice, and what `echo` repeats."""
        chunks = [
            self._new_chunk([ChunkChoice(index=i, delta=Message(role=self._role, content=""))])
            for i in range(self.job.body.n or 1)
        ]
        if self.job.body.return_token_ids:
            chunks[0].prompt_token_ids = list(self.job.prompt.token_ids)
        if self._echo:
            chunks += [
                self._new_chunk([ChunkChoice(index=i, delta=Message(content=self._echo))])
                for i in range(self.job.body.n or 1)
            ]
        return chunks

    def _chunk(self, piece: Piece) -> ChatChunk | None:
        """None: nothing to tell yet."""
        body, delta = self.job.body, Message()
        if piece.delta.content:
            delta.content = piece.delta.content
        if piece.delta.reasoning:
            delta.reasoning = piece.delta.reasoning
        if piece.delta.tool_calls:
            delta.tool_calls = [_tool_call(call) for call in piece.delta.tool_calls]
        logprobs = self._logprobs(piece)
        empty = delta == Message() and logprobs is None and not body.return_token_ids
        if empty and piece.finish_reason is None:
            return None
        choice = ChunkChoice(
            index=piece.choice.index,
            delta=delta,
            logprobs=logprobs,
            finish_reason=piece.finish_reason,
        )
        if piece.finish_reason is not None:
            choice.stop_reason = piece.choice.stop_reason
        if body.return_token_ids:
            choice.token_ids = piece.choice.token_ids
        return self._new_chunk([choice])

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        body = self.job.body
        if not body.logprobs or body.include_reasoning is False:
            return None
        asked = body.return_tokens_as_token_ids
        as_ids = self.job.context.config.return_tokens_as_token_ids if asked is None else asked
        return chat_logprobs(piece.choice.logprobs or [], body.top_logprobs, as_ids=as_ids)

    @property
    def _role(self) -> str:
        body = self.job.body
        if body.add_generation_prompt is False or body.continue_final_message:
            return body.messages[-1]["role"]
        return self.job.context.config.response_role

    @property
    def _echo(self) -> str:
        """What `echo` puts in front: the last message, when it is the answer's beginning."""
        message = self.job.body.messages[-1]
        if not self.job.body.echo or message["role"] != self._role:
            return ""
        content = message.get("content")
        return content if isinstance(content, str) else ""


def _tool_call(call: ToolCallDelta) -> ToolCall:
    result = ToolCall(index=call.index, function=FunctionCall(arguments=call.arguments))
    if call.id is not None:
        result.id, result.type = call.id, "function"
    if call.name is not None:
        result.function.name = call.name
    return result

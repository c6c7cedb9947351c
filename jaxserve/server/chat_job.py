"""A conversation on its way through the engine, whichever API asked for it.

The chat, responses and messages routes all bring a `ChatCompletionRequest`; what comes back is a
series of `Piece`s, with reasoning, content and tool calls apart.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request

from jaxserve.async_llm import OutputStream
from jaxserve.errors import RequestError
from jaxserve.frontend.parsers.forced import JsonListParser, NamedToolParser
from jaxserve.frontend.parsers.output_parser import OutputParser
from jaxserve.frontend.parsers.tool_choice import tool_choice_schema
from jaxserve.frontend.parsers.tool_parser import ToolParser
from jaxserve.frontend.parsers.types import ParsedDelta
from jaxserve.frontend.prompts import ParsedPrompt
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.chat_protocol import REFUSED, ChatCompletionRequest
from jaxserve.server.context import Context
from jaxserve.server.errors import invalid
from jaxserve.server.fields import check_stream_options, refuse_unsupported, sampling_params
from jaxserve.server.messages import NamedToolChoice, check_messages, check_tools
from jaxserve.server.structured import structured_outputs
from jaxserve.server.submitting import priority_of, submit
from jaxserve.server.usage import Counter
from jaxserve.server_config import ServerConfig
from jaxserve.structured_outputs import StructuredOutputsParams


class Piece(NamedTuple):
    """What one output brought of one choice.

    Attributes:
        finish_reason: "tool_calls" where calls ended the answer, else the engine's.
    """

    delta: ParsedDelta
    choice: CompletionOutput
    output: RequestOutput
    finish_reason: str | None


@dataclass(slots=True)
class ChatJob:
    """A checked conversation, ready to be submitted."""

    body: ChatCompletionRequest
    context: Context
    text: str
    prompt: ParsedPrompt
    sampling: SamplingParams
    parsers: list[OutputParser | None]
    counter: Counter
    model: str
    _reasoning: defaultdict[int, str] = field(default_factory=lambda: defaultdict(str))

    @classmethod
    async def prepare(cls, context: Context, body: ChatCompletionRequest) -> "ChatJob":
        """Checks everything and renders the prompt.

        Raises:
            APIError, RequestError: Something is not allowed.
        """
        config = context.config
        model = context.check_model(body.model)
        check_stream_options(body)
        refuse_unsupported(body, REFUSED)
        check_messages(body.messages, config.limits)
        tool_parser = _tool_parser(body, config)
        text = await render_prompt(context, body)
        try:
            prompt = await context.llm.parse(
                text,
                add_special_tokens=bool(body.add_special_tokens),
                truncate_prompt_tokens=body.truncate_prompt_tokens,
                truncation_side=body.truncation_side or "left",
            )
        except RequestError as error:
            param = "messages" if error.param == "prompt" else error.param
            raise RequestError(str(error), param=param, code=error.code) from None
        schemas: dict[str, Mapping[str, Any]] = {
            tool.function.name: tool.function.parameters or {} for tool in body.tools or []
        }

        def parser() -> OutputParser | None:
            if tool_parser is None and config.reasoning_parser is None:
                return None
            return OutputParser(
                reasoning=config.reasoning_parser,
                tools=None if tool_parser is None else tool_parser(),
                tool_schemas=schemas,
                prompt_text=text,
                parallel_tool_calls=body.parallel_tool_calls is not False,
            )

        parsers = [parser() for _ in range(min(body.n or 1, config.limits.max_n))]
        return cls(
            body=body,
            context=context,
            text=text,
            prompt=prompt,
            sampling=_sampling(context, body, parsers[0]),
            parsers=parsers,
            counter=Counter(
                with_cached=config.enable_prompt_tokens_details,
                with_reasoning=config.reasoning_parser is not None,
            ),
            model=model,
        )

    async def submit(self, request: Request, name: str) -> OutputStream:
        """Starts the work; the caller closes the stream."""
        return await submit(
            request,
            self.context,
            [self.prompt],
            self.sampling,
            name=name,
            cache_salt=self.body.cache_salt,
            priority=priority_of(request, self.body.priority),
            stream_interval=self.body.stream_interval,
            form_field=self._form_field,
        )

    @property
    def _form_field(self) -> str:
        """What the output's form comes from, for errors."""
        if self.body.structured_outputs is not None:
            return "structured_outputs"
        return "tools" if self.body.response_format is None else "response_format"

    async def pieces(self, stream: OutputStream) -> AsyncGenerator[Piece]:
        """What comes, parsed; counts it, too. Each output may bring pieces of several choices."""
        async for index, output in stream:
            self.counter.add(index, output)
            for choice in output.outputs:
                yield self._piece(output, choice)

    def _piece(self, output: RequestOutput, choice: CompletionOutput) -> Piece:
        parser = self.parsers[choice.index]
        reason = choice.finish_reason
        if parser is None:
            return Piece(ParsedDelta(choice.text), choice, output, reason)
        delta = parser.feed(choice.text)
        if reason is not None:
            delta = _joined(delta, parser.finish())
        self._reasoning[choice.index] += delta.reasoning
        if reason is not None and self._reasoning[choice.index]:
            tokenizer = self.context.llm.get_tokenizer()
            text = self._reasoning[choice.index]
            self.counter.num_reasoning += len(tokenizer.encode(text, add_special_tokens=False))
        named = isinstance(self.body.tool_choice, NamedToolChoice)
        if reason == "stop" and parser.num_tool_calls and not named:
            reason = "tool_calls"
        if self.body.include_reasoning is False:
            delta = delta._replace(reasoning="")
        return Piece(delta, choice, output, reason)


def _joined(a: ParsedDelta, b: ParsedDelta) -> ParsedDelta:
    return ParsedDelta(
        a.content + b.content, a.reasoning + b.reasoning, a.tool_calls + b.tool_calls
    )


def _tool_parser(
    body: ChatCompletionRequest, config: ServerConfig
) -> Callable[[], str | ToolParser] | None:
    """Makes what reads the calls of a choice; None: calls are not looked for."""
    choice = body.tool_choice
    if body.tools is None:
        if choice not in (None, "none"):
            raise invalid("tool_choice needs tools; send both or neither", "tool_choice")
        return None
    check_tools(body.tools, choice, config.limits)
    if choice == "none":
        return None
    if choice == "required":
        return JsonListParser
    if isinstance(choice, NamedToolChoice):
        return partial(NamedToolParser, choice.function.name)
    if not config.enable_auto_tool_choice:
        raise invalid(
            "tool_choice auto needs a server started with --enable-auto-tool-choice and "
            "--tool-call-parser; use required, none, or name a function",
            "tool_choice",
            "unsupported_parameter",
        )
    return partial(str, config.tool_call_parser)


async def render_prompt(context: Context, body: ChatCompletionRequest) -> str:
    """A conversation as the model's template writes it.

    Raises:
        APIError, RequestError: The template refuses, or flags exclude each other.
    """
    if body.add_generation_prompt and body.continue_final_message:
        raise invalid(
            "add_generation_prompt and continue_final_message exclude each other; set the first "
            "to false to continue the last message",
            "continue_final_message",
        )
    kwargs = context.config.default_chat_template_kwargs | (body.chat_template_kwargs or {})
    if "chat_template" in kwargs:
        raise invalid(
            "a chat template comes from the model or the operator; leave it out",
            "chat_template",
            "unsupported_parameter",
        )
    if body.reasoning_effort is not None:
        kwargs = {
            "reasoning_effort": body.reasoning_effort,
            "enable_thinking": body.reasoning_effort != "none",
        } | kwargs
    hidden = body.tool_choice == "none" and context.config.exclude_tools_when_tool_choice_none
    tools = None
    if body.tools and not hidden:
        tools = [msgspec.to_builtins(tool) for tool in body.tools]
        for tool in tools:
            tool["function"] = {k: v for k, v in tool["function"].items() if v is not None}
    add = body.add_generation_prompt
    options: dict[str, Any] = {
        "tools": tools,
        "documents": body.documents,
        "add_generation_prompt": not body.continue_final_message if add is None else add,
        "continue_final_message": bool(body.continue_final_message),
    }
    # In a thread, for it waits for the process that renders.
    return await asyncio.to_thread(context.llm.client.render_text, body.messages, kwargs, **options)


def _leave_reasoning_free(
    context: Context, constraint: StructuredOutputsParams, parser: OutputParser
) -> None:
    """Has the form begin behind the reasoning, where there may be some."""
    if parser.reasoning_ahead is None:
        return
    start, ends = parser.reasoning_ahead
    tokenizer = context.llm.get_tokenizer()
    opener = tokenizer.encode(start, False)
    if len(opener) > 1:
        return  # the tag is no token of this model, which so does not reason by itself
    constraint.opened_by = opener[0] if opener else None
    constraint.start_after = tuple(tuple(tokenizer.encode(end, False)) for end in ends)


def _sampling(
    context: Context, body: ChatCompletionRequest, parser: OutputParser | None
) -> SamplingParams:
    limits = context.config.limits
    defaults = context.llm.client.processor.sampling_defaults
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    asked = body.max_completion_tokens
    if asked is not None and body.max_tokens not in (None, asked):
        raise invalid(
            f"max_tokens={body.max_tokens} and max_completion_tokens={asked} differ; send one",
            "max_tokens",
        )
    max_tokens = body.max_tokens if asked is None else asked
    if max_tokens is None:
        max_tokens = defaults.get("max_tokens")
    constraint = structured_outputs(body.response_format, body.structured_outputs)
    if body.tools and body.tool_choice not in (None, "none", "auto"):
        if constraint is not None:
            raise invalid(
                "response_format and a forced tool_choice exclude each other; send one",
                "tool_choice",
            )
        tools = [msgspec.to_builtins(tool) for tool in body.tools]
        choice = msgspec.to_builtins(body.tool_choice)
        schema = tool_choice_schema(tools, choice, body.parallel_tool_calls is not False)
        constraint = StructuredOutputsParams(json=schema)
    if constraint is not None and parser is not None:
        _leave_reasoning_free(context, constraint, parser)
    special = parser is not None and parser.needs_special_tokens
    return sampling_params(
        body,
        limits,
        defaults,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        structured_outputs=constraint,
        skip_special_tokens=False if special else None,
    )

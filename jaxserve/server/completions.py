"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.async_llm import OutputStream
from jaxserve.frontend.prompts import ParsedPrompt, Prompt
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.answers import DONE, EventStream, event, respond
from jaxserve.server.body import read_object
from jaxserve.server.context import Context
from jaxserve.server.errors import invalid
from jaxserve.server.fields import (
    NonNegative,
    NumLogprobs,
    SamplingFields,
    check_stream_options,
    refuse_unsupported,
    sampling_params,
)
from jaxserve.server.logprobs import (
    CompletionLogprobs,
    PromptLogprobsOut,
    completion_logprobs,
    prompt_logprobs,
)
from jaxserve.server.schema import read
from jaxserve.server.structured import structured_outputs
from jaxserve.server.submitting import priority_of, request_name, submit
from jaxserve.server.usage import Counter, Usage
from jaxserve.server_config import RequestLimits

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """A text to continue, or several."""

    prompt: str | list[Any]
    max_tokens: NonNegative | None = DEFAULT_MAX_TOKENS
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    best_of: NonNegative | None = None
    suffix: str | None = None
    prompt_embeds: str | list[str] | None = None


REFUSED: dict[str, tuple[Any, ...]] = {"suffix": (None, ""), "prompt_embeds": (None,)}


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobsOut | UnsetType | None = UNSET


class Completion(Struct, kw_only=True):
    """The answer, and with `usage` left out or null also a streamed piece of it."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType = UNSET


async def completions(request: Request) -> Response | EventStream:
    context = Context.of(request)
    limits = context.config.limits
    data = await read_object(request, limits)
    body = read(CompletionRequest, data, allow_unknown=context.config.allow_unknown_fields)
    job = _Job.of(request, context, body)
    prompts = [
        await context.llm.parse(
            prompt,
            add_special_tokens=body.add_special_tokens is not False,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            truncation_side=body.truncation_side or "left",
        )
        for prompt in _prompts(body, limits)
    ]
    job.prompts = prompts
    stream = await submit(
        request,
        context,
        prompts,
        _sampling(context, body),
        cache_salt=body.cache_salt,
        priority=priority_of(request, body.priority),
        name=job.name,
        stream_interval=body.stream_interval,
        form_field="response_format" if body.structured_outputs is None else "structured_outputs",
    )
    return await respond(request, job, stream, streamed=bool(body.stream))


def list_of_prompts(given: str | list[Any], limits: RequestLimits, param: str) -> list[Prompt]:
    """A string, strings, token ids, or lists of them, as a list of prompts.

    Raises:
        APIError: There are none or too many, or kinds are mixed.
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid(f"{param} is empty; send at least one token", param, "empty_array")
    if all(type(part) is int for part in given):
        return [given]
    if not all(isinstance(part, str) for part in given) and not all(
        isinstance(part, list) for part in given
    ):
        raise invalid(
            f"{param} mixes kinds; send a string, a list of strings, a list of token ids, or a "
            "list of such lists",
            param,
            "invalid_type",
        )
    if len(given) > limits.max_prompts:
        raise invalid(
            f"{param} has {len(given)} entries; use at most {limits.max_prompts}",
            param,
            "array_above_max_length",
        )
    return given


def _prompts(body: CompletionRequest, limits: RequestLimits) -> list[Prompt]:
    prompts = list_of_prompts(body.prompt, limits, "prompt")
    n = body.n or 1
    if len(prompts) * n > limits.max_sequences:
        raise invalid(
            f"{len(prompts)} prompts times n={n} is too much; at most {limits.max_sequences} "
            "outputs are allowed",
            "n",
            "integer_above_max_value",
        )
    return prompts


def _sampling(context: Context, body: CompletionRequest) -> SamplingParams:
    check_stream_options(body)
    refuse_unsupported(body, REFUSED)
    if body.best_of not in (None, body.n or 1):
        raise invalid(
            f"best_of={body.best_of} is not supported; leave it out, or set it to n",
            "best_of",
            "unsupported_parameter",
        )
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0:
        if not body.echo:
            raise invalid(
                "max_tokens=0 gives nothing; use at least 1, or echo: true",
                "max_tokens",
                "integer_below_min_value",
            )
        max_tokens = 1
    num_prompt = body.prompt_logprobs
    if body.echo and body.logprobs is not None and num_prompt is None:
        num_prompt = body.logprobs
    return sampling_params(
        body,
        context.config.limits,
        context.llm.client.processor.sampling_defaults,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=num_prompt,
        structured_outputs=structured_outputs(body.response_format, body.structured_outputs),
    )


@dataclass(slots=True)
class _Job:
    """One completion request on its way out."""

    body: CompletionRequest
    context: Context
    name: str
    model: str
    created: int
    counter: Counter
    prompts: list[ParsedPrompt] = field(default_factory=list)
    echoed: set[int] = field(default_factory=set)
    offsets: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request, context: Context, body: CompletionRequest) -> "_Job":
        return cls(
            body=body,
            context=context,
            name=request_name(request, "cmpl", body.request_id),
            model=context.check_model(body.model),
            created=int(time.time()),
            counter=Counter(with_cached=context.config.enable_prompt_tokens_details),
        )

    async def whole(self, stream: OutputStream) -> Completion:
        choices: list[CompletionChoice] = []
        async for index, output in stream:
            self.counter.add(index, output)
            choices += [self._choice(index, output, choice) for choice in output.outputs]
        choices.sort(key=lambda choice: choice.index)
        return Completion(
            id=self.name,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=self.counter.usage(),
            system_fingerprint=self.context.fingerprint,
        )

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes]:
        config = self.context.config
        force = config.enable_force_include_usage
        continuous = self.body.continuous_usage or force
        try:
            async for index, output in stream:
                self.counter.add(index, output)
                for choice in output.outputs:
                    chunk = Completion(
                        id=self.name,
                        created=self.created,
                        model=self.model,
                        choices=[self._choice(index, output, choice)],
                    )
                    if continuous:
                        chunk.usage = self.counter.usage()
                    yield event(chunk)
            if self.body.include_usage or force:
                yield event(
                    Completion(
                        id=self.name,
                        created=self.created,
                        model=self.model,
                        choices=[],
                        usage=self.counter.usage(),
                        system_fingerprint=self.context.fingerprint,
                    )
                )
            yield DONE
        finally:
            stream.close()

    def _choice(
        self, index: int, output: RequestOutput, choice: CompletionOutput
    ) -> CompletionChoice:
        body = self.body
        number = index * (body.n or 1) + choice.index
        first = number not in self.echoed
        self.echoed.add(number)
        echo = bool(body.echo) and first
        only_prompt = bool(body.echo) and body.max_tokens == 0
        text = "" if only_prompt else choice.text
        if echo and not body.return_token_ids:
            text = self._prompt_text(index) + text
        result = CompletionChoice(
            index=number,
            text=text,
            logprobs=self._logprobs(number, output, choice, echo=echo, only_prompt=only_prompt),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )
        if body.return_token_ids:
            result.token_ids = choice.token_ids
            if first:
                result.prompt_token_ids = output.prompt_token_ids
        if body.prompt_logprobs is not None:
            result.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return result

    def _prompt_text(self, index: int) -> str:
        prompt = self.prompts[index]
        if prompt.text is not None and self.body.truncate_prompt_tokens is None:
            return prompt.text
        return self.context.llm.get_tokenizer().decode(prompt.token_ids)

    def _logprobs(
        self,
        number: int,
        output: RequestOutput,
        choice: CompletionOutput,
        *,
        echo: bool,
        only_prompt: bool,
    ) -> CompletionLogprobs | None:
        num = self.body.logprobs
        if num is None:
            return None
        positions: list[Any] = []
        first_token = ""
        if echo and output.prompt_logprobs is not None:
            positions += output.prompt_logprobs
            tokenizer = self.context.llm.client.tokenizer
            if tokenizer is not None:
                first_token = tokenizer.decode_token(output.prompt_token_ids[0])
        if not only_prompt:
            positions += choice.logprobs or []
        as_ids = self._as_ids
        if as_ids:
            first_token = f"token_id:{output.prompt_token_ids[0]}"
        found = completion_logprobs(
            positions,
            num,
            offset=self.offsets.get(number, 0),
            as_ids=as_ids,
            first_token=first_token if echo else "",
        )
        if found.tokens:
            self.offsets[number] = found.text_offset[-1] + len(found.tokens[-1])
        return found

    @property
    def _as_ids(self) -> bool:
        asked = self.body.return_tokens_as_token_ids
        return self.context.config.return_tokens_as_token_ids if asked is None else asked

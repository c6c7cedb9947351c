"""Hands a request to the engine: its id, its priority, whose prefixes it may share."""

import uuid
from collections.abc import Sequence

from starlette.requests import Request

from jaxserve.async_llm import OutputStream
from jaxserve.errors import RequestError
from jaxserve.frontend.prompts import ParsedPrompt, checked_salt
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.context import Context
from jaxserve.server.errors import SHUTTING_DOWN, invalid, overloaded

MAX_PRIORITY = 2**31


def request_name(request: Request, kind: str, given: str | None, separator: str = "-") -> str:
    """The answer's id: `cmpl-` and the like, then the header's, the body's or a random one."""
    header = request.headers.get("x-request-id")
    scope_id = request.scope["state"]["request_id"]
    name = scope_id if header or given is None else given or uuid.uuid4().hex
    return f"{kind}{separator}{name}"


def priority_of(request: Request, given: int | None) -> int:
    """The body's priority, or the header's."""
    header = request.headers.get("x-priority", request.headers.get("x-vllm-priority"))
    if given is not None or header is None:
        return given or 0
    try:
        value = int(header)
    except ValueError:
        raise invalid("the X-Priority header is not a whole number", "priority") from None
    if abs(value) > MAX_PRIORITY:
        raise invalid(f"the X-Priority header is beyond {MAX_PRIORITY}", "priority")
    return value


async def submit(
    request: Request,
    context: Context,
    prompts: Sequence[ParsedPrompt],
    sampling: SamplingParams,
    *,
    name: str,
    cache_salt: str | None = None,
    priority: int = 0,
    stream_interval: int | None = None,
    pools: bool = False,
    form_field: str = "structured_outputs",
) -> OutputStream:
    """Starts the work of a request; the caller closes what comes back.

    Args:
        form_field: The field that the output's form comes from, for errors.

    Raises:
        APIError: 503 while the server is draining.
        RequestError: It is refused.
    """
    if context.draining:
        context.telemetry.metrics.reject("draining")
        raise overloaded("the server is shutting down; send this to another", SHUTTING_DOWN)
    try:
        await context.llm.prepare(sampling)
    except RequestError as error:  # of the grammar
        raise RequestError(str(error), param=form_field, code=error.code) from None
    salt = _salt(request, context, checked_salt(cache_salt))
    return context.llm.submit(
        [prompt._replace(cache_salt=salt) for prompt in prompts],
        sampling,
        request_id=name,
        priority=priority,
        stream_interval=stream_interval or context.config.stream_interval,
        pools=pools,
    )


def _salt(request: Request, context: Context, given: str | None) -> str | None:
    """Keys do not share prefixes, for how fast a prompt is tells whether someone has sent it."""
    tenant = request.scope["state"].get("tenant")
    if tenant is None or context.config.shared_prefix_cache:
        return given
    return f"{tenant}/{given or ''}"

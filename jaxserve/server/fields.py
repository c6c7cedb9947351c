"""The fields that completions and chat completions share, and how they become `SamplingParams`.

OpenAI's names, then vLLM's extensions. What has no effect by nature is accepted; what is known but
not supported is a 400 that says so.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.server.errors import invalid
from jaxserve.server_config import RequestLimits

NonNegative = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
NumLogprobs = Annotated[int, Meta(ge=-1)]  # -1: of the whole vocabulary
Name = Annotated[str, Meta(max_length=1024)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
INT64 = 2**63 - 1
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31)]
Seed = Annotated[int, Meta(ge=-INT64 - 1, le=INT64)]


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # no effect: nothing is padded


class SamplingFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's sampling fields and vLLM's."""

    model: Name | None = None
    n: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None

    # No effect here
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    # vLLM's
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    min_tokens: NonNegative | None = None
    stop_token_ids: list[NonNegative] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    prompt_logprobs: NumLogprobs | None = None
    allowed_token_ids: Annotated[list[NonNegative], Meta(min_length=1)] | None = None
    bad_words: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    priority: Priority | None = None
    request_id: Annotated[str, Meta(max_length=128)] | None = None
    session_id: Name | None = None  # no effect on one engine
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream_interval: Positive | None = None

    # Known, and refused unless they say what holds anyway
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    thinking_token_budget: int | None = None
    logprob_token_ids: list[int] | None = None
    repetition_detection: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    return_weight_versions: bool | None = None
    watermarking: bool | None = None
    lora_request: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        options = self.stream_options
        return self.include_usage and bool(options and options.continuous_usage_stats)


REFUSED: dict[str, tuple[Any, ...]] = {  # field: the values that change nothing
    "use_beam_search": (None, False),
    "length_penalty": (None, 1.0),
    "thinking_token_budget": (None, -1),
    "logprob_token_ids": (None, []),
    "repetition_detection": (None,),
    "vllm_xargs": (None, {}),
    "kv_transfer_params": (None, {}),
    "ec_transfer_params": (None, {}),
    "return_weight_versions": (None, False),
    "watermarking": (None, False),
    "lora_request": (None,),
}


def refuse_unsupported(request: Struct, further: dict[str, tuple[Any, ...]] | None = None) -> None:
    """Raises APIError, 400 unsupported_parameter, for what is known but not done here."""
    refuse(request, REFUSED | (further or {}))


def refuse(value: Struct, harmless: dict[str, tuple[Any, ...]], where: str = "") -> None:
    """The same of any object: each field may have its harmless values only.

    Args:
        where: The object's place in the request, such as `tools[0]`.
    """
    for name, values in harmless.items():
        if getattr(value, name, None) not in values:
            path = f"{where}.{name.removesuffix('_')}".removeprefix(".")
            raise invalid(f"{path} is not supported; leave it out", path, "unsupported_parameter")


def check_stream_options(request: SamplingFields) -> None:
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    if request.stream and request.prompt_logprobs:
        raise invalid("prompt_logprobs cannot be streamed; set stream to false", "prompt_logprobs")


def _check_limits(request: SamplingFields, limits: RequestLimits) -> None:
    n = request.n or 1
    if n > limits.max_n:
        raise invalid(f"n={n} is too large; use at most {limits.max_n}", "n",
                      "integer_above_max_value")  # fmt: skip
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > limits.max_stop_strings:
        raise invalid(
            f"stop has {len(stop)} strings; use at most {limits.max_stop_strings}",
            "stop",
            "array_above_max_length",
        )
    for text in stop:
        if not 1 <= len(text) <= limits.max_stop_chars:
            raise invalid(
                f"stop has a string of {len(text)} characters; use 1 to {limits.max_stop_chars}",
                "stop",
            )
    for name, most in (
        ("stop_token_ids", limits.max_stop_token_ids),
        ("logit_bias", limits.max_logit_bias),
        ("bad_words", limits.max_bad_words),
    ):
        size = len(getattr(request, name) or ())
        if size > most:
            raise invalid(f"{name} has {size} entries; use at most {most}", name)


def sampling_params(
    request: SamplingFields,
    limits: RequestLimits,
    defaults: dict[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    structured_outputs: Any = None,
    skip_special_tokens: bool | None = None,
) -> SamplingParams:
    """The request's parameters over the model's defaults, field by field.

    Raises:
        APIError: A limit of the server is passed.
        RequestError: A value is not allowed.
    """
    _check_limits(request, limits)
    given: dict[str, Any] = {
        name: getattr(request, name)
        for name in (
            "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop",
            "logit_bias", "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids",
            "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
            "spaces_between_special_tokens", "allowed_token_ids", "bad_words",
        )
    }  # fmt: skip
    if skip_special_tokens is not None:
        given["skip_special_tokens"] = skip_special_tokens
    if structured_outputs is not None:
        given["structured_outputs"] = structured_outputs
    values = {name: value for name, value in given.items() if value is not None}
    values = {k: v for k, v in defaults.items() if k != "max_tokens"} | values
    kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams.from_optional(
        **values,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        output_kind=kind,
    )

"""`SamplingParams`: how to choose each next token. vLLM's names, defaults and rules."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self

from jaxserve.errors import RequestError
from jaxserve.structured_outputs import StructuredOutputsParams

MAX_LOGIT_BIAS = 1024  # entries; fixed, because they live in device state of that width
MAX_BAD_WORDS = 128  # token sequences, counted after tokenization, as in vLLM
MAX_BAD_WORD_TOKENS = 32  # tokens in one of them
MAX_N = 16_384
GREEDY_BELOW = 1e-5  # temperatures below this are greedy
MIN_TEMPERATURE = 0.01  # positive temperatures below this are raised to it


class RequestOutputKind(Enum):
    """What each output of a stream holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # one output, at the end


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Logits are changed in this order: structured_outputs, allowed_token_ids, logit_bias, min_tokens,
    penalties (repetition, frequency, presence), bad_words, temperature, min_p, top_k, top_p. Draws
    depend on (seed, position, choice) only, never on what else is in the batch.

    Attributes:
        n: Outputs per prompt. More than one needs temperature > 0.
        presence_penalty: [-2, 2], once for each token already in the output.
        frequency_penalty: [-2, 2], for each occurrence in the output.
        repetition_penalty: > 0; 1 is off. Prompt and output (Keskar et al., 2019).
        temperature: [0, 2]; 0 is greedy.
        top_p: (0, 1], nucleus (Holtzman et al., 2019).
        top_k: 0 or -1 is off.
        min_p: [0, 1], relative to the most likely token (Nguyen et al., 2024).
        seed: Any int64; choice i of n uses seed + i. None or -1: drawn from the engine's seed.
        stop: Strings that end the output; at most once detokenized, across token borders.
        stop_token_ids: Tokens that end the output.
        ignore_eos: Go on past EOS.
        max_tokens: Output limit; None: up to the model's length.
        min_tokens: EOS and stop ids are masked until so many tokens are out.
        logprobs: Top N at each output position; -1 is the whole vocabulary.
        prompt_logprobs: The same for the prompt's positions.
        logit_bias: Token id to a number added to its logit.
        allowed_token_ids: Every other token is impossible.
        bad_words: Strings whose token sequences are never completed.
        structured_outputs: The form that the output must have, e.g. a JSON schema.

    Raises:
        RequestError: A value is of the wrong type or out of range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    extra_args: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop = list(self.stop or [])
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or []))
        self.bad_words = list(self.bad_words or [])
        if self.logprobs is True:
            self.logprobs = 1
        if self.prompt_logprobs is True:
            self.prompt_logprobs = 1
        if self.seed == -1:
            self.seed = None
        problem = next(_problems(self), None)
        if problem is not None:
            raise RequestError(problem[1], param=problem[0])
        if GREEDY_BELOW <= self.temperature < MIN_TEMPERATURE:
            self.temperature = MIN_TEMPERATURE
        if self.skip_reading_prefix_cache is None:
            self.skip_reading_prefix_cache = self.prompt_logprobs is not None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def clone(self) -> Self:
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)

    @classmethod
    def from_optional(cls, **given: Any) -> Self:
        """As the constructor, with None meaning the default, string keys in `logit_bias`, and its
        values clamped to [-100, 100], as requests over HTTP bring them."""
        values = {name: value for name, value in given.items() if value is not None}
        if "max_tokens" in given:
            values["max_tokens"] = given["max_tokens"]
        bias = values.get("logit_bias")
        if bias is not None:
            values["logit_bias"] = {
                _token_id(k): min(100.0, max(-100.0, v)) for k, v in bias.items()
            }
        return cls(**values)


def _token_id(key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError):
        raise RequestError(
            f"logit_bias key {key!r} is not a token id; use whole numbers", param="logit_bias"
        ) from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _problems(p: SamplingParams) -> Iterator[tuple[str, str]]:
    """Yields (field, sentence) for each thing that is wrong."""
    for name, low, high, rule in (
        ("presence_penalty", -2, 2, "between -2 and 2"),
        ("frequency_penalty", -2, 2, "between -2 and 2"),
        ("temperature", 0, 2, "between 0 and 2"),
        ("min_p", 0, 1, "between 0 and 1"),
        ("top_p", 0, 1, "more than 0 and at most 1"),
        ("repetition_penalty", 0, math.inf, "more than 0"),
    ):
        value = getattr(p, name)
        if (
            not _is_number(value)
            or not low <= value <= high
            or (value == 0 and name in ("top_p", "repetition_penalty"))
        ):
            yield name, f"{name}={value!r} is not allowed; use a number {rule}"
    for name, low, rule in (
        ("n", 1, "at least 1"),
        ("top_k", -1, "at least 1, or 0 or -1 for off"),
        ("min_tokens", 0, "at least 0"),
    ):
        value = getattr(p, name)
        if not _is_int(value) or value < low:
            yield name, f"{name}={value!r} is not allowed; use a whole number of {rule}"
    if _is_int(p.n) and p.n > MAX_N:
        yield "n", f"n={p.n} is too large; use at most {MAX_N}"
    for name, low, rule in (
        ("max_tokens", 1, "at least 1, or None for the model's limit"),
        ("logprobs", -1, "at least 0, or -1 for the whole vocabulary"),
        ("prompt_logprobs", -1, "at least 0, or -1 for the whole vocabulary"),
    ):
        value = getattr(p, name)
        if value is not None and (not _is_int(value) or value < low):
            yield name, f"{name}={value!r} is not allowed; use a whole number of {rule}"
    if p.seed is not None and (not _is_int(p.seed) or not -(2**63) <= p.seed < 2**63):
        yield "seed", f"seed={p.seed!r} is not allowed; use a 64-bit integer"
    if _is_int(p.max_tokens) and _is_int(p.min_tokens) and p.min_tokens > (p.max_tokens or 0):
        yield "min_tokens", f"min_tokens={p.min_tokens} is more than max_tokens={p.max_tokens}"
    if _is_int(p.n) and p.n > 1 and _is_number(p.temperature) and p.greedy:
        yield "n", f"n={p.n} with temperature 0 gives n equal outputs; use n=1 or a temperature"
    for name in ("stop", "bad_words"):
        value = getattr(p, name)
        if any(not isinstance(s, str) or not s for s in value):
            yield name, f"{name}={value!r} is not allowed; use non-empty strings"
    if p.stop and not p.detokenize:
        yield "stop", "stop strings need detokenize=True; use stop_token_ids instead"
    for name in ("stop_token_ids", "allowed_token_ids"):
        value = getattr(p, name)
        if value is not None and any(not _is_int(i) or i < 0 for i in value):
            yield name, f"{name} holds something that is not a token id; use whole numbers from 0"
    if p.allowed_token_ids is not None and not p.allowed_token_ids:
        yield (
            "allowed_token_ids",
            "allowed_token_ids=[] allows nothing; leave it out or name tokens",
        )
    if p.structured_outputs is not None and not isinstance(
        p.structured_outputs, StructuredOutputsParams
    ):
        came = type(p.structured_outputs).__name__
        yield "structured_outputs", f"structured_outputs is a {came}; use StructuredOutputsParams"
    if p.extra_args:
        yield "extra_args", "extra_args is for plugins, and there are none here; leave it out"
    if p.logit_bias is not None:
        if any(not _is_int(k) or k < 0 or not _is_number(v) for k, v in p.logit_bias.items()):
            yield "logit_bias", "logit_bias must map token ids (whole numbers from 0) to numbers"
        if len(p.logit_bias) > MAX_LOGIT_BIAS:
            yield (
                "logit_bias",
                f"logit_bias has {len(p.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed",
            )


@dataclass(slots=True, kw_only=True)
class BeamSearchParams:
    """Beam search: `beam_width` hypotheses, ranked by log-probability over length ** penalty."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: list[int] | None = field(default=None)

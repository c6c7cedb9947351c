"""What crosses between the frontend and the engine. Pure data: no JAX."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxserve.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an output must match, compiled once already, so that it is known to be sound."""

    text: str  # as llguidance reads it
    start_after: tuple[
        tuple[int, ...], ...
    ] = ()  # what free text may end with; empty: no such text
    opened_by: int | None = None  # the token that free text begins with; None: any


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue, fully resolved: every default is filled in, every id is in range."""

    request_id: str  # unique among live requests
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int  # resolved: prompt + max_tokens <= max_model_len, unless it pools
    eos_token_id: int | None  # None when ignore_eos
    stop_token_ids: tuple[int, ...] = ()  # the user's and the generation config's
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    seed: int = 0  # of choice 0; choice i uses seed + i. Resolved: the engine's RNG when None
    cache_salt: str | None = None  # prefixes are shared only between equal salts
    adapter: str | None = None
    priority: int = 0  # lower runs first under the priority policy
    arrival_s: float = 0.0  # time.monotonic()
    grammar: Grammar | None = None
    pools: bool = False  # ends with the hidden state of its last token, instead of a new one
    needs_host_tokens: bool = False  # sits out a step until the host has seen its newest token


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Ends a request, or one choice of it, and frees its blocks at once.

    With `finished` the client completed the choice itself (a stop string was found), so it counts
    as finished and not as aborted. No further delta is sent for what is ended here.
    """

    request_id: str
    choice: int | None = None  # None: all choices
    finished: bool = False


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: the chosen token first, then the top N by rank."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int  # of the chosen token: the number of logits >= its own, so 1 is best


class RequestTimes(NamedTuple):
    arrival_s: float = 0.0
    scheduled_s: float = 0.0  # first step that computed any of it
    first_token_s: float = 0.0
    last_token_s: float = 0.0


class TokenDelta(NamedTuple):
    """New tokens of one choice of a request. Times are `time.monotonic()` seconds.

    A NamedTuple because 256 of these are built each step.
    """

    request_id: str
    choice: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # whole prompt, first delta
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id that ended it, if not EOS
    error: str | None = None  # set when finish_reason is "error"
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    times: RequestTimes = RequestTimes()
    pooled: np.ndarray | None = None  # [D] float32, of a request that pools

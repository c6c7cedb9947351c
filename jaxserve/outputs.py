"""What the Python API returns: vLLM's output classes, field by field."""

from dataclasses import dataclass, field

import numpy as np

from jaxserve.request import RequestTimes


@dataclass(slots=True)
class Logprob:
    """One token's log-probability; `rank` is 1 for the most likely."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# One dict a position, token id -> Logprob, the chosen token first.
SampleLogprobs = list[dict[int, Logprob]]
PromptLogprobs = list[dict[int, Logprob] | None]


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: object | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request's state: its prompt, its choices, and whether all of them have ended."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestTimes | None = None
    lora_request: object | None = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None
    kv_transfer_params: dict[str, object] | None = field(default=None)
    pooled: np.ndarray | None = None  # [D] float32: the last token's hidden state, if asked for


@dataclass(slots=True)
class EmbeddingOutput:
    """A text as a vector of length 1."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What `embed` returns for a prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int | None = None
    finished: bool = True


@dataclass(slots=True)
class BeamSearchSequence:
    """One hypothesis: prompt and output tokens, and the sum of the output's log-probabilities."""

    tokens: list[int]
    cum_logprob: float
    text: str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The hypotheses of one prompt, best first."""

    sequences: list[BeamSearchSequence]

"""Streamed conversations over one `AsyncLLM`, with the figures of each."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxserve.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxserve.async_llm import AsyncLLM

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one streamed answer took."""

    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, from the prefix cache
    num_output_tokens: int
    finish_reason: str
    ttft_s: float  # from the request to its first token
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """After the first token; 0 if there was one only."""
        decode_s = self.total_s - self.ttft_s
        return (self.num_output_tokens - 1) / decode_s if self.num_output_tokens > 1 else 0.0

    def line(self) -> str:
        """All of it for people."""
        return (
            f"[{self.num_prompt_tokens} tokens in, {self.num_cached_tokens} of them cached, "
            f"{self.num_output_tokens} out, {self.finish_reason}; first after "
            f"{self.ttft_s * 1000:.0f} ms, then {self.tokens_per_s:.1f} tokens/s]"
        )


class Streamer:
    """Answers conversations piece by piece; cancelling an answer aborts its request."""

    def __init__(self, llm: "AsyncLLM") -> None:
        self.llm = llm
        self._ids = itertools.count()

    @property
    def default_sampling(self) -> SamplingParams:
        return self.llm.get_default_sampling_params()

    async def stream(
        self, sampling: SamplingParams, messages: Messages, write: Callable[[str], None]
    ) -> Figures:
        """Calls `write` with each new piece of the answer.

        Raises:
            RequestError: The request cannot be served.
        """
        sampling = replace(sampling, output_kind=RequestOutputKind.DELTA)
        start = time.perf_counter()
        first: float | None = None
        num_prompt = num_cached = num_output = 0
        reason = ""
        stream = self.llm.chat([*messages], sampling, request_id=f"chat-{next(self._ids)}")
        async with aclosing(stream):
            async for output in stream:
                choice = output.outputs[0]
                if choice.token_ids and first is None:
                    first = time.perf_counter()
                num_prompt = len(output.prompt_token_ids) or num_prompt
                num_cached = max(num_cached, output.num_cached_tokens or 0)
                num_output += len(choice.token_ids)
                reason = choice.finish_reason or reason
                if choice.text:
                    write(choice.text)
        end = time.perf_counter()
        return Figures(
            num_prompt_tokens=num_prompt,
            num_cached_tokens=num_cached,
            num_output_tokens=num_output,
            finish_reason=reason,
            ttft_s=(first or end) - start,
            total_s=end - start,
        )

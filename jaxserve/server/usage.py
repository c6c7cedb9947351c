"""Token counts of a request, as answers tell them."""

from dataclasses import dataclass, field

from msgspec import UNSET, Struct, UnsetType

from jaxserve.outputs import RequestOutput


class PromptTokensDetails(Struct, kw_only=True):
    cached_tokens: int = 0


class CompletionTokensDetails(Struct, kw_only=True):
    reasoning_tokens: int = 0


class Usage(Struct, kw_only=True):
    """Tokens in and out; the token that ended an output counts."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


@dataclass(slots=True)
class Counter:
    """Counts while outputs come: a prompt once, the tokens of its choices all."""

    with_cached: bool
    with_reasoning: bool = False
    num_output: int = 0
    num_reasoning: int = 0
    _prompts: dict[int, int] = field(default_factory=dict)
    _cached: dict[int, int] = field(default_factory=dict)

    def add(self, index: int, output: RequestOutput) -> None:
        """Counts one output of the prompt at `index`, with only what is new in it."""
        self._prompts[index] = len(output.prompt_token_ids)
        self._cached[index] = output.num_cached_tokens or 0
        self.num_output += sum(len(choice.token_ids) for choice in output.outputs)

    def usage(self) -> Usage:
        num_prompt = sum(self._prompts.values())
        cached = PromptTokensDetails(cached_tokens=sum(self._cached.values()))
        reasoning = CompletionTokensDetails(reasoning_tokens=self.num_reasoning)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self.num_output,
            total_tokens=num_prompt + self.num_output,
            prompt_tokens_details=cached if self.with_cached else UNSET,
            completion_tokens_details=reasoning if self.with_reasoning else UNSET,
        )

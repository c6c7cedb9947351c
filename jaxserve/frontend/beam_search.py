"""Beam search over a function that gives the next token's log-probabilities.

As in vLLM: every live beam is extended by the `2 * beam_width` most likely tokens, the best
`beam_width` live on, and beams that reach EOS are set aside; the score is the summed
log-probability over (all tokens, prompt included, EOS not) ** length_penalty.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxserve.outputs import BeamSearchOutput, BeamSearchSequence, Logprob
from jaxserve.sampling_params import BeamSearchParams

# Token sequences -> for each, the candidates of its next token.
type NextTokens = Callable[[list[list[int]]], list[dict[int, Logprob]]]


@dataclass(slots=True)
class _Search:
    """The beams of one prompt."""

    num_prompt_tokens: int
    live: list[BeamSearchSequence]
    ended: list[BeamSearchSequence] = field(default_factory=list)


def beam_score(beam: BeamSearchSequence, eos_token_id: int | None, length_penalty: float) -> float:
    """Summed log-probability over length ** penalty; EOS does not count as length."""
    length = len(beam.tokens)
    if length > 1 and beam.tokens[-1] == eos_token_id:
        length -= 1
    return beam.cum_logprob / length**length_penalty


def beam_search(
    prompts: Sequence[Sequence[int]],
    params: BeamSearchParams,
    next_tokens: NextTokens,
    *,
    eos_token_id: int | None,
    max_model_len: int,
) -> list[BeamSearchOutput]:
    """Search from each prompt; all prompts and beams advance together, token by token.

    Returns:
        One output a prompt, its `beam_width` best sequences first to last, prompt included.
    """

    def score(beam: BeamSearchSequence) -> float:
        return beam_score(beam, eos_token_id, params.length_penalty)

    allowed = None if params.allowed_token_ids is None else set(params.allowed_token_ids)
    searches = [_Search(len(prompt), [BeamSearchSequence(list(prompt), 0.0)]) for prompt in prompts]
    for _ in range(params.max_tokens):
        for search in searches:  # a beam as long as the context ends here
            full = [beam for beam in search.live if len(beam.tokens) >= max_model_len]
            search.ended += full
            search.live = [beam for beam in search.live if len(beam.tokens) < max_model_len]
        beams = [beam for search in searches for beam in search.live]
        if not beams:
            break
        candidates = iter(next_tokens([beam.tokens for beam in beams]))
        for search in searches:
            grown: list[BeamSearchSequence] = []
            for beam in search.live:
                for token_id, logprob in next(candidates).items():
                    if allowed is not None and token_id not in allowed:
                        continue
                    new = BeamSearchSequence(
                        [*beam.tokens, token_id], beam.cum_logprob + logprob.logprob
                    )
                    ends = token_id == eos_token_id and not params.ignore_eos
                    (search.ended if ends else grown).append(new)
            search.live = sorted(grown, key=score, reverse=True)[: params.beam_width]
    return [
        BeamSearchOutput(
            sorted(search.ended + search.live, key=score, reverse=True)[: params.beam_width]
        )
        for search in searches
    ]

"""Log-probabilities in the forms of completions, of chat completions, and of prompts."""

from collections.abc import Mapping, Sequence
from itertools import islice

from msgspec import Struct

from jaxserve.outputs import Logprob, PromptLogprobs, SampleLogprobs

FLOOR = -9999.0  # stands for -inf, which JSON has not


class CompletionLogprobs(Struct, kw_only=True):
    """Of /v1/completions: four lists with an entry a token."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class ChatLogprob(Struct, kw_only=True):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatTokenLogprob(ChatLogprob, kw_only=True):
    top_logprobs: list[ChatLogprob] = []


class ChatLogprobs(Struct, kw_only=True):
    """Of /v1/chat/completions."""

    content: list[ChatTokenLogprob] | None = None
    refusal: list[ChatTokenLogprob] | None = None


class PromptLogprob(Struct, kw_only=True):
    """One token of `prompt_logprobs`, which is vLLM's."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


type PromptLogprobsOut = list[dict[str, PromptLogprob] | None]


def _floor(value: float) -> float:
    return max(value, FLOOR)


def _name(token_id: int, entry: Logprob, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else entry.decoded_token or ""


def completion_logprobs(
    positions: Sequence[Mapping[int, Logprob] | None],
    num: int,
    *,
    offset: int = 0,
    as_ids: bool = False,
    first_token: str = "",
) -> CompletionLogprobs:
    """Positions as /v1/completions writes them, the chosen token and the top `num` of each.

    Args:
        positions: None for the first token of a prompt, which has none.
        num: -1: all.
        offset: Characters in front, of the tokens' texts.
        as_ids: Write `token_id:N` for a token's text.
        first_token: Text of a position that is None.
    """
    result = CompletionLogprobs()
    most = None if num == -1 else num + 1
    for position in positions:
        result.text_offset.append(offset)
        if not position:
            result.tokens.append(first_token)
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            offset += len(first_token)
            continue
        token_id, chosen = next(iter(position.items()))
        token = _name(token_id, chosen, as_ids)
        result.tokens.append(token)
        result.token_logprobs.append(_floor(chosen.logprob))
        result.top_logprobs.append(
            {
                _name(i, entry, as_ids): _floor(entry.logprob)
                for i, entry in islice(position.items(), most)
            }
        )
        offset += len(token)
    return result


def chat_logprobs(
    positions: SampleLogprobs, num: int | None, *, as_ids: bool = False
) -> ChatLogprobs:
    """Positions as chat completions write them: the first `num` entries, the chosen one first.

    Args:
        num: -1: all.
    """
    content: list[ChatTokenLogprob] = []
    most = None if num == -1 else num or 0
    for position in positions:
        entries = [
            ChatLogprob(
                token=_name(i, entry, as_ids),
                logprob=_floor(entry.logprob),
                bytes=list((entry.decoded_token or "").encode("utf-8", "replace")),
            )
            for i, entry in islice(
                position.items(), max(1, len(position) if most is None else most)
            )
        ]
        first = entries[0]
        content.append(
            ChatTokenLogprob(
                token=first.token,
                logprob=first.logprob,
                bytes=first.bytes,
                top_logprobs=entries[:most],
            )
        )
    return ChatLogprobs(content=content)


def prompt_logprobs(positions: PromptLogprobs | None) -> PromptLogprobsOut | None:
    """vLLM's `prompt_logprobs`: a map from token id for each position, null for the first."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(i): PromptLogprob(
                logprob=_floor(entry.logprob), rank=entry.rank, decoded_token=entry.decoded_token
            )
            for i, entry in position.items()
        }
        for position in positions
    ]

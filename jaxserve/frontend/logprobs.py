"""Log-probabilities as the API returns them: a dict a position, with each token's text."""

from collections.abc import Sequence
from itertools import islice

from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.outputs import Logprob, PromptLogprobs
from jaxserve.request import TokenLogprobs

_REPLACEMENT = "\ufffd"
_MAX_CONTEXT = 4  # tokens: the most that one character's UTF-8 bytes can be spread over


def decode_in_context(tokenizer: Tokenizer, token_id: int, before: Sequence[int]) -> str:
    """Text of a token; a token that completes a character gets the character, others ""."""
    text = tokenizer.decode_token(token_id)
    if not text.endswith(_REPLACEMENT):
        return text
    for num in range(1, min(len(before), _MAX_CONTEXT) + 1):
        context = list(before[len(before) - num :])
        full = tokenizer.decode([*context, token_id])
        if full.endswith(_REPLACEMENT):
            continue
        # What the context says before the character that this token completes.
        clean = len(context)
        while clean and tokenizer.decode_token(context[clean - 1]).endswith(_REPLACEMENT):
            clean -= 1
        prefix = tokenizer.decode(context[:clean]) if clean else ""
        return full.removeprefix(prefix)
    return ""


def to_logprobs(
    entry: TokenLogprobs, tokenizer: Tokenizer | None, before: Sequence[int]
) -> dict[int, Logprob]:
    """One position: the chosen token first, with its rank, then ranks 1, 2, ...

    Args:
        entry: From the engine.
        tokenizer: None: no text.
        before: The token ids in front of this position.
    """
    result: dict[int, Logprob] = {}
    for i, (token_id, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
        if token_id in result:
            continue  # the chosen token is among the top ones, too
        text = None if tokenizer is None else decode_in_context(tokenizer, token_id, before)
        result[token_id] = Logprob(logprob, entry.rank if i == 0 else i, text)
    return result


def to_prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], tokenizer: Tokenizer | None, prompt: Sequence[int]
) -> PromptLogprobs:
    """All positions of a prompt; the first has none."""
    return [
        None
        if entry is None
        else to_logprobs(entry, tokenizer, list(islice(prompt, max(0, i - _MAX_CONTEXT), i)))
        for i, entry in enumerate(entries)
    ]

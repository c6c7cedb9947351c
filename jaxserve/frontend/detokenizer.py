"""Tokens to text, one at a time, and the search for stop strings in that text.

A character may be spread over several tokens: its bytes are withheld until it is complete. Stop
strings are searched in the text, so they may span tokens.
"""

from collections.abc import Sequence

from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.sampling_params import SamplingParams

_REPLACEMENT = "\ufffd"  # what bytes that are not UTF-8 decode to
_MIN_PRIMING, _MAX_PRIMING = 4, 24  # tokens of the prompt


def find_stop(
    text: str, num_new_chars: int, stop: Sequence[str], include_in_output: bool
) -> tuple[str, int] | None:
    """The stop string that ends earliest in the last `num_new_chars`, and the text's new length.

    Ties go to the one that is first in `stop`. Without `include_in_output` the text ends before
    the stop string, with it right after.
    """
    best: tuple[int, str] | None = None
    if num_new_chars > 0:
        for string in stop:
            # The match must end within the new characters; what is before was searched already.
            start = text.find(string, max(0, len(text) - num_new_chars - len(string) + 1))
            if start >= 0 and (best is None or start + len(string) < best[0]):
                best = start + len(string), string
    if best is None:
        return None
    end, string = best
    return string, end if include_in_output else end - len(string)


def priming_tokens(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The end of the prompt, from a place where a character begins.

    The text of a token can depend on the tokens before it (a space at the start, a character begun
    in the prompt), but only on the last few.
    """
    shortest = min(len(prompt), _MIN_PRIMING)
    for num in range(shortest, min(len(prompt), _MAX_PRIMING) + 1):
        tail = list(prompt[len(prompt) - num :])
        if not tokenizer.decode(tail).startswith(_REPLACEMENT):
            return tail
    return list(prompt[-_MAX_PRIMING:])


class Detokenizer:
    """The growing text of one choice.

    Attributes:
        text: What is decoded so far, cut at a stop string once one is found.
    """

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, priming: Sequence[int] = ()
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend
        self._stop = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or []
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._num_sent = 0  # characters
        # So many characters could yet turn out to belong to a stop string.
        self._num_held = 0
        if self._stop and not self._include_stop:
            self._num_held = max(map(len, self._stop)) - 1
        # Without spaces between special tokens, a run of them is written as the vocabulary has it.
        self._joined: frozenset[int] = frozenset()
        if not (sampling.skip_special_tokens or sampling.spaces_between_special_tokens):
            self._joined = frozenset(self._backend.get_added_tokens_decoder())
        self._last_joined = False
        self._step = tokenizer.pieces.text(sampling.skip_special_tokens).push
        for token_id in priming:
            self._step(token_id)

    def add(self, token_ids: Sequence[int], *, ended_by_token: bool) -> tuple[int, str | None]:
        """Take new tokens.

        Args:
            token_ids: In order.
            ended_by_token: The last one is EOS or a stop token; its text is left out unless
                include_stop_str_in_output.

        Returns:
            How many of the tokens belong to the output, and the stop string that ended it.
        """
        hidden = len(token_ids) - 1 if ended_by_token and not self._include_stop else -1
        for i, token_id in enumerate(token_ids):
            self._num_tokens += 1
            if i == hidden:
                continue
            new = self._decode(token_id)
            self.text += new
            if self._stop and self._num_tokens > self._min_tokens:
                found = find_stop(self.text, len(new), self._stop, self._include_stop)
                if found is not None:
                    string, length = found
                    self.text = self.text[:length]
                    return i + 1, string
        return len(token_ids), None

    def visible(self, finished: bool) -> str:
        """The text without the characters that are held back."""
        held = 0 if finished else self._num_held
        return self.text[: len(self.text) - held] if held < len(self.text) else ""

    def take(self, finished: bool) -> str:
        """The visible text that was not taken before."""
        visible = self.visible(finished)
        new = visible[self._num_sent :]
        self._num_sent = max(self._num_sent, len(visible))
        return new

    def _decode(self, token_id: int) -> str:
        new = self._step(token_id)
        if self._joined:
            joined = token_id in self._joined
            if joined and self._last_joined:
                new = self._backend.id_to_token(token_id) or new
            self._last_joined = joined
        return new

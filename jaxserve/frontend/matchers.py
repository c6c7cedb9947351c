"""Matchers: where an output stands in its grammar, and which tokens may come next (llguidance)."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.frontend.grammar_compiler import Vocabulary, require_llguidance
from jaxserve.frontend.grammar_worker import make_matcher, make_tokenizer


class MatcherFactory:
    """Makes matchers for one vocabulary. Thread-safe.

    Attributes:
        num_words: uint32 words of a mask, one bit a token.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: Any = None
        self._lock = threading.Lock()
        self.num_words = -(-vocabulary.num_tokens // 32)

    def start(self) -> None:
        """Builds what all matchers share. It takes a second, and holds the interpreter's lock."""
        with self._lock:
            if self._tokenizer is None:
                require_llguidance()
                v = self._vocabulary
                self._tokenizer = make_tokenizer(
                    v.tokenizer_json(), v.num_tokens, list(v.end_token_ids)
                )

    def make(self, grammar: str) -> "Matcher":
        """A matcher at the start of a grammar.

        Raises:
            ValueError: The grammar is not sound.
        """
        self.start()
        matcher = Matcher(
            make_matcher(self._tokenizer, grammar), frozenset(self._vocabulary.end_token_ids)
        )
        matcher.check()
        return matcher


class Matcher:
    """One output's place in a grammar. Its calls release the interpreter's lock.

    Attributes:
        ended: An end token was accepted; nothing follows.
    """

    def __init__(self, matcher: Any, end_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._end_token_ids = end_token_ids
        self.ended = False

    @property
    def may_end(self) -> bool:
        """Whether what was accepted is complete."""
        return self._matcher.is_accepting()

    def copy(self) -> "Matcher":
        """Another one at the same place."""
        return Matcher(self._matcher.deep_copy(), self._end_token_ids)

    def accept(self, token_ids: Sequence[int]) -> None:
        """Goes on by tokens.

        Raises:
            ValueError: One is not allowed, or a limit is met.
        """
        for token_id in token_ids:
            self._matcher.consume_token(token_id)
            self.check()
            self.ended = self.ended or token_id in self._end_token_ids

    def fill(self, words: np.ndarray) -> None:
        """Writes the mask of the tokens that may follow: uint32 [num_words], bit i of word i // 32.

        Raises:
            ValueError: A limit is met.
        """
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self.check()

    def check(self) -> None:
        """Raises ValueError if the matcher has failed; it stays so then."""
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error() or "the grammar failed")

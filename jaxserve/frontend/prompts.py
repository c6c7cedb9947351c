"""Prompts in all their forms, as checked token ids.

JAX clamps or drops indices that are out of range without a word, so every token id that a user
names is checked here, on the host.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np

from jaxserve.errors import RequestError, UnsupportedError
from jaxserve.frontend.tokenizer import Tokenizer

MAX_SALT_CHARS = 128
_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
_UNSUPPORTED_KEYS = {
    "multi_modal_data", "mm_processor_kwargs", "multi_modal_uuids", "prompt_embeds",
    "encoder_prompt", "decoder_prompt",
}  # fmt: skip

type Prompt = str | Sequence[int] | Mapping[str, Any]


class ParsedPrompt(NamedTuple):
    """A prompt as tokens. `text` is None for a prompt that came as token ids."""

    text: str | None
    token_ids: tuple[int, ...]
    cache_salt: str | None


def is_token_ids(value: Any) -> TypeGuard[Sequence[int]]:
    """Whether a value is one prompt of token ids: a non-empty sequence that begins with a number.

    What follows is checked, and complained of, by `PromptReader.read`.
    """
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.number)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence) or not value:
        return False
    return isinstance(value[0], int | float | np.number)


class PromptReader:
    """Reads prompts for one model.

    Args:
        tokenizer: None: prompts must be token ids.
        vocab_size: Of the model; ids must be below it.
        max_model_len: Tokens, prompt and output together.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len

    def read(
        self,
        prompt: Prompt,
        *,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
        truncation_side: Literal["left", "right"] = "left",
        pools: bool = False,
    ) -> ParsedPrompt:
        """Any form of prompt as tokens, checked.

        Args:
            prompt: Text, token ids, or {"prompt" or "prompt_token_ids", "cache_salt"}.
            add_special_tokens: Let the tokenizer add its begin token; not for rendered chats.
            truncate_prompt_tokens: Keep the last N; -1: all that leave room for one output token.
            truncation_side: Where tokens are cut off; "right" keeps the first N.
            pools: No token comes out, so none needs room; -1 keeps as many as the model takes.
        """
        salt = None
        text: str | None = None
        source: Any = prompt
        if isinstance(prompt, Mapping):
            source, text, salt = _open_mapping(prompt)
        if isinstance(source, str):
            text = source
            limit = None if truncate_prompt_tokens is not None else self.max_model_len
            ids = self._tokenize(source, add_special_tokens, limit)
        else:
            ids = self._checked_ids(source)
        if truncate_prompt_tokens is not None:
            kept = self._kept(truncate_prompt_tokens, num_output=0 if pools else 1)
            ids = ids[-kept:] if truncation_side == "left" else ids[:kept]
        if not ids:
            raise RequestError(
                "the prompt is empty; send at least one token", param="prompt", code="invalid_value"
            )
        self._check_length(len(ids), num_output=0 if pools else 1)
        return ParsedPrompt(text, ids, checked_salt(salt))

    def _tokenize(self, text: str, add_special_tokens: bool, limit: int | None) -> tuple[int, ...]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError(
                "the prompt is text, but skip_tokenizer_init is set; send prompt_token_ids",
                param="prompt",
            )
        # Far too long is refused before the work of tokenizing it.
        if limit is not None and len(text) > 1024 + 2 * limit * tokenizer.max_token_chars:
            raise self._too_long(f"at least {len(text) // tokenizer.max_token_chars}")
        ids = tokenizer.encode(text, add_special_tokens)
        if ids and max(ids) >= self.vocab_size:
            bad = next(i for i in ids if i >= self.vocab_size)
            raise RequestError(
                f"the prompt holds the token {tokenizer.convert_ids_to_tokens(bad)!r} (id {bad}), "
                f"for which this model of {self.vocab_size} tokens has no embedding; leave it out",
                param="prompt",
            )
        return tuple(ids)

    def _checked_ids(self, source: Any) -> tuple[int, ...]:
        if isinstance(source, np.ndarray):
            source = source.tolist() if source.ndim == 1 else None
        if isinstance(source, bytes | Mapping) or not isinstance(source, Sequence):
            raise RequestError(
                f"the prompt is a {type(source).__name__}; send a string, a list of token ids, or "
                "an object with prompt or prompt_token_ids",
                param="prompt",
                code="invalid_type",
            )
        ids = tuple(source)
        if not all(type(i) is int for i in ids):
            ids = tuple(self._as_id(i) for i in ids)
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise RequestError(
                f"the prompt holds token id {_short(bad)}; use ids from 0 to {self.vocab_size - 1}",
                param="prompt",
                code="invalid_value",
            )
        return ids

    def _as_id(self, value: object) -> int:
        try:
            if isinstance(value, bool | np.bool_):
                raise TypeError
            return operator.index(value)  # pyright: ignore[reportArgumentType]
        except TypeError:
            raise RequestError(
                f"the prompt holds {_short(value)} ({type(value).__name__}) among its token ids; "
                f"use whole numbers from 0 to {self.vocab_size - 1}",
                param="prompt",
                code="invalid_type",
            ) from None

    def _kept(self, truncate: int, num_output: int) -> int:
        if (
            isinstance(truncate, bool)
            or not isinstance(truncate, int)
            or not (truncate == -1 or 1 <= truncate <= self.max_model_len)
        ):
            raise RequestError(
                f"truncate_prompt_tokens={truncate!r} is not allowed; use 1 to "
                f"{self.max_model_len}, or -1",
                param="truncate_prompt_tokens",
            )
        return max(1, self.max_model_len - num_output) if truncate == -1 else truncate

    def _check_length(self, num_tokens: int, num_output: int) -> None:
        if num_tokens > self.max_model_len:
            raise self._too_long(str(num_tokens))
        if num_tokens + num_output > self.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, "
                f"your prompt contains {num_tokens} input tokens, which leaves no room for the "
                "number of requested output tokens (at least 1). Shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )

    def _too_long(self, num_tokens: str) -> RequestError:
        return RequestError(
            f"This model's maximum context length is {self.max_model_len} tokens. However, your "
            f"prompt contains {num_tokens} input tokens. Shorten the prompt",
            param="prompt",
            code="context_length_exceeded",
        )


def _open_mapping(prompt: Mapping[str, Any]) -> tuple[object, str | None, Any]:
    """The token ids or else the text, the text if given, and the salt."""
    given = {key for key, value in prompt.items() if value is not None}
    if unsupported := sorted(given & _UNSUPPORTED_KEYS):
        raise UnsupportedError(
            f"the prompt brings {', '.join(unsupported)}; only text and token ids are supported"
        )
    unknown = sorted(map(str, given - _PROMPT_KEYS))
    if unknown or not given & {"prompt", "prompt_token_ids"}:
        raise RequestError(
            f"the prompt is an object with {', '.join(unknown) or 'nothing to continue'}; use "
            "prompt or prompt_token_ids, and optionally cache_salt",
            param="prompt",
        )
    text = prompt.get("prompt")
    if text is not None and not isinstance(text, str):
        raise RequestError(
            f"prompt is a {type(text).__name__}; use a string, or prompt_token_ids", param="prompt"
        )
    ids = prompt.get("prompt_token_ids")
    if isinstance(ids, str):
        raise RequestError("prompt_token_ids is a string; use a list of ids", param="prompt")
    return text if ids is None else ids, text, prompt.get("cache_salt")


def checked_salt(salt: object) -> str | None:
    if salt is None:
        return None
    if (
        not isinstance(salt, str)
        or not 1 <= len(salt) <= MAX_SALT_CHARS
        or any(char in salt for char in "@/\\\0")
    ):
        raise RequestError(
            f"cache_salt is not allowed; use 1 to {MAX_SALT_CHARS} characters, none of them "
            "@, /, \\ or NUL",
            param="cache_salt",
        )
    return salt


def _short(value: object) -> str:
    return repr(value)[:40]

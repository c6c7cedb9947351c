"""From a prompt and its sampling parameters to a `Request`, with every check that needs the model.

JAX clamps or drops indices that are out of range without a word, so every token id that a user can
name is checked here, on the host.
"""

import operator
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.errors import RequestError, UnsupportedError
from jaxserve.frontend.defaults import default_sampling, read_generation_config
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.request import Request
from jaxserve.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams

if TYPE_CHECKING:
    from jaxserve.checkpoint import Checkpoint

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


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTokens:
    """The tokens that end an output: EOS, and further ones of the generation config."""

    eos_token_id: int | None
    extra: tuple[int, ...]


def is_token_ids(value: Any) -> TypeGuard[Sequence[int]]:
    """Whether a value is one prompt of token ids: a non-empty sequence that begins with a number.

    What follows is checked, and complained of, by `Processor.parse`.
    """
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.number)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence) or not value:
        return False
    return isinstance(value[0], int | float | np.number)


class Processor:
    """Turns prompts into requests.

    Args:
        config: Of the engine.
        checkpoint: For the generation config and the EOS token.
        tokenizer: None with skip_tokenizer_init: prompts must be token ids then.
        vocab_size: Of the model; ids must be below it.
        max_model_len: Tokens, prompt and output together.
    """

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: "Checkpoint",
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._max_logprobs = config.max_logprobs
        own = checkpoint.generation_config
        self.end_tokens = _end_tokens(own, checkpoint.config, tokenizer, vocab_size)
        self._defaults = default_sampling(read_generation_config(config.generation_config, own))
        self._rng = np.random.default_rng(config.seed & (2**64 - 1))
        self._lock = threading.Lock()  # of _rng

    def default_sampling_params(self) -> SamplingParams:
        """What holds when a request brings no sampling parameters."""
        return SamplingParams(**self._defaults)

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The generation config's values, by the names of `SamplingParams`."""
        return dict(self._defaults)

    def process(
        self,
        request_id: str,
        prompt: Prompt | ParsedPrompt,
        sampling: SamplingParams,
        *,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> Request:
        """Check and resolve one request.

        Raises:
            RequestError: Something in it is not allowed.
        """
        parsed = prompt
        if not isinstance(parsed, ParsedPrompt):
            parsed = self.parse(parsed, add_special_tokens=add_special_tokens)
        sampling = sampling.clone()
        self._check_sampling(sampling)
        max_tokens = self._max_tokens(len(parsed.token_ids), sampling)
        bad_words = self._bad_words(sampling.bad_words or [])
        extra = () if sampling.ignore_eos else self.end_tokens.extra
        eos = None if sampling.ignore_eos else self.end_tokens.eos_token_id
        own = sampling.stop_token_ids or []
        return Request(
            request_id=request_id,
            prompt_token_ids=parsed.token_ids,
            sampling=sampling,
            max_tokens=max_tokens,
            eos_token_id=eos,
            stop_token_ids=tuple(dict.fromkeys([*own, *extra])),
            bad_words_token_ids=bad_words,
            seed=self._draw_seed() if sampling.seed is None else sampling.seed,
            cache_salt=parsed.cache_salt,
            priority=priority,
            arrival_s=time.monotonic(),
            # Whether a sequence of bad words is about to be completed is decided on the host.
            needs_host_tokens=any(len(word) > 1 for word in bad_words),
        )

    # The prompt

    def parse(
        self,
        prompt: Prompt,
        *,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> ParsedPrompt:
        """Any form of prompt as tokens, checked.

        Args:
            prompt: Text, token ids, or {"prompt" or "prompt_token_ids", "cache_salt"}.
            add_special_tokens: Let the tokenizer add its begin token; not for rendered chats.
            truncate_prompt_tokens: Keep the last N; -1: all that leave room for one output token.
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
            ids = ids[-self._kept(truncate_prompt_tokens) :]
        if not ids:
            raise RequestError(
                "the prompt is empty; send at least one token", param="prompt", code="invalid_value"
            )
        self._check_length(len(ids))
        return ParsedPrompt(text, ids, _checked_salt(salt))

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

    def _kept(self, truncate: int) -> int:
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
        return max(1, self.max_model_len - 1) if truncate == -1 else truncate

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self.max_model_len:
            raise self._too_long(str(num_tokens))
        if num_tokens == self.max_model_len:
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

    # The sampling parameters

    def _check_sampling(self, sampling: SamplingParams) -> None:
        if self.tokenizer is None and sampling.stop:
            raise RequestError(
                "stop strings need a tokenizer, but skip_tokenizer_init is set; use stop_token_ids",
                param="stop",
            )
        for name in ("logprobs", "prompt_logprobs"):
            self._check_num_logprobs(name, getattr(sampling, name))
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(sampling, name) or ():
                if token_id >= self.vocab_size:
                    raise RequestError(
                        f"{name} holds token id {_short(token_id)}; use ids from 0 to "
                        f"{self.vocab_size - 1}",
                        param=name,
                        code="invalid_value",
                    )

    def _check_num_logprobs(self, name: str, num: int | None) -> None:
        if num is None:
            return
        wanted = self.vocab_size if num == -1 else num
        allowed = self.vocab_size if self._max_logprobs == -1 else self._max_logprobs
        allowed = min(allowed, self.vocab_size)
        if wanted > allowed:
            raise RequestError(
                f"{name}={num} asks for {wanted} log-probabilities a token; at most {allowed} are "
                "allowed (the engine's max_logprobs, --max-logprobs)",
                param=name,
                code="integer_above_max_value",
            )

    def _max_tokens(self, num_prompt_tokens: int, sampling: SamplingParams) -> int:
        room = self.max_model_len - num_prompt_tokens
        wanted = sampling.max_tokens
        if wanted is None:
            if sampling.min_tokens > room:
                raise RequestError(
                    f"min_tokens={sampling.min_tokens} is more than the {room} tokens that the "
                    f"prompt of {num_prompt_tokens} leaves of the model's {self.max_model_len}",
                    param="min_tokens",
                )
            return room
        if wanted > self.max_model_len:
            raise RequestError(
                f"max_tokens={_short(wanted)} is more than this model's maximum context length of "
                f"{self.max_model_len} tokens; ask for fewer",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return min(wanted, room)

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences of each word, at the start of a text and after a space."""
        if not words:
            return ()
        if self.tokenizer is None:
            raise RequestError(
                "bad_words need a tokenizer, but skip_tokenizer_init is set; use logit_bias",
                param="bad_words",
            )
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            plain, spaced = (
                tuple(self.tokenizer.encode(space + word.lstrip(), add_special_tokens=False))
                for space in ("", " ")
            )
            if not plain or max(plain) >= self.vocab_size:
                raise RequestError(
                    f"bad_words holds {word[:80]!r}, which is no token of this model; leave it out",
                    param="bad_words",
                )
            found[plain] = None
            # Else the spaced form is the same word behind a token for the space.
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                found[spaced] = None
        longest = max(map(len, found))
        if len(found) > MAX_BAD_WORDS or longest > MAX_BAD_WORD_TOKENS:
            raise RequestError(
                f"bad_words make {len(found)} token sequences, the longest of {longest} tokens; at "
                f"most {MAX_BAD_WORDS} of {MAX_BAD_WORD_TOKENS} tokens are allowed",
                param="bad_words",
            )
        return tuple(found)

    def _draw_seed(self) -> int:
        # From the engine's seed, so that an offline run repeats.
        with self._lock:
            return int(self._rng.integers(0, 2**62))


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


def _checked_salt(salt: object) -> str | None:
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


def _end_tokens(
    generation_config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> EndTokens:
    """EOS is the tokenizer's; the generation config's others end an output like stop tokens."""
    extra = [*_ids(generation_config.get("eos_token_id"))]
    if tokenizer is not None:
        extra += tokenizer.stop_token_ids
    eos = None if tokenizer is None else tokenizer.eos_token_id
    if eos is None:
        eos = next(iter([*extra, *_ids(model_config.get("eos_token_id"))]), None)
    extra = [i for i in dict.fromkeys(extra) if i != eos and 0 <= i < vocab_size]
    return EndTokens(
        eos_token_id=eos if eos is not None and 0 <= eos < vocab_size else None,
        extra=tuple(extra),
    )


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool)]


def _short(value: object) -> str:
    return repr(value)[:40]

"""From a prompt and its sampling parameters to a `Request`, with every check that needs the model.

JAX clamps or drops indices that are out of range without a word, so every token id that a user can
name is checked here, on the host.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxserve.checkpoint import Checkpoint
from jaxserve.config import EngineConfig
from jaxserve.errors import RequestError
from jaxserve.frontend.defaults import default_sampling, end_tokens, read_generation_config
from jaxserve.frontend.grammar_compiler import GrammarCompiler, Vocabulary
from jaxserve.frontend.prompts import ParsedPrompt, Prompt, PromptReader
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.request import Grammar, Request
from jaxserve.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams
from jaxserve.structured_outputs import PARAM, StructuredOutputsParams


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
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        self.tokenizer = tokenizer
        self._reader = PromptReader(tokenizer, vocab_size, max_model_len)
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._max_logprobs = config.max_logprobs
        own = checkpoint.generation_config
        self.end_tokens = end_tokens(own, checkpoint.config, tokenizer, vocab_size)
        self._defaults = default_sampling(
            read_generation_config(config.generation_config, own),
            config.override_generation_config,
        )
        self.grammars = None
        vocabulary = grammar_vocabulary(checkpoint, tokenizer)
        if vocabulary is not None:
            self.grammars = GrammarCompiler(
                vocabulary,
                timeout_s=config.grammar_compile_timeout_s,
                max_bytes=config.max_grammar_bytes,
            )
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
        pools: bool = False,
    ) -> Request:
        """Check and resolve one request. A grammar is compiled first, which may take seconds.

        Raises:
            RequestError: Something in it is not allowed.
        """
        parsed = prompt
        if not isinstance(parsed, ParsedPrompt):
            parsed = self.parse(parsed, add_special_tokens=add_special_tokens, pools=pools)
        sampling = sampling.clone()
        self._check_sampling(sampling)
        max_tokens = 1 if pools else self._max_tokens(len(parsed.token_ids), sampling)
        bad_words = self._bad_words(sampling.bad_words or [])
        extra = () if sampling.ignore_eos else self.end_tokens.extra
        eos = None if sampling.ignore_eos else self.end_tokens.eos_token_id
        own = sampling.stop_token_ids or []
        grammar = self._grammar(sampling.structured_outputs)
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
            grammar=grammar,
            pools=pools,
            needs_host_tokens=grammar is not None,
        )

    def close(self) -> None:
        """Ends what runs beside this process. May be called again."""
        if self.grammars is not None:
            self.grammars.close()

    def require_grammars(self) -> GrammarCompiler:
        """Raises RequestError when the model cannot have structured outputs."""
        if self.grammars is None:
            missing = "tokenizer" if self.tokenizer is None else "end-of-sequence token"
            raise RequestError(
                f"{PARAM} needs a {missing}, and there is none; leave it out",
                param=PARAM,
                code="invalid_value",
            )
        return self.grammars

    def parse(
        self,
        prompt: Prompt,
        *,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
        truncation_side: Literal["left", "right"] = "left",
        pools: bool = False,
    ) -> ParsedPrompt:
        """Any form of prompt as tokens; see `PromptReader.read`.

        Raises:
            RequestError: It is malformed, empty or too long, or an id is out of range.
        """
        return self._reader.read(
            prompt,
            add_special_tokens=add_special_tokens,
            truncate_prompt_tokens=truncate_prompt_tokens,
            truncation_side=truncation_side,
            pools=pools,
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
                        f"{name} holds token id {token_id!r:.40}; use ids from 0 to "
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
                f"max_tokens={wanted!r:.40} is more than this model's maximum context length of "
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

    def _grammar(self, params: StructuredOutputsParams | None) -> Grammar | None:
        if params is None:
            return None
        markers = tuple(tuple(marker) for marker in params.start_after)
        opener = () if params.opened_by is None else (params.opened_by,)
        for token_id in [*opener, *(token_id for marker in markers for token_id in marker)]:
            if token_id >= self.vocab_size:
                raise RequestError(
                    f"{PARAM}.start_after or opened_by holds token id {token_id!r:.40}; use ids "
                    f"below {self.vocab_size}",
                    param=PARAM,
                    code="invalid_value",
                )
        text = self.require_grammars().compile(params)
        return Grammar(text=text, start_after=markers, opened_by=params.opened_by)

    def _draw_seed(self) -> int:
        # From the engine's seed, so that an offline run repeats.
        with self._lock:
            return int(self._rng.integers(0, 2**62))


def grammar_vocabulary(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Vocabulary | None:
    """What grammars need of a tokenizer; None without one, or without a token that ends outputs."""
    if tokenizer is None:
        return None
    size = len(tokenizer)
    ends = end_tokens(checkpoint.generation_config, checkpoint.config, tokenizer, size)
    if ends.eos_token_id is None:
        return None
    return Vocabulary(
        tokenizer_json=tokenizer.backend.to_str,
        num_tokens=size,
        end_token_ids=(ends.eos_token_id, *ends.extra),
        special_tokens=lambda: {
            token.content: token_id
            for token_id, token in tokenizer.backend.get_added_tokens_decoder().items()
            if token.special
        },
        token_id=tokenizer.backend.token_to_id,
    )

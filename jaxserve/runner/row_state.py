"""What the device remembers of each row between steps.

Arrays have one row more than there are sequences: padding reads and writes that last one. Token
history is written by the step itself, so penalties and bad words never wait for the host; the rest
is uploaded when a row changes hands, and only if its request asks for it.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.request import Request
from jaxserve.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS

# Bits of a row's flags: which of the rarer changes to the logits its request asks for.
PENALTIES, LOGIT_BIAS, ALLOWED, MIN_TOKENS, BAD_WORDS = 1, 2, 4, 8, 16
UPLOADED = LOGIT_BIAS | ALLOWED | MIN_TOKENS | BAD_WORDS  # those that `load_sampling` serves


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowState:
    """R + 1 rows of device state; donated to every step."""

    last_tokens: Array  # [R + 1] int32: each row's newest token
    page_tables: tuple[Array, ...]  # per group [R + 1, P] int32
    history: Array  # [R + 1, max_model_len] int32: all tokens whose KV is computed
    bias_ids: Array  # [R + 1, MAX_LOGIT_BIAS] int32; unused: V
    bias_values: Array  # [R + 1, MAX_LOGIT_BIAS] float32
    allowed: Array  # [R + 1, ceil(V / 32)] uint32, one bit a token
    stops: Array  # the same: tokens that min_tokens makes impossible
    bad_words: Array  # [R + 1, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS] int32, right-aligned; unused: -1


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShapes:
    """The sizes that decide the shapes of `RowState`."""

    max_num_seqs: int
    max_model_len: int
    page_size: int
    vocab_size: int
    num_groups: int = 1

    @property
    def max_pages(self) -> int:  # P
        return -(-self.max_model_len // self.page_size)

    @property
    def mask_words(self) -> int:
        return -(-self.vocab_size // 32)

    def abstract(self) -> RowState:
        rows = self.max_num_seqs + 1

        def shape(*dims: int, dtype: jax.typing.DTypeLike = jnp.int32) -> Array:
            return jax.ShapeDtypeStruct((rows, *dims), dtype)  # pyright: ignore[reportReturnType]

        return RowState(
            last_tokens=shape(),
            page_tables=tuple(shape(self.max_pages) for _ in range(self.num_groups)),
            history=shape(self.max_model_len),
            bias_ids=shape(MAX_LOGIT_BIAS),
            bias_values=shape(MAX_LOGIT_BIAS, dtype=jnp.float32),
            allowed=shape(self.mask_words, dtype=jnp.uint32),
            stops=shape(self.mask_words, dtype=jnp.uint32),
            bad_words=shape(MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
        )


def flags_of(request: Request) -> int:
    """Which rarer changes to the logits a request asks for."""
    p = request.sampling
    flags = 0
    if p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0:
        flags |= PENALTIES
    if p.logit_bias:
        flags |= LOGIT_BIAS
    if p.allowed_token_ids is not None:
        flags |= ALLOWED
    if p.min_tokens and (request.stop_token_ids or request.eos_token_id is not None):
        flags |= MIN_TOKENS
    if request.bad_words_token_ids:
        flags |= BAD_WORDS
    return flags


def pack_tokens(
    shapes: RowShapes, row: int, blocks: tuple, token_ids: tuple[int, ...]
) -> np.ndarray:
    """The upload of `load_tokens`: row, then each group's page table, then the history."""
    blob = np.zeros(1 + shapes.num_groups * shapes.max_pages + shapes.max_model_len, np.int32)
    blob[0] = row
    at = 1
    for block_ids in blocks:
        blob[at : at + len(block_ids)] = block_ids
        at += shapes.max_pages
    blob[at : at + len(token_ids)] = token_ids
    return blob


def load_tokens(shapes: RowShapes, state: RowState, blob: Array) -> RowState:
    """Sets a row's page tables and history, when it starts with KV that is already computed."""
    row = blob[0]
    tables = []
    at = 1
    for table in state.page_tables:
        tables.append(table.at[row].set(blob[at : at + shapes.max_pages]))
        at += shapes.max_pages
    history = state.history.at[row].set(blob[at:])
    return dataclasses.replace(state, page_tables=tuple(tables), history=history)


def pack_sampling(shapes: RowShapes, row: int, request: Request) -> np.ndarray:
    """The upload of `load_sampling`, in the order that it reads."""
    p = request.sampling
    bias = p.logit_bias or {}
    ids = np.full(MAX_LOGIT_BIAS, shapes.vocab_size, np.int32)
    ids[: len(bias)] = list(bias.keys())
    values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    values[: len(bias)] = list(bias.values())
    stops = list(request.stop_token_ids)
    if request.eos_token_id is not None:
        stops.append(request.eos_token_id)
    words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32)
    for i, word in enumerate(request.bad_words_token_ids):
        words[i, MAX_BAD_WORD_TOKENS - len(word) :] = word
    return np.concatenate(
        [
            np.array([row], np.int32),
            ids,
            values.view(np.int32),
            _bits(shapes, p.allowed_token_ids or ()),
            _bits(shapes, stops),
            words.ravel(),
        ]
    )


def load_sampling(shapes: RowShapes, state: RowState, blob: Array) -> RowState:
    """Sets what a row's rarer sampling parameters need."""
    row, rest = blob[0], blob[1:]

    def take(size: int) -> Array:
        nonlocal rest
        taken, rest = rest[:size], rest[size:]
        return taken

    def as_type(x: Array, dtype: jax.typing.DTypeLike) -> Array:
        return jax.lax.bitcast_convert_type(x, dtype)

    return dataclasses.replace(
        state,
        bias_ids=state.bias_ids.at[row].set(take(MAX_LOGIT_BIAS)),
        bias_values=state.bias_values.at[row].set(as_type(take(MAX_LOGIT_BIAS), jnp.float32)),
        allowed=state.allowed.at[row].set(as_type(take(shapes.mask_words), jnp.uint32)),
        stops=state.stops.at[row].set(as_type(take(shapes.mask_words), jnp.uint32)),
        bad_words=state.bad_words.at[row].set(rest.reshape(MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)),
    )


def _bits(shapes: RowShapes, token_ids: Iterable[int]) -> np.ndarray:
    words = np.zeros(shapes.mask_words * 32, np.uint8)
    words[list(token_ids)] = 1
    return np.packbits(words, bitorder="little").view(np.int32)

"""Sampling on the device: all rows at once, each with its own parameters.

Thresholds for top-k and top-p are found by bisection over the bits of the logits, exactly and
without a sort, which TPUs and XLA:CPU are slow at. Work that no row asks for is skipped.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.runner.row_state import (
    ALLOWED,
    BAD_WORDS,
    LOGIT_BIAS,
    MIN_TOKENS,
    PENALTIES,
    RowState,
)
from jaxserve.sampling_params import GREEDY_BELOW
from jaxserve.step import NO_TOKEN

IMPOSSIBLE = -jnp.inf
BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """Parameters of the B rows of a step. A row that does not sample is greedy, with no flags."""

    rows: Array  # [B] int32: place in RowState
    lens: Array  # [B] int32: tokens so far, so the position of the token to draw
    prompt_lens: Array  # [B] int32
    min_lens: Array  # [B] int32: EOS and stop ids are masked while lens is below it
    flags: Array  # [B] int32
    top_k: Array  # [B] int32; 0 is off
    seeds: Array  # [B, 2] uint32
    temperature: Array  # [B] float32, and the rest
    top_p: Array
    min_p: Array
    presence: Array
    frequency: Array
    repetition: Array
    num_logprobs: Array  # [B] int32; -1: none asked for


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenMasks:
    """The tokens that grammars allow; all bits are set in rows without one."""

    words: Array  # [B, ceil(V / 32)] uint32
    on: Array  # bool: whether any row has one; if not, `words` is not read


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a step yields for its B rows; the log-probabilities are zeros if no row asks."""

    token_ids: Array  # [B] int32; -1 where the logits are not numbers, NO_TOKEN: none is possible
    logprob_ids: Array  # [B, 1 + K] int32: the token, then the top K
    logprobs: Array  # [B, 1 + K] float32
    ranks: Array  # [B] int32, of the token


def sample(
    logits: Array, rows: SamplingRows, state: RowState, masks: TokenMasks, *, max_logprobs: int
) -> Sampled:
    """Draws a token for each row of `logits` [B, V] float32.

    Grammars' masks come before everything, log-probabilities included.
    """
    special = (rows.flags != 0) | (rows.temperature >= GREEDY_BELOW)
    broken = jnp.isnan(jnp.max(logits, axis=-1))
    token_ids = jax.lax.cond(
        jnp.any(special) | masks.on,
        lambda: _draw(_process(_mask(logits, masks), rows, state), rows),
        lambda: largest(logits),
    )
    ids, values, ranks = jax.lax.cond(
        jnp.any(rows.num_logprobs >= 0),
        lambda: logprobs_of(
            _mask(logits, masks), jnp.maximum(token_ids, 0), max_logprobs=max_logprobs
        ),
        lambda: _no_logprobs(logits.shape[0], max_logprobs),
    )
    return Sampled(
        token_ids=jnp.where(broken, -1, token_ids),
        logprob_ids=ids,
        logprobs=values,
        ranks=ranks,
    )


def largest(logits: Array) -> Array:
    """The first index of each row's largest value [B, V] -> [B] int32.

    In two levels where V allows it: XLA:CPU takes a maximum ten times faster than an argmax.
    """
    num_rows, size = logits.shape
    if size % BLOCK:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    blocks = logits.reshape(num_rows, -1, BLOCK)
    tops = jnp.max(blocks, axis=-1)  # [B, V / BLOCK]
    block = jnp.argmax(tops, axis=-1)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [B, BLOCK]
    return (block * BLOCK + jnp.argmax(within, axis=-1)).astype(jnp.int32)


def logprobs_of(
    logits: Array, token_ids: Array, *, max_logprobs: int
) -> tuple[Array, Array, Array]:
    """Ids and log-probabilities [B, 1 + K] of given tokens and the top K, and the former's ranks.

    They are those of the logits before sampling parameters change them; a rank is the number of
    logits at least as large.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [B, 1]
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=1)  # [B, 1]
    ranks = jnp.sum(logits >= chosen, axis=-1, dtype=jnp.int32)
    top, top_ids = jax.lax.top_k(logits, max_logprobs)  # [B, K]
    ids = jnp.concatenate([token_ids[:, None], top_ids.astype(jnp.int32)], axis=1)
    return ids, jnp.concatenate([chosen, top], axis=1) - total, ranks


def _no_logprobs(num_rows: int, max_logprobs: int) -> tuple[Array, Array, Array]:
    shape = (num_rows, 1 + max_logprobs)
    return (
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
    )


def _process(logits: Array, rows: SamplingRows, state: RowState) -> Array:
    """Applies everything that precedes the temperature, each only where a row asks for it."""
    for flag, change in (
        (ALLOWED, _allow),
        (LOGIT_BIAS, _bias),
        (MIN_TOKENS, _mask_stops),
        (PENALTIES, _penalize),
        (BAD_WORDS, _ban_words),
    ):
        on = (rows.flags & flag) != 0
        logits = jax.lax.cond(
            jnp.any(on),
            functools.partial(change, rows=rows, state=state, on=on),
            lambda x: x,
            logits,
        )
    return logits


def _mask(logits: Array, masks: TokenMasks) -> Array:
    return jax.lax.cond(
        masks.on,
        lambda: jnp.where(_bits(masks.words, logits.shape[1]), logits, IMPOSSIBLE),
        lambda: logits,
    )


def _bits(words: Array, vocab_size: int) -> Array:
    """uint32 [B, W] to bool [B, V]."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab_size] != 0


def _allow(logits: Array, *, rows: SamplingRows, state: RowState, on: Array) -> Array:
    allowed = _bits(state.allowed[rows.rows], logits.shape[1])
    return jnp.where(on[:, None] & ~allowed, IMPOSSIBLE, logits)


def _bias(logits: Array, *, rows: SamplingRows, state: RowState, on: Array) -> Array:
    ids = jnp.where(on[:, None], state.bias_ids[rows.rows], logits.shape[1])
    numbers = jnp.arange(logits.shape[0])[:, None]
    return logits.at[numbers, ids].add(state.bias_values[rows.rows], mode="drop")


def _mask_stops(logits: Array, *, rows: SamplingRows, state: RowState, on: Array) -> Array:
    stops = _bits(state.stops[rows.rows], logits.shape[1])
    early = on & (rows.lens < rows.min_lens)
    masked = jnp.where(early[:, None] & stops, IMPOSSIBLE, logits)
    nothing_left = jnp.max(masked, axis=-1, keepdims=True) == IMPOSSIBLE
    return jnp.where(nothing_left, logits, masked)


def _penalize(logits: Array, *, rows: SamplingRows, state: RowState, on: Array) -> Array:
    tokens = state.history[rows.rows]  # [B, max_model_len]
    places = jnp.arange(tokens.shape[1])
    known = places < rows.lens[:, None]
    output = known & (places >= rows.prompt_lens[:, None])
    numbers = jnp.arange(logits.shape[0])[:, None]
    zeros = jnp.zeros(logits.shape, jnp.int32)
    seen = zeros.at[numbers, tokens].max(known.astype(jnp.int32)) > 0
    counts = zeros.at[numbers, tokens].add(output.astype(jnp.int32)).astype(jnp.float32)

    def column(x: Array, off: float) -> Array:
        return jnp.where(on, x, off)[:, None]

    repetition = column(rows.repetition, 1.0)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    logits = logits - column(rows.frequency, 0.0) * counts
    return logits - column(rows.presence, 0.0) * (counts > 0)


def _ban_words(logits: Array, *, rows: SamplingRows, state: RowState, on: Array) -> Array:
    words = state.bad_words[rows.rows]  # [B, words, tokens], right-aligned
    before, last = words[:, :, :-1], words[:, :, -1]
    places = rows.lens[:, None] - before.shape[2] + jnp.arange(before.shape[2])
    context = jnp.take_along_axis(state.history[rows.rows], jnp.maximum(places, 0), axis=1)
    context = jnp.where(places >= rows.prompt_lens[:, None], context, -2)  # output only
    matches = jnp.all((before == -1) | (before == context[:, None, :]), axis=-1)
    ids = jnp.where(on[:, None] & matches & (last >= 0), last, logits.shape[1])
    numbers = jnp.arange(logits.shape[0])[:, None]
    return logits.at[numbers, ids].set(IMPOSSIBLE, mode="drop")


def _draw(logits: Array, rows: SamplingRows) -> Array:
    """Gumbel-max over what min-p, top-k and top-p leave; greedy rows take the largest."""
    greedy = rows.temperature < GREEDY_BELOW

    def draw() -> Array:
        scaled = logits / jnp.where(greedy, 1.0, rows.temperature)[:, None]
        scaled = _truncate(scaled, rows, ~greedy)
        noise = jax.vmap(functools.partial(_gumbel, size=logits.shape[1]))(rows.seeds, rows.lens)
        return largest(jnp.where(greedy[:, None], logits, scaled + noise))

    token_ids = jax.lax.cond(jnp.all(greedy), lambda: largest(logits), draw)
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=1)[:, 0]
    return jnp.where(chosen == IMPOSSIBLE, NO_TOKEN, token_ids)


def _gumbel(seed: Array, position: Array, *, size: int) -> Array:
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)


def _truncate(logits: Array, rows: SamplingRows, on: Array) -> Array:
    top_k, top_p = on & (rows.top_k > 0), on & (rows.top_p < 1)
    floor = jnp.where(on & (rows.min_p > 0), jnp.log(rows.min_p), -jnp.inf)
    logits = jnp.where(
        logits < jnp.max(logits, axis=-1, keepdims=True) + floor[:, None], IMPOSSIBLE, logits
    )
    logits = jax.lax.cond(jnp.any(top_k), _top_k, lambda x, *_: x, logits, rows.top_k, top_k)
    return jax.lax.cond(jnp.any(top_p), _top_p, lambda x, *_: x, logits, rows.top_p, top_p)


def _top_k(logits: Array, k: Array, on: Array) -> Array:
    return _keep_most(logits, jnp.ones_like(logits), k.astype(jnp.float32), on)


def _top_p(logits: Array, p: Array, on: Array) -> Array:
    return _keep_most(logits, jax.nn.softmax(logits, axis=-1), p, on)


def _keep_most(logits: Array, weights: Array, enough: Array, on: Array) -> Array:
    """Keeps the largest logits [B, V] whose weights sum to `enough` [B]; ties at the edge stay.

    The edge is the largest value v for which sum(weights where logits >= v) >= enough.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # [B, V], same order

    def narrow(i: Array, edge: Array) -> Array:
        trial = edge | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        total = jnp.sum(jnp.where(ordered >= trial[:, None], weights, 0), axis=-1)
        return jnp.where(total >= enough, trial, edge)

    edge = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(on[:, None] & (ordered < edge[:, None]), IMPOSSIBLE, logits)

"""The sampler against a plain numpy statement of its rules, and its promise of determinism."""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxserve.request import Request
from jaxserve.runner.row_state import (
    RowShapes,
    RowState,
    flags_of,
    load_sampling,
    load_tokens,
    pack_sampling,
    pack_tokens,
)
from jaxserve.runner.sampler import Sampled, SamplingRows, TokenMasks, largest, sample
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import NO_TOKEN

VOCAB = 70  # not a multiple of 32
SHAPES = RowShapes(max_num_seqs=4, max_model_len=32, page_size=8, vocab_size=VOCAB)
EOS = 3


@dataclasses.dataclass
class Row:
    """A row to sample for: its parameters, its tokens, its seed."""

    params: SamplingParams
    prompt: tuple[int, ...] = (5, 6, 7)
    output: tuple[int, ...] = ()
    seed: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    mask: tuple[int, ...] | None = None  # what a grammar allows

    @property
    def request(self) -> Request:
        return Request(
            request_id="r",
            prompt_token_ids=self.prompt,
            sampling=self.params,
            max_tokens=16,
            eos_token_id=EOS,
            stop_token_ids=tuple(self.params.stop_token_ids or ()),
            bad_words_token_ids=self.bad_words,
        )


_step = jax.jit(sample, static_argnames="max_logprobs")
_load_tokens = jax.jit(load_tokens, static_argnums=0)
_load_sampling = jax.jit(load_sampling, static_argnums=0)


def pack_rows(rows: list[Row]) -> TokenMasks:
    bits = np.ones((len(rows), SHAPES.mask_words * 32), np.uint8)
    for i, row in enumerate(rows):
        if row.mask is not None:
            bits[i] = 0
            bits[i, list(row.mask)] = 1
    words = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    on = any(row.mask is not None for row in rows)
    # When no row has a mask, the words must not be read.
    return TokenMasks(words=jnp.asarray(words if on else 0 * words), on=jnp.asarray(on))


def run(logits: np.ndarray, rows: list[Row], *, max_logprobs: int = 5) -> Sampled:
    """Samples rows of logits [B, V] as a step would."""
    state: RowState = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), SHAPES.abstract())
    for i, row in enumerate(rows):
        tokens = row.prompt + row.output
        state = _load_tokens(SHAPES, state, pack_tokens(SHAPES, i, ((),), tokens))
        state = _load_sampling(SHAPES, state, pack_sampling(SHAPES, i, row.request))

    def column(values: list[Any], dtype: Any = np.float32) -> jax.Array:
        return jnp.asarray(np.array(values, dtype))

    p = [row.params for row in rows]
    lens = [len(row.prompt + row.output) for row in rows]
    sampling = SamplingRows(
        rows=column(list(range(len(rows))), np.int32),
        lens=column(lens, np.int32),
        prompt_lens=column([len(row.prompt) for row in rows], np.int32),
        min_lens=column([len(r.prompt) + r.params.min_tokens for r in rows], np.int32),
        flags=column([flags_of(row.request) for row in rows], np.int32),
        top_k=column([max(x.top_k, 0) for x in p], np.int32),
        seeds=column([[row.seed & 0xFFFFFFFF, row.seed >> 32] for row in rows], np.uint32),
        temperature=column([0.0 if x.greedy else x.temperature for x in p]),
        top_p=column([x.top_p for x in p]),
        min_p=column([x.min_p for x in p]),
        presence=column([x.presence_penalty for x in p]),
        frequency=column([x.frequency_penalty for x in p]),
        repetition=column([x.repetition_penalty for x in p]),
        num_logprobs=column([-1 if x.logprobs is None else x.logprobs for x in p], np.int32),
    )
    return _step(jnp.asarray(logits), sampling, state, pack_rows(rows), max_logprobs=max_logprobs)


def processed(logits: np.ndarray, row: Row) -> np.ndarray:
    """The rules up to the temperature, for one row of logits [V], said plainly."""
    x, p = logits.astype(np.float64).copy(), row.params
    if p.allowed_token_ids is not None:
        x[[i for i in range(VOCAB) if i not in p.allowed_token_ids]] = -np.inf
    for token, value in (p.logit_bias or {}).items():
        x[token] += value
    if len(row.output) < p.min_tokens:
        masked = x.copy()
        masked[[EOS, *(p.stop_token_ids or ())]] = -np.inf
        x = masked if np.isfinite(masked).any() else x
    for token in set(row.prompt + row.output):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token in set(row.output):
        x[token] -= p.frequency_penalty * row.output.count(token) + p.presence_penalty
    for *before, last in row.bad_words:
        if len(before) == 0 or list(row.output[-len(before) :]) == before:
            x[last] = -np.inf
    return x


def kept(logits: np.ndarray, p: SamplingParams) -> set[int]:
    """The tokens that min-p, top-k and top-p leave, by sorting."""
    x = logits / p.temperature
    probs = np.exp(x - x.max())
    probs /= probs.sum()
    left = {i for i in range(VOCAB) if probs[i] >= p.min_p * probs.max() and probs[i] > 0}
    order = sorted(left, key=lambda i: -x[i])
    if p.top_k > 0:
        order = order[: p.top_k]
    total = sum(probs[i] for i in order)
    chosen, reached = set(), 0.0
    for i in order:
        if reached >= p.top_p * total:
            break
        chosen.add(i)
        reached += probs[i]
    return chosen


def random_logits(seed: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


token = st.integers(0, VOCAB - 1)
tokens = st.lists(token, min_size=1, max_size=8).map(tuple)
params = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.5, 2),
    logit_bias=st.none() | st.dictionaries(token, st.floats(-20, 20), max_size=5),
    allowed_token_ids=st.none() | st.lists(token, min_size=1, max_size=20),
    stop_token_ids=st.none() | st.lists(token, max_size=3),
    min_tokens=st.integers(0, 6),
)


@settings(max_examples=60)
@given(
    st.integers(0, 1000),
    st.lists(
        st.builds(
            Row,
            params,
            prompt=tokens,
            output=tokens | st.just(()),
            bad_words=st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=4).map(
                tuple
            ),
        ),
        min_size=3,
        max_size=3,
    ),
)
def test_greedy_rows_follow_the_plain_rules(seed: int, rows: list[Row]) -> None:
    logits = random_logits(seed, len(rows))
    got = np.asarray(run(logits, rows).token_ids)
    for i, row in enumerate(rows):
        want = processed(logits[i], row)
        if np.isfinite(want).any():  # a row that forbids everything has no right answer
            assert want[got[i]] >= want.max() - 1e-4


@settings(max_examples=40)
@given(
    st.integers(0, 1000),
    st.builds(
        SamplingParams,
        temperature=st.floats(0.1, 2),
        top_k=st.integers(0, 12),
        top_p=st.floats(0.05, 1),
        min_p=st.just(0.0) | st.floats(0.001, 0.5),
    ),
)
def test_draws_come_from_what_top_k_top_p_and_min_p_leave(seed: int, p: SamplingParams) -> None:
    logits = random_logits(seed)
    want = kept(logits[0].astype(np.float64), p)
    # Tokens at the very edge of the nucleus may fall either way in float32.
    near = kept(logits[0].astype(np.float64), dataclasses.replace(p, top_p=min(1, p.top_p + 1e-5)))
    for draw in range(4):
        got = run(np.repeat(logits, 4, axis=0), [Row(p, seed=4 * draw + i) for i in range(4)])
        assert set(np.asarray(got.token_ids).tolist()) <= want | near


def test_draws_have_the_softmax_distribution() -> None:
    logits = random_logits(1) / 3
    p = SamplingParams(temperature=0.7)
    draws = 1500
    got = np.concatenate(
        [
            np.asarray(
                run(
                    np.repeat(logits, 4, axis=0), [Row(p, seed=4 * d + i) for i in range(4)]
                ).token_ids
            )
            for d in range(draws // 4)
        ]
    )
    probs = np.exp(logits[0] / 0.7)
    probs /= probs.sum()
    observed = np.bincount(got, minlength=VOCAB)
    expected = probs * len(got)
    common = expected > 5
    chi2 = ((observed - expected)[common] ** 2 / expected[common]).sum()
    assert chi2 < 2 * common.sum()  # mean is the number of cells; twice it is many deviations off


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = random_logits(2, 4)
    p = SamplingParams(temperature=1.0)
    row = Row(p, seed=1234567890123)
    alone = int(run(logits[:1], [row]).token_ids[0])
    others = [Row(SamplingParams(temperature=1.5, top_k=3), seed=i) for i in range(3)]
    shuffled = np.concatenate([logits[1:], logits[:1]])
    assert int(run(shuffled, [*others, row]).token_ids[3]) == alone

    flat = np.zeros((1, VOCAB), np.float32)
    by_seed = {int(run(flat, [Row(p, seed=s)]).token_ids[0]) for s in range(20)}
    by_high_word = {int(run(flat, [Row(p, seed=s << 32)]).token_ids[0]) for s in range(20)}
    by_position = {int(run(flat, [Row(p, output=(1,) * n)]).token_ids[0]) for n in range(20)}
    assert len(by_seed) > 8
    assert len(by_high_word) > 8
    assert len(by_position) > 8


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(3, 2)
    rows = [
        Row(SamplingParams(temperature=0, logprobs=3, logit_bias={11: 50.0})),
        Row(SamplingParams(temperature=0)),
    ]
    got = run(logits, rows)
    assert int(got.token_ids[0]) == 11
    want = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    ids = np.asarray(got.logprob_ids[0])
    assert ids[0] == 11
    assert ids[1:].tolist() == np.argsort(-logits[0])[:5].tolist()
    np.testing.assert_allclose(np.asarray(got.logprobs[0]), want[ids], atol=1e-5)
    assert int(got.ranks[0]) == int((logits[0] >= logits[0][11]).sum())


def test_logprobs_are_not_computed_unless_asked_for() -> None:
    got = run(random_logits(4), [Row(SamplingParams(temperature=0))])
    assert not np.asarray(got.logprobs).any()


def test_logits_that_are_not_numbers_are_reported() -> None:
    logits = random_logits(5, 2)
    logits[1, 4] = np.nan
    rows = [Row(SamplingParams(temperature=0)), Row(SamplingParams(temperature=1.0))]
    got = np.asarray(run(logits, rows).token_ids)
    assert got[0] == logits[0].argmax()
    assert got[1] == -1


@pytest.mark.parametrize("prompt_word", [True, False])
def test_bad_words_match_the_output_only(prompt_word: bool) -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 9] = 5
    row = Row(
        SamplingParams(temperature=0),
        prompt=(1, 8) if prompt_word else (1,),
        output=() if prompt_word else (8,),
        bad_words=((8, 9),),
    )
    assert (int(run(logits, [row]).token_ids[0]) == 9) is prompt_word


@pytest.mark.parametrize("size", [128, 1280, 1000])
def test_largest_is_the_first_of_equals(size: int) -> None:
    rng = np.random.default_rng(size)
    logits = rng.integers(0, 40, (50, size)).astype(np.float32)  # many ties
    logits[0] = -np.inf
    np.testing.assert_array_equal(np.asarray(largest(jnp.asarray(logits))), logits.argmax(axis=1))


masks = st.none() | st.lists(token, min_size=1, max_size=20).map(tuple)


@settings(max_examples=40)
@given(
    st.integers(0, 1000),
    st.lists(st.builds(Row, params, output=tokens, mask=masks), min_size=4, max_size=4),
)
def test_masks_of_grammars_come_first(seed: int, rows: list[Row]) -> None:
    logits = random_logits(seed, len(rows))
    got = np.asarray(run(logits, rows).token_ids)
    for i, row in enumerate(rows):
        own = logits[i].copy()
        if row.mask is not None:
            own[[t for t in range(VOCAB) if t not in row.mask]] = -np.inf
        want = processed(own, row)
        if np.isfinite(want).any():
            assert want[got[i]] >= want.max() - 1e-4
        else:
            assert got[i] == NO_TOKEN


def test_a_mask_leaves_the_other_rows_and_their_draws_alone() -> None:
    logits = random_logits(8, 4)
    rows = [Row(SamplingParams(temperature=1.0), seed=i) for i in range(4)]
    before = np.asarray(run(logits, rows).token_ids)
    rows[1] = dataclasses.replace(rows[1], mask=(int(before[1]), 9))
    rows[2] = dataclasses.replace(rows[2], mask=(11,))
    after = np.asarray(run(logits, rows).token_ids)
    assert after.tolist() == [before[0], before[1], 11, before[3]]


def test_a_mask_of_the_end_alone_beats_min_tokens() -> None:
    p = SamplingParams(temperature=0.0, min_tokens=5)
    assert int(run(random_logits(3), [Row(p, mask=(EOS,))]).token_ids[0]) == EOS
    assert int(run(random_logits(3), [Row(p, mask=(EOS, 7))]).token_ids[0]) == 7


def test_log_probabilities_are_over_what_the_mask_leaves() -> None:
    p = SamplingParams(temperature=0.0, logprobs=3)
    logits = random_logits(5)
    got = run(logits, [Row(p, mask=(4, 6))], max_logprobs=3)
    two = logits[0, [4, 6]]
    values = two - np.log(np.exp(two).sum())
    np.testing.assert_allclose(got.logprobs[0, 0], values.max(), atol=1e-5)
    assert got.ranks[0] == 1
    assert set(np.asarray(got.logprob_ids[0, 1:3]).tolist()) == {4, 6}
    assert got.logprobs[0, 3] == -np.inf


def test_nothing_left_is_told_also_with_temperature() -> None:
    p = SamplingParams(temperature=1.0, allowed_token_ids=[1, 2], logprobs=1)
    assert int(run(random_logits(5), [Row(p, mask=(4, 6))]).token_ids[0]) == NO_TOKEN

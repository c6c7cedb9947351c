"""Absorbed latent attention equals attention over expanded heads in float64, without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from jaxserve.layers.kernels import XLA, Kernels, PageMetadata, kv_pages_shape
from jaxserve.layers.latent_attention import LatentAttention, LatentAttentionSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.layers.rope import RopeSpec, angles

SIZE, PAGE_SIZE, NUM_PAGES = 32, 4, 9


def make_spec(**changes: object) -> LatentAttentionSpec:
    fields: dict = {
        "num_heads": 3,
        "q_rank": 12,
        "kv_rank": 16,
        "nope_dim": 6,
        "rope_dim": 8,
        "value_dim": 10,
        "scale": 0.3,
        "rope": RopeSpec(head_dim=8, theta=100.0, interleaved=True),
        "norm": NormSpec(eps=1e-6),
    }
    return LatentAttentionSpec(**{**fields, **changes})


def make_layer(spec: LatentAttentionSpec) -> LatentAttention:
    attention = spec.attention(page_size=PAGE_SIZE, dtype=jnp.float32)
    layer = LatentAttention(
        SIZE, spec=spec, attention=attention, kernels=Kernels(XLA), dtype=jnp.float32
    )
    rng = np.random.default_rng(1)
    graph, state = nnx.split(layer)
    state = jax.tree.map(
        lambda w: jnp.asarray(rng.normal(size=w.shape, scale=0.4).astype(np.float32)), state
    )
    return nnx.merge(graph, state)


def turned(v: np.ndarray, position: int, rope: RopeSpec) -> np.ndarray:
    """One vector, rotated pair by pair."""
    out = v.copy()
    half = len(v) // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        angle = position * rope.theta ** (-2 * i / len(v))
        out[a] = v[a] * np.cos(angle) - v[b] * np.sin(angle)
        out[b] = v[b] * np.cos(angle) + v[a] * np.sin(angle)
    return out


def naive(layer: LatentAttention, x: np.ndarray) -> np.ndarray:
    """Keys and values of each head, then causal attention: what the paper's equations say."""
    spec = layer.spec
    N, nope, rope, value = spec.num_heads, spec.nope_dim, spec.rope_dim, spec.value_dim

    def value_of(param: nnx.Param) -> np.ndarray:
        return np.asarray(param[...], np.float64)

    def linear(module, v: np.ndarray) -> np.ndarray:
        y = v @ value_of(module.weight)
        return y if module.bias is None else y + value_of(module.bias)

    def norm(module, v: np.ndarray) -> np.ndarray:
        scale = np.sqrt((v * v).mean(-1, keepdims=True) + spec.norm.eps)
        return v / scale * value_of(module.weight)

    x = x.astype(np.float64)
    if spec.q_rank is None:
        q = linear(layer.q_proj, x)
    else:
        q = linear(layer.q_b_proj, norm(layer.q_a_norm, linear(layer.q_a_proj, x)))
    q = q.reshape(len(x), N, nope + rope)
    row = linear(layer.kv_a_proj, x)
    latent = norm(layer.kv_a_norm, row[:, : spec.kv_rank])
    outs = np.zeros((len(x), N, value))
    for n in range(N):
        k = latent @ value_of(layer.k_b)[n * nope : (n + 1) * nope].T
        v = latent @ value_of(layer.v_b)[n * value : (n + 1) * value].T
        keys = [
            np.concatenate([k[t], turned(row[t, spec.kv_rank :], t, spec.rope)])
            for t in range(len(x))
        ]
        for t in range(len(x)):
            query = np.concatenate([q[t, n, :nope], turned(q[t, n, nope:], t, spec.rope)])
            logits = np.array([spec.scale * query @ keys[s] for s in range(t + 1)])
            share = np.exp(logits - logits.max())
            outs[t, n] = (share / share.sum()) @ v[: t + 1]
    return linear(layer.o_proj, outs.reshape(len(x), -1))


@jax.jit
def run(
    layer: LatentAttention, x: Array, kv: Array, pages: PageMetadata, positions: Array
) -> tuple[Array, Array]:
    return layer(x, kv, pages, angles(layer.spec.rope, positions), positions, 1)


def served(layer: LatentAttention, x: np.ndarray, chunks: list[int]) -> np.ndarray:
    """The layer over pages in a scattered order, a chunk of tokens a step."""
    kv_spec = layer.attention_spec.kv
    shape = kv_pages_shape(kv_spec, 2, NUM_PAGES, backend=XLA)
    kv = jnp.full(shape.shape, jnp.nan, shape.dtype)
    table = np.random.default_rng(0).permutation(np.arange(1, NUM_PAGES)).astype(np.int32)
    rows, done = [], 0
    for size in chunks:
        positions = np.arange(done, done + size)
        pages = PageMetadata(
            page_table=jnp.asarray(table[None]),
            slots=jnp.asarray(table[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE),
            kv_lens=jnp.asarray([done + size]),
            query_starts=jnp.asarray([0, size]),
            num_rows=jnp.asarray(1),
            num_decode_rows=jnp.asarray(int(size == 1)),
            num_pages=NUM_PAGES,
        )
        out, kv = run(layer, jnp.asarray(x[positions]), kv, pages, jnp.asarray(positions))
        rows.append(np.asarray(out))
        done += size
    return np.concatenate(rows)


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(),
        make_spec(q_rank=None, rope=RopeSpec(head_dim=8, theta=100.0)),
        make_spec(bias=True, scale=0.5),
    ],
    ids=["latent-queries", "plain-queries", "biases"],
)
def test_absorbed_attention_equals_attention_over_expanded_heads(
    spec: LatentAttentionSpec,
) -> None:
    layer = make_layer(spec)
    x = np.random.default_rng(2).normal(size=(19, SIZE)).astype(np.float32)
    want = naive(layer, x)
    np.testing.assert_allclose(served(layer, x, [9, 1, 9]), want, atol=2e-5 * np.abs(want).max())


def test_the_cache_holds_one_row_a_token_whatever_the_heads() -> None:
    kv = make_spec(num_heads=64).attention(page_size=16, dtype=jnp.bfloat16).kv
    assert (kv.kind, kv.num_kv_heads, kv.head_dim, kv.out_dim) == ("latent", 1, 24, 16)

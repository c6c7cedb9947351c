"""Experts against a loop over tokens in float64, for every way in which models route."""

import dataclasses
import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.kernels import XLA, Kernels
from jaxserve.layers.moe import ClampedSwiGLU, MoE, MoESpec, RouterSpec, route

D, F, E = 16, 24, 8

ROUTERS = {
    "mixtral": RouterSpec(normalize=True),
    "qwen2": RouterSpec(),
    "granite": RouterSpec(order="topk_then_softmax"),
    "gpt_oss": RouterSpec(order="topk_then_softmax", bias=True),
    "deepseek_v2": RouterSpec(num_groups=4, top_groups=2, scale=16.0),
    "deepseek_v3": RouterSpec(
        scoring="sigmoid",
        correction=True,
        num_groups=4,
        top_groups=2,
        group_score="top2_sum",
        normalize=True,
        epsilon=1e-20,
        scale=2.5,
    ),
    "ernie": RouterSpec(correction=True, normalize=True, least_sum=0.5),
    "llama4": RouterSpec(scoring="sigmoid", scales_input=True),
    "phimoe": RouterSpec(scoring="sparsemixer", jitter=0.2),
}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def route_one(
    logits: np.ndarray, spec: RouterSpec, top_k: int, correction: np.ndarray
) -> dict[int, float]:
    """Experts of one token, with their weights."""
    if spec.scoring == "sparsemixer":
        chosen: dict[int, float] = {}
        for _ in range(top_k):
            others = {e: v for e, v in enumerate(logits) if e not in chosen}
            best = max(others, key=lambda e: others[e])
            top = others[best]
            near = {
                e: v for e, v in others.items() if (top - v) / max(abs(v), top) <= 2 * spec.jitter
            }
            chosen[best] = float(np.exp(top) / sum(np.exp(v) for v in near.values()))
        return chosen
    if spec.order == "topk_then_softmax":
        best = np.argsort(-logits)[:top_k]
        return dict(zip(best.tolist(), (spec.scale * softmax(logits[best])).tolist(), strict=True))
    scores = softmax(logits) if spec.scoring == "softmax" else sigmoid(logits)
    choice = scores + correction
    size = len(logits) // spec.num_groups
    groups = [choice[g * size : (g + 1) * size] for g in range(spec.num_groups)]
    totals = [np.sort(g)[-(1 if spec.group_score == "max" else 2) :].sum() for g in groups]
    allowed = np.argsort(-np.array(totals))[: spec.top_groups]
    ranked = [e for e in np.argsort(-choice).tolist() if e // size in allowed]
    weights = {e: float(scores[e]) for e in ranked[:top_k]}
    if spec.normalize:
        total = max(sum(weights.values()) + spec.epsilon, spec.least_sum)
        weights = {e: w / total for e, w in weights.items()}
    return {e: float(w * spec.scale) for e, w in weights.items()}


def random_moe(spec: MoESpec) -> MoE:
    """A block with random weights."""
    moe = MoE(D, spec=spec, kernels=Kernels(XLA), dtype=jnp.float32)
    rng = np.random.default_rng(3)
    graph, state = nnx.split(moe)
    state = jax.tree.map(
        lambda w: jnp.asarray(rng.normal(size=w.shape, scale=0.5).astype(np.float32)), state
    )
    return nnx.merge(graph, state)


run = jax.jit(lambda moe, x: moe(x))


def array(param: nnx.Param | None) -> np.ndarray:
    return np.zeros(1) if param is None else np.asarray(param[...], np.float64)


def plain(moe: MoE, x: np.ndarray) -> np.ndarray:
    """Token by token, expert by expert."""

    def linear(module, v: np.ndarray, expert: int | None = None) -> np.ndarray:
        at = ... if expert is None else expert
        y = v @ array(module.weight)[at]
        return y if module.bias is None else y + array(module.bias)[at]

    def silu(v: np.ndarray) -> np.ndarray:
        return v * sigmoid(v)

    def compute(v: np.ndarray, expert: int) -> np.ndarray:
        experts = moe.experts
        up = linear(experts.up_proj, v, expert)
        if experts.gate_proj is None:
            return linear(experts.down_proj, np.maximum(up, 0) ** 2, expert)
        gate = linear(experts.gate_proj, v, expert)
        hidden = silu(gate) * up
        if moe.spec.clamped is not None:
            alpha, limit = moe.spec.clamped.alpha, moe.spec.clamped.limit
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            hidden = (up + 1) * gate * sigmoid(alpha * gate)
        return linear(experts.down_proj, hidden, expert)

    out = np.zeros((len(x), D))
    for token, v in enumerate(x.astype(np.float64)):
        logits = v @ array(moe.router.weight)
        logits = logits + array(moe.router.bias)
        spec = moe.spec.router
        chosen = route_one(logits, spec, moe.spec.top_k, array(moe.router.correction))
        for expert, weight in chosen.items():
            if spec.scales_input:
                out[token] += compute(v * weight, expert)
            else:
                out[token] += weight * compute(v, expert)
        if moe.shared is not None:
            shared = silu(linear(moe.shared.gate_proj, v)) * linear(moe.shared.up_proj, v)
            shared = linear(moe.shared.down_proj, shared)
            if moe.shared_gate is not None:
                shared = shared * sigmoid(linear(moe.shared_gate, v))
            out[token] += shared
    return out


SPECS = {
    name: MoESpec(num_experts=E, top_k=2, intermediate_size=F, router=router)
    for name, router in ROUTERS.items()
}
SPECS["gpt_oss"] = dataclasses.replace(
    SPECS["gpt_oss"], bias=True, clamped=ClampedSwiGLU(limit=1.0)
)
SPECS["qwen2"] = dataclasses.replace(
    SPECS["qwen2"], shared=FFNSpec(intermediate_size=40), shared_gate=True
)
SPECS["deepseek_v3"] = dataclasses.replace(
    SPECS["deepseek_v3"], top_k=3, shared=FFNSpec(intermediate_size=40)
)
SPECS["ungated"] = dataclasses.replace(SPECS["mixtral"], gated=False, activation="relu2")


@pytest.mark.parametrize("name", SPECS)
def test_a_block_equals_a_loop_over_its_tokens(name: str) -> None:
    moe = random_moe(SPECS[name])
    x = np.random.default_rng(4).normal(size=(21, D)).astype(np.float32)
    want = plain(moe, x)
    got = np.asarray(run(moe, jnp.asarray(x)))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_chooses_and_weighs_as_the_loop_does(name: str) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(50, E), scale=2.0).astype(np.float32)
    correction = (rng.normal(size=E) * ROUTERS[name].correction).astype(np.float32)
    choose = jax.jit(functools.partial(route, top_k=3, spec=ROUTERS[name]))
    experts, weights = choose(logits, correction=correction if correction.any() else None)
    for row, logit in enumerate(logits.astype(np.float64)):
        want = route_one(logit, ROUTERS[name], 3, correction)
        got = dict(zip(np.asarray(experts)[row].tolist(), np.asarray(weights)[row], strict=True))
        assert got == pytest.approx(want, rel=1e-5)


def test_tokens_that_all_want_one_expert_are_all_served() -> None:
    moe = random_moe(dataclasses.replace(SPECS["gpt_oss"], top_k=1))
    assert moe.router.bias is not None
    moe.router.bias[...] = jnp.zeros(E).at[5].set(1e4)
    x = np.random.default_rng(6).normal(size=(40, D)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(run(moe, jnp.asarray(x))), plain(moe, x), atol=1e-4)


def test_a_token_gets_the_same_numbers_whoever_is_beside_it() -> None:
    moe = random_moe(SPECS["deepseek_v3"])
    x = np.random.default_rng(7).normal(size=(3, 16, D)).astype(np.float32)
    x[:, 4] = x[0, 4]
    rows = [np.asarray(run(moe, jnp.asarray(batch)))[4] for batch in x]
    for a, b in pairwise(rows):
        np.testing.assert_array_equal(a, b)


def test_the_correction_stays_in_float32_in_a_bfloat16_model() -> None:
    moe = MoE(D, spec=SPECS["ernie"], kernels=Kernels(XLA), dtype=jnp.bfloat16)
    assert moe.router.correction is not None
    assert moe.router.correction[...].dtype == jnp.float32
    assert jax.eval_shape(run, moe, jnp.zeros((2, D), jnp.bfloat16)).dtype == jnp.bfloat16

"""Mixture of experts (Shazeer et al., 2017): each token goes to the few that a router picks."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.layers.ffn import ACTIVATIONS, FFN, FFNSpec
from jaxserve.layers.kernels import Kernels
from jaxserve.layers.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How a router's logits become experts and their weights. Static.

    Scores are the softmax or the sigmoid of the logits. The `top_k` best are chosen by score plus
    `correction`, and weigh as much as their score; with "topk_then_softmax" the softmax is over the
    chosen alone. "sparsemixer" (Liu et al., 2023, arXiv 2310.00811, as PhiMoE has it) chooses one
    expert after the other, each weighed by the softmax over those that come near it.
    """

    scoring: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    order: Literal["score_then_topk", "topk_then_softmax"] = "score_then_topk"
    normalize: bool = False  # weights of a token sum to one
    epsilon: float = 0.0  # added to that sum
    least_sum: float = 0.0  # what the sum is at least
    scale: float = 1.0  # of the weights, last of all
    bias: bool = False  # a learned bias of the logits
    # A learned bias of the scores that only the choice sees (DeepSeek-V3, arXiv 2408.15664).
    correction: bool = False
    # Experts in groups, of which only the best `top_groups` take part (DeepSeek-V2 and V3).
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    scales_input: bool = False  # the weight multiplies an expert's input, not its output (Llama 4)
    jitter: float = 0.01  # sparsemixer: what comes near


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSwiGLU:
    """(up + 1) * gate * sigmoid(alpha * gate), both within the limit (GPT-OSS). Static."""

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: Array, up: Array) -> Array:
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """A feed-forward block of experts. Static."""

    num_experts: int
    top_k: int  # experts a token
    intermediate_size: int  # of one expert
    activation: str = "silu"  # a key of ACTIVATIONS
    gated: bool = True
    clamped: ClampedSwiGLU | None = None  # instead of the activation
    bias: bool = False
    router: RouterSpec = RouterSpec()
    shared: FFNSpec | None = None  # what every token passes besides
    shared_gate: bool = False  # its output times the sigmoid of one logit a token (Qwen2-MoE)

    @property
    def activation_size(self) -> int:
        """Values a token has inside the block."""
        routed = (3 if self.gated else 2) * self.intermediate_size * self.top_k
        return routed + (0 if self.shared is None else 2 * self.shared.intermediate_size)


class Router(nnx.Module):
    """Chooses each token's experts, in float32 whatever the model's type."""

    def __init__(self, size: int, *, spec: MoESpec, dtype: jax.typing.DTypeLike) -> None:
        self.spec = spec.router
        self.top_k = spec.top_k
        self.weight = nnx.Param(jnp.zeros((size, spec.num_experts), dtype))
        self.bias = nnx.Param(jnp.zeros((spec.num_experts,), dtype)) if self.spec.bias else None
        # In float32 always: a rounded correction would choose other experts.
        self.correction = (
            nnx.Param(jnp.zeros((spec.num_experts,), jnp.float32)) if self.spec.correction else None
        )

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x [T, D] -> ids of experts [T, top_k] and their weights, float32."""
        logits = jnp.matmul(
            x,
            self.weight[...],
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        if self.bias is not None:
            logits = logits + self.bias[...].astype(jnp.float32)
        return route(
            logits,
            top_k=self.top_k,
            spec=self.spec,
            correction=None if self.correction is None else self.correction[...],
        )


def route(
    logits: Array, *, top_k: int, spec: RouterSpec, correction: Array | None = None
) -> tuple[Array, Array]:
    """Logits [T, E], float32 -> ids of experts [T, top_k] and their weights."""
    if spec.scoring == "sparsemixer":
        return _sparsemixer(logits, top_k=top_k, jitter=spec.jitter)
    if spec.order == "topk_then_softmax":
        chosen, experts = jax.lax.top_k(logits, top_k)
        return experts, jax.nn.softmax(chosen, axis=-1) * spec.scale
    scores = (
        jax.nn.softmax(logits, axis=-1) if spec.scoring == "softmax" else jax.nn.sigmoid(logits)
    )
    choice = scores if correction is None else scores + correction
    if spec.top_groups < spec.num_groups:
        choice = _within_best_groups(choice, spec)
    _, experts = jax.lax.top_k(choice, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if spec.normalize:
        total = weights.sum(axis=-1, keepdims=True) + spec.epsilon
        weights = weights / jnp.maximum(total, spec.least_sum)
    return experts, weights * spec.scale


def _within_best_groups(choice: Array, spec: RouterSpec) -> Array:
    """choice [T, E] with minus infinity outside the groups of experts that score best."""
    grouped = choice.reshape(len(choice), spec.num_groups, -1)
    if spec.group_score == "max":
        group_scores = grouped.max(axis=-1)
    else:
        group_scores = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
    _, best = jax.lax.top_k(group_scores, spec.top_groups)  # [T, top_groups]
    kept = (best[:, :, None] == jnp.arange(spec.num_groups)).any(axis=1)  # [T, groups]
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


def _sparsemixer(logits: Array, *, top_k: int, jitter: float) -> tuple[Array, Array]:
    """Inference only: the best expert, then the best of the others, and so on."""
    experts, weights = [], []
    rest = logits
    for _ in range(top_k):
        top = rest.max(axis=-1, keepdims=True)
        expert = rest.argmax(axis=-1)
        distance = (top - logits) / jnp.maximum(jnp.abs(logits), top)
        near = jnp.where(distance > 2 * jitter, -jnp.inf, rest)
        share = jax.nn.softmax(near, axis=-1)
        experts.append(expert)
        weights.append(jnp.take_along_axis(share, expert[:, None], axis=-1)[:, 0])
        rest = jnp.where(jnp.arange(logits.shape[-1]) == expert[:, None], -jnp.inf, rest)
    return jnp.stack(experts, axis=-1), jnp.stack(weights, axis=-1)


class ExpertRows(NamedTuple):
    """Rows of tokens, sorted by expert: each token once for each of its experts."""

    experts: Array  # [T * top_k] which expert each row goes to
    group_sizes: Array  # [E] int32: rows of each expert


class GroupedLinear(nnx.Module):
    """One projection of all experts: y = x W[e] + b[e]."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool,
        kernels: Kernels,
        dtype: jax.typing.DTypeLike,
    ) -> None:
        self.kernels = kernels
        self.weight = nnx.Param(jnp.zeros((num_experts, in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros((num_experts, out_features), dtype)) if use_bias else None

    def __call__(self, x: Array, rows: ExpertRows) -> Array:  # [T * top_k, in] -> [.., out]
        y = self.kernels.grouped_matmul(x, self.weight[...], rows.group_sizes)
        if self.bias is None:
            return y
        return y + self.bias[...].at[rows.experts].get(mode="promise_in_bounds")


class Experts(nnx.Module):
    """The feed-forward blocks of all experts, each over its own rows."""

    def __init__(
        self, size: int, *, spec: MoESpec, kernels: Kernels, dtype: jax.typing.DTypeLike
    ) -> None:
        def linear(in_features: int, out_features: int) -> GroupedLinear:
            return GroupedLinear(
                spec.num_experts,
                in_features,
                out_features,
                use_bias=spec.bias,
                kernels=kernels,
                dtype=dtype,
            )

        self.spec = spec
        self.gate_proj = linear(size, spec.intermediate_size) if spec.gated else None
        self.up_proj = linear(size, spec.intermediate_size)
        self.down_proj = linear(spec.intermediate_size, size)

    def __call__(self, x: Array, rows: ExpertRows) -> Array:  # [T * top_k, D] -> the same
        act = ACTIVATIONS[self.spec.activation]
        up = self.up_proj(x, rows)
        if self.gate_proj is None:
            return self.down_proj(act(up), rows)
        gate = self.gate_proj(x, rows)
        clamped = self.spec.clamped
        hidden = act(gate) * up if clamped is None else clamped(gate, up)
        return self.down_proj(hidden, rows)


class MoE(nnx.Module):
    """Routes tokens, has their experts compute, adds what they say, weighted, and a shared block.

    Tokens are copied once for each of their experts and sorted by expert, so that each expert
    multiplies consecutive rows. None is dropped, and a token's result does not depend on what
    other tokens chose.
    """

    def __init__(
        self, size: int, *, spec: MoESpec, kernels: Kernels, dtype: jax.typing.DTypeLike
    ) -> None:
        self.spec = spec
        self.router = Router(size, spec=spec, dtype=dtype)
        self.experts = Experts(size, spec=spec, kernels=kernels, dtype=dtype)
        self.shared = None if spec.shared is None else FFN(size, spec=spec.shared, dtype=dtype)
        self.shared_gate = Linear(size, 1, dtype=dtype) if spec.shared_gate else None

    def __call__(self, x: Array) -> Array:  # [T, D] -> [T, D]
        experts, weights = self.router(x)
        out = self._routed(x, experts, weights)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = jax.nn.sigmoid(self.shared_gate(x)) * shared
            out = out + shared.astype(jnp.float32)
        return out.astype(x.dtype)

    def _routed(self, x: Array, experts: Array, weights: Array) -> Array:
        """x [T, D] by its experts [T, top_k] -> [T, D] float32."""
        num_tokens, top_k = experts.shape
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)  # [T * top_k] of pairs (token, choice), by expert
        place = jnp.argsort(order)  # of each pair among them
        ids = jnp.arange(self.spec.num_experts, dtype=jnp.int32)
        rows = ExpertRows(
            experts=_take(flat, order),
            group_sizes=jnp.sum(flat[:, None] == ids, axis=0, dtype=jnp.int32),
        )
        inputs = _take(x, order // top_k)
        if self.spec.router.scales_input:
            scales = _take(weights.reshape(-1, 1), order)
            inputs = (inputs * scales).astype(x.dtype)
        outputs = _take(self.experts(inputs, rows), place).reshape(num_tokens, top_k, -1)
        outputs = outputs.astype(jnp.float32)
        if self.spec.router.scales_input:
            return outputs.sum(axis=1)
        return (outputs * weights[:, :, None]).sum(axis=1)


def _take(array: Array, indices: Array) -> Array:
    """Rows of an array, at indices that are known to be in bounds."""
    return array.at[indices].get(mode="promise_in_bounds")

"""What families of mixtures of experts share: how layers get experts, where those are stored."""

from collections.abc import Callable
from dataclasses import replace

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.moe import MoESpec, RouterSpec
from jaxserve.models.config_fields import Config, activation, flag, number, positive
from jaxserve.models.names import Stored, matrix, plain
from jaxserve.models.spec import DecoderSpec


def with_experts(
    spec: DecoderSpec, moe: MoESpec, sparse: Callable[[int], bool] = lambda layer: True
) -> DecoderSpec:
    """A decoder whose layers have experts where `sparse` says so."""
    layers = tuple(
        replace(layer, ffn=moe) if sparse(i) else layer for i, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=layers)


def expert_names(
    place: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, Stored]:
    """Experts of which each has tensors of its own, within `place` of their layer."""
    return {
        f"ffn.experts.{ours}_proj.weight": matrix(f"{place}.experts.{{e}}.{theirs}.weight")
        for ours, theirs in (("gate", gate), ("up", up), ("down", down))
    }


def shared_names(place: str) -> dict[str, Stored]:
    """What every token passes besides."""
    return {
        f"ffn.shared.{part}_proj.weight": matrix(f"{place}.{part}_proj.weight")
        for part in ("gate", "up", "down")
    }


def deepseek_experts(config: Config, router: RouterSpec) -> MoESpec:
    """Experts and shared experts under DeepSeek's names of fields."""
    size = positive(config, "moe_intermediate_size")
    act = activation(config, "hidden_act", default="silu")
    num_shared = config.get("n_shared_experts")
    shared = positive(config, "n_shared_experts") if num_shared else 0
    return MoESpec(
        num_experts=positive(config, "n_routed_experts"),
        top_k=positive(config, "num_experts_per_tok"),
        intermediate_size=size,
        activation=act,
        router=router,
        shared=FFNSpec(intermediate_size=size * shared, activation=act) if shared else None,
    )


def deepseek_v3_router(
    config: Config, *, groups: int, top_groups: int, scale: float, normalize: bool
) -> RouterSpec:
    """DeepSeek-V3's (arXiv 2412.19437), with a family's defaults for silent fields."""
    groups = positive(config, "n_group", groups)
    return RouterSpec(
        scoring="sigmoid",
        correction=True,
        normalize=flag(config, "norm_topk_prob", normalize),
        epsilon=1e-20,
        scale=number(config, "routed_scaling_factor", scale),
        num_groups=groups,
        top_groups=positive(config, "topk_group", top_groups),
        group_score="top2_sum",
    )


DEEPSEEK_EXPERTS: dict[str, Stored] = {
    "ffn.router.weight": matrix("mlp.gate.weight"),
    "ffn.router.correction": plain("mlp.gate.e_score_correction_bias"),
    **expert_names("mlp"),
    **shared_names("mlp.shared_experts"),
}


def later_layers(spec: DecoderSpec, count: int = 4) -> tuple[str, ...]:
    """Layers that predict further tokens, stored behind the decoder's: nobody reads them."""
    first = spec.num_layers
    numbers = "|".join(str(first + i) for i in range(count))
    return (rf"model\.layers\.({numbers})\..*",)

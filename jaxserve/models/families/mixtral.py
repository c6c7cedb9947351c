"""Mixtral, PhiMoE and MiniMax-M2 as data: experts that are stored as w1, w2 and w3."""

from dataclasses import replace

from jaxserve.errors import UnsupportedError
from jaxserve.layers.moe import MoESpec, RouterSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.layers.rope import RopeSpec
from jaxserve.models.config_fields import (
    Config,
    activation,
    flag,
    number,
    positive,
    refuse,
    rope_parameters,
)
from jaxserve.models.experts import expert_names, later_layers, with_experts
from jaxserve.models.kin import NAMES, Kin
from jaxserve.models.names import WeightNames, matrix, plain
from jaxserve.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = (
    "MixtralForCausalLM",
    "PhimoeForCausalLM",
    "PhiMoEForCausalLM",
    "MiniMaxM2ForCausalLM",
)

KINDS = {
    "MixtralForCausalLM": Kin(
        qkv_bias=False, output_bias=False, window=True, eps=1e-5, context=4096 * 32
    ),
    "PhimoeForCausalLM": Kin(window=True, eps=1e-5, context=4096 * 32),
    "PhiMoEForCausalLM": Kin(window=True, eps=1e-5, context=4096 * 32),
    "MiniMaxM2ForCausalLM": Kin(qkv_bias=False, output_bias=False, qk_norm=True, context=196608),
}


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    name = config["architectures"][0]
    if name == "MiniMaxM2ForCausalLM":
        return _minimax_m2(config)
    config = {"rope_theta": 1e6, **config}
    spec = KINDS[name].decoder(config)
    if name == "MixtralForCausalLM":
        return with_experts(spec, _experts(config, RouterSpec(normalize=True)))
    router = RouterSpec(scoring="sparsemixer", jitter=number(config, "router_jitter_noise", 0.01))
    moe = _experts(config, router)
    if moe.top_k != 2:
        raise UnsupportedError(f"num_experts_per_tok={moe.top_k}: PhiMoE's router chooses 2")
    spec = replace(
        spec,
        norm=NormSpec(kind="layer", eps=spec.norm.eps, bias=True),
        head_bias=flag(config, "lm_head_bias"),
        layers=tuple(_with_mscale(layer, config) for layer in spec.layers),
    )
    return with_experts(spec, moe)


def _experts(config: Config, router: RouterSpec) -> MoESpec:
    return MoESpec(
        num_experts=positive(config, "num_local_experts"),
        top_k=positive(config, "num_experts_per_tok", 2),
        intermediate_size=positive(config, "intermediate_size"),
        activation=activation(config, "hidden_act", default="silu"),
        router=router,
    )


def _with_mscale(layer: LayerSpec, config: Config) -> LayerSpec:
    """PhiMoE says outright what cosines and sines are multiplied by."""
    rope = layer.attention.rope
    if not isinstance(rope, RopeSpec) or rope.kind == "default":
        return layer
    given = rope_parameters(config)
    rope = replace(
        rope,
        attention_factor=number(given, "short_mscale"),
        long_attention_factor=number(given, "long_mscale"),
    )
    return replace(layer, attention=replace(layer.attention, rope=rope))


def _minimax_m2(config: Config) -> DecoderSpec:
    refuse(config, scoring_func="sigmoid", use_qk_norm=True, qk_norm_type="per_layer")
    head_dim = positive(config, "head_dim", 128)
    share = positive(config, "rotary_dim", head_dim) / head_dim
    config = {"rope_theta": 5e6, "head_dim": head_dim, "partial_rotary_factor": share, **config}
    spec = KINDS["MiniMaxM2ForCausalLM"].decoder(config)
    layers = tuple(
        replace(layer, attention=replace(layer.attention, qk_norm_over="all"))
        for layer in spec.layers
    )
    router = RouterSpec(scoring="sigmoid", correction=True, normalize=True)
    return with_experts(replace(spec, layers=layers), _experts(config, router))


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where such a checkpoint keeps its weights."""
    place = "block_sparse_moe"
    norms = ("input_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")
    return WeightNames(
        top={
            **NAMES.top,
            "norm.bias": plain("model.norm.bias"),
            "head.bias": plain("lm_head.bias", prefixed=False),
        },
        layer={
            **NAMES.layer,
            **{f"{ours}.bias": plain(f"{theirs}.bias") for ours, theirs in norms},
            "ffn.router.weight": matrix(f"{place}.gate.weight"),
            "ffn.router.correction": plain(f"{place}.e_score_correction_bias"),
            **expert_names(place, gate="w1", up="w3", down="w2"),
        },
        ignored=later_layers(spec),
    )

"""Hunyuan's mixture of experts as data (Hunyuan-A13B)."""

from dataclasses import replace

from jaxserve.errors import UnsupportedError
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.moe import MoESpec, RouterSpec
from jaxserve.models.config_fields import Config, activation, number, positive, rope_parameters
from jaxserve.models.experts import expert_names, shared_names, with_experts
from jaxserve.models.kin import NAMES, Kin
from jaxserve.models.names import WeightNames, matrix, plain
from jaxserve.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("HunYuanMoEV1ForCausalLM",)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    spec = Kin(qk_norm=True, eps=1e-5).decoder(config)
    spec = replace(spec, layers=tuple(_layer(config, layer) for layer in spec.layers))
    size = positive(config, "intermediate_size")
    act = activation(config, "hidden_act", default="silu")
    moe = MoESpec(
        num_experts=_in_all_layers(config, "num_experts", "num_local_experts"),
        top_k=_in_all_layers(config, "moe_topk", "num_experts_per_tok"),
        intermediate_size=size,
        activation=act,
        router=RouterSpec(normalize=True),
        shared=FFNSpec(intermediate_size=size, activation=act),
    )
    return with_experts(spec, moe)


def _layer(config: Config, layer: LayerSpec) -> LayerSpec:
    """Queries and keys are normalised once they are turned; `alpha` stretches the base."""
    attention = replace(layer.attention, qk_norm_after_rope=True)
    given, rope = rope_parameters(config), attention.rope
    if rope is not None and rope.kind == "dynamic" and given.get("alpha"):
        alpha, dim = number(given, "alpha"), rope.head_dim
        theta = rope.theta * alpha ** (dim / (dim - 2))
        attention = replace(attention, rope=replace(rope, kind="default", theta=theta, factor=1.0))
    return replace(layer, attention=attention)


def _in_all_layers(config: Config, *names: str) -> int:
    """A count, which config.json may give once or for each layer."""
    name = next((n for n in names if config.get(n) is not None), names[0])
    value = config.get(name)
    if isinstance(value, list):
        if len(set(map(str, value))) != 1:
            raise UnsupportedError(f"{name} that differs by layer is not supported: {value}"[:300])
        value = value[0]
    return positive({name: value}, name)


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where such a checkpoint keeps its weights."""
    return WeightNames(
        top=NAMES.top,
        layer={
            **NAMES.layer,
            "attention.q_norm.weight": plain("self_attn.query_layernorm.weight"),
            "attention.k_norm.weight": plain("self_attn.key_layernorm.weight"),
            "ffn.router.weight": matrix("mlp.gate.wg.weight"),
            **expert_names("mlp"),
            **shared_names("mlp.shared_mlp"),
        },
    )

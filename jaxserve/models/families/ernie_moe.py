"""ERNIE 4.5's mixtures of experts as data."""

from dataclasses import replace

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.moe import MoESpec, RouterSpec
from jaxserve.layers.rope import RopeSpec
from jaxserve.models.config_fields import Config, activation, flag, number, positive
from jaxserve.models.experts import expert_names, later_layers, shared_names, with_experts
from jaxserve.models.kin import NAMES, Kin
from jaxserve.models.names import WeightNames, matrix, plain
from jaxserve.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("Ernie4_5_MoeForCausalLM",)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    bias = flag(config, "use_bias")
    config = {"rope_theta": 500000.0, **config, "mlp_bias": bias}
    kind = Kin(qkv_bias=bias, output_bias=bias, eps=1e-5, context=131072, tied=True)
    spec = kind.decoder(config)
    spec = replace(spec, layers=tuple(_interleaved(layer) for layer in spec.layers))
    size = positive(config, "moe_intermediate_size", 1536)
    act = activation(config, "hidden_act", default="silu")
    num_shared = config.get("moe_num_shared_experts", 2)
    shared = FFNSpec(intermediate_size=size * (num_shared or 1), activation=act, bias=bias)
    moe = MoESpec(
        num_experts=positive(config, "moe_num_experts", 64),
        top_k=positive(config, "moe_k", 6),
        intermediate_size=size,
        activation=act,
        router=RouterSpec(
            correction=True, normalize=True, least_sum=number(config, "moe_norm_min", 1e-12)
        ),
        shared=shared if num_shared else None,
    )
    first = config.get("moe_layer_start_index", 1)
    last = config.get("moe_layer_end_index")
    last = spec.num_layers - 1 if last is None or last == -1 else last
    step = positive(config, "moe_layer_interval", 1)
    return with_experts(spec, moe, lambda i: (i + 1) % step == 0 and first <= i <= last)


def _interleaved(layer: LayerSpec) -> LayerSpec:
    rope = layer.attention.rope
    if not isinstance(rope, RopeSpec):
        return layer
    return replace(layer, attention=replace(layer.attention, rope=replace(rope, interleaved=True)))


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where such a checkpoint keeps its weights."""
    return WeightNames(
        top=NAMES.top,
        layer={
            **NAMES.layer,
            "ffn.router.weight": matrix("mlp.gate.weight"),
            "ffn.router.correction": plain("mlp.moe_statics.e_score_correction_bias"),
            **expert_names("mlp"),
            **shared_names("mlp.shared_experts"),
            **{
                f"ffn.shared.{part}_proj.bias": plain(f"mlp.shared_experts.{part}_proj.bias")
                for part in ("gate", "up", "down")
            },
        },
        ignored=later_layers(spec),
    )

"""Phi-3, Phi-3.5 and Phi-4 as data: Llama with fused projections."""

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    LLAMA,
    LLAMA_TOP,
    alike,
    biases,
    decoder,
    gate_then_up,
    head_attention,
    packed,
    qkv_in_a_row,
    table,
)
from jaxserve.models.config_fields import (
    Config,
    activation,
    flag,
    heads,
    number,
    positive,
    rope_from_config,
)
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("Phi3ForCausalLM",)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Phi-3 or Phi-4 checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    norm = NormSpec(eps=number(config, "rms_norm_eps", 1e-5))
    context = positive(config, "max_position_embeddings", 4096)
    window = config.get("sliding_window")
    bias = flag(config, "attention_bias")
    attention = head_attention(
        config,
        rope=rope_from_config(config, head_dim=heads(config)[2], context=context),
        window=None if window is None else positive(config, "sliding_window"),
        **biases(bias, bias),
    )
    ffn = FFNSpec(
        intermediate_size=positive(config, "intermediate_size"),
        activation=activation(config, "hidden_act", default="silu"),
    )
    return decoder(config, alike(config, attention, ffn), norm, context=context, tied=False)


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a Phi-3 checkpoint keeps its weights."""
    layer = table(LLAMA)
    layer |= packed("self_attn.qkv_proj", qkv_in_a_row(spec))
    layer |= packed("mlp.gate_up_proj", gate_then_up(spec))
    return WeightNames(top=LLAMA_TOP, layer=layer)

"""OLMo 1, 2 and 3 as data."""

from dataclasses import replace

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    LLAMA,
    LLAMA_TOP,
    POST_NORMS,
    biases,
    decoder,
    every,
    head_attention,
    table,
    windows,
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
from jaxserve.models.spec import BlockSpec, DecoderSpec, LayerSpec

ARCHITECTURES = ("OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM")


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of an OLMo checkpoint.

    OLMo 1 normalises without learned weights, before; OLMo 2 and 3 normalise after, and queries and
    keys as a whole. OLMo 3 has windows in three of four layers, and scales the rotary embedding of
    the fourth only.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    architecture = config["architectures"][0]
    is_first, is_third = architecture == ARCHITECTURES[0], architecture == ARCHITECTURES[2]
    if is_first:
        norm = NormSpec(kind="layer", eps=1e-5, weight=False)
    else:
        norm = NormSpec(eps=number(config, "rms_norm_eps", 1e-5))
    context = positive(config, "max_position_embeddings", 2048)
    head_dim = heads(config)[2]
    theta = 500000.0 if is_third else 10000.0
    bias = flag(config, "attention_bias")
    attention = head_attention(
        config,
        rope=rope_from_config(
            config, head_dim=head_dim, context=context, kind="full_attention", theta=theta
        ),
        qk_norm=None if is_first else norm,
        qk_norm_over="all",
        clip=_clip(config) if is_first else None,
        **biases(bias, bias),
    )
    plain = {name: value for name, value in config.items() if name != "rope_scaling"}
    local = rope_from_config(
        plain, head_dim=head_dim, context=context, kind="sliding_attention", theta=theta
    )
    ffn = FFNSpec(
        intermediate_size=positive(config, "intermediate_size"),
        activation=activation(config, "hidden_act", default="silu"),
    )
    kinds = (
        every(4, config) if is_third else ["full_attention"] * positive(config, "num_hidden_layers")
    )
    seen = windows(config, kinds) if is_third else [None] * len(kinds)
    return decoder(
        config,
        tuple(
            LayerSpec(
                attention=attention
                if window is None
                else replace(attention, window=window, rope=local),
                ffn=ffn,
            )
            for window in seen
        ),
        norm,
        context=context,
        tied=False,
        block=BlockSpec()
        if is_first
        else BlockSpec(attention_in=False, ffn_in=False, attention_out=True, ffn_out=True),
    )


def _clip(config: Config) -> float | None:
    return None if config.get("clip_qkv") is None else number(config, "clip_qkv")


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where an OLMo checkpoint keeps its weights."""
    return WeightNames(
        top=LLAMA_TOP, layer=table(LLAMA | POST_NORMS if spec.block.ffn_out else LLAMA)
    )

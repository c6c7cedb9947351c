"""Command R (Cohere) and Command A, R7B, Aya (Cohere 2) as data."""

from dataclasses import replace

from jaxserve.errors import CheckpointError
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    LLAMA,
    LLAMA_TOP,
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

ARCHITECTURES = ("CohereForCausalLM", "Cohere2ForCausalLM")


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Cohere checkpoint.

    One norm feeds attention and feed-forward side by side. Cohere 2 has windows in all layers but
    each pattern's last, and rotates positions in there only.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    is_second = config["architectures"][0] == "Cohere2ForCausalLM"
    norm = NormSpec(kind="layer", eps=number(config, "layer_norm_eps", 1e-5))
    context = positive(config, "max_position_embeddings", 8192)
    bias = flag(config, "attention_bias")
    if is_second and flag(config, "use_qk_norm"):
        raise CheckpointError("config.json has use_qk_norm, which Cohere 2 has not")
    attention = head_attention(
        config,
        rope=rope_from_config(
            config,
            head_dim=heads(config)[2],
            context=context,
            theta=10000.0 if is_second else 500000.0,
            interleaved=True,
        ),
        qk_norm=norm if flag(config, "use_qk_norm") else None,
        qk_norm_over="heads",
        **biases(bias, bias),
    )
    ffn = FFNSpec(
        intermediate_size=positive(config, "intermediate_size"),
        activation=activation(config, "hidden_act", default="silu"),
    )
    attentions = [attention] * positive(config, "num_hidden_layers")
    if is_second:
        period = positive(config, "sliding_window_pattern", 4)
        attentions = [
            replace(attention, window=window, rope=None if window is None else attention.rope)
            for window in windows(config, every(period, config))
        ]
    return decoder(
        config,
        tuple(LayerSpec(attention=each, ffn=ffn) for each in attentions),
        norm,
        context=context,
        tied=True,
        logit_scale=number(config, "logit_scale", 0.0625),
        block=BlockSpec(parallel=True, ffn_in=False),
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a Cohere checkpoint keeps its weights."""
    return WeightNames(top=LLAMA_TOP, layer=table(LLAMA))

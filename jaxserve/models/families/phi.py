"""Phi 1, 1.5 and 2 as data: attention and feed-forward side by side."""

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    LLAMA,
    alike,
    biases,
    decoder,
    head_attention,
    table,
    top_table,
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
from jaxserve.models.spec import BlockSpec, DecoderSpec

ARCHITECTURES = ("PhiForCausalLM",)
MODULES = LLAMA | {
    "attention.o_proj": "self_attn.dense",
    "attention.q_norm": "self_attn.q_layernorm",
    "attention.k_norm": "self_attn.k_layernorm",
    "ffn.up_proj": "mlp.fc1",
    "ffn.down_proj": "mlp.fc2",
}


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Phi checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    norm = NormSpec(kind="layer", eps=number(config, "layer_norm_eps", 1e-5), bias=True)
    context = positive(config, "max_position_embeddings", 2048)
    attention = head_attention(
        config,
        rope=rope_from_config(config, head_dim=heads(config)[2], context=context, partial=0.5),
        qk_norm=norm if flag(config, "qk_layernorm") else None,
        **biases(True, True),
    )
    ffn = FFNSpec(
        intermediate_size=positive(config, "intermediate_size"),
        activation=activation(config, "hidden_act", default="gelu_new"),
        gated=False,
        bias=True,
    )
    return decoder(
        config,
        alike(config, attention, ffn),
        norm,
        context=context,
        tied=False,
        head_bias=True,
        block=BlockSpec(parallel=True, ffn_in=False),
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a Phi checkpoint keeps its weights."""
    top = top_table("model.embed_tokens", "model.final_layernorm", "lm_head")
    return WeightNames(top=top, layer=table(MODULES))

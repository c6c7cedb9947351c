"""GLM-4 and GLM-4-0414 as data, as transformers stores them."""

from jaxserve.models.building import (
    LLAMA,
    LLAMA_TOP,
    alike,
    decoder,
    gate_then_up,
    packed,
    table,
)
from jaxserve.models.config_fields import Config
from jaxserve.models.kin import Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import BlockSpec, DecoderSpec

ARCHITECTURES = ("GlmForCausalLM", "Glm4ForCausalLM")
KIN = Kin(
    eps=1.5625e-07,
    context=131072,
    head_dim=128,
    partial=0.5,
    interleaved=True,
    qkv_bias=("attention_bias", True),
    output_bias=False,
    mlp_bias=False,
)
# GLM-4-0414 also normalises what attention and feed-forward give.
MORE_NORMS = {
    "attention_out_norm": "post_self_attn_layernorm",
    "ffn_out_norm": "post_mlp_layernorm",
}


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a GLM-4 checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    more = config["architectures"][0] == "Glm4ForCausalLM"
    return decoder(
        config,
        alike(config, KIN.attention(config), KIN.ffn(config)),
        KIN.norm_spec(config),
        context=KIN.max_positions(config),
        tied=KIN.tied,
        block=BlockSpec(attention_out=more, ffn_out=more),
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a GLM-4 checkpoint keeps its weights."""
    layer = table(LLAMA | MORE_NORMS) | packed("mlp.gate_up_proj", gate_then_up(spec))
    return WeightNames(top=LLAMA_TOP, layer=layer)

"""GPT-NeoX and Pythia as data."""

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    alike,
    biases,
    decoder,
    head_attention,
    packed,
    qkv_by_head,
    renamed,
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

ARCHITECTURES = ("GPTNeoXForCausalLM",)
MODULES = {
    "input_norm": "input_layernorm",
    "attention.o_proj": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn.up_proj": "mlp.dense_h_to_4h",
    "ffn.down_proj": "mlp.dense_4h_to_h",
}
TOP = top_table("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
BUFFERS = (r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a GPT-NeoX checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    config = renamed(config, rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    config["num_key_value_heads"] = None  # there are as many keys as queries
    norm = NormSpec(kind="layer", eps=number(config, "layer_norm_eps", 1e-5), bias=True)
    context = positive(config, "max_position_embeddings", 2048)
    bias = flag(config, "attention_bias", True)
    attention = head_attention(
        config,
        rope=rope_from_config(config, head_dim=heads(config)[2], context=context, partial=0.25),
        **biases(bias, bias),
    )
    ffn = FFNSpec(
        intermediate_size=positive(config, "intermediate_size"),
        activation=activation(config, "hidden_act", default="gelu"),
        gated=False,
        bias=True,
    )
    return decoder(
        config,
        alike(config, attention, ffn),
        norm,
        context=context,
        tied=False,
        block=BlockSpec(parallel=flag(config, "use_parallel_residual", True)),
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a GPT-NeoX checkpoint keeps its weights."""
    layer = table(MODULES) | packed("attention.query_key_value", qkv_by_head(spec))
    return WeightNames(top=TOP, layer=layer, layers="gpt_neox.layers.{}.", ignored=BUFFERS)

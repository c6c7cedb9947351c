"""BLOOM as data: positions by biases that grow with the distance (Press et al., 2022)."""

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    alibi_slopes,
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
from jaxserve.models.config_fields import Config, number, positive, refuse
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("BloomForCausalLM",)
MODULES = {
    "input_norm": "input_layernorm",
    "attention.o_proj": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn.up_proj": "mlp.dense_h_to_4h",
    "ffn.down_proj": "mlp.dense_4h_to_h",
}
TOP = top_table("word_embeddings", "ln_f", "lm_head", embedding_norm="word_embeddings_layernorm")
CONTEXT = 2048  # that it was trained with; config.json does not say, and biases know no end


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a BLOOM checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    config = renamed(
        config, hidden_size="n_embed", num_attention_heads="n_head", num_hidden_layers="n_layer"
    )
    refuse(config, apply_residual_connection_post_layernorm=False)
    norm = NormSpec(kind="layer", eps=number(config, "layer_norm_epsilon", 1e-5), bias=True)
    hidden_size = positive(config, "hidden_size")
    num_heads = positive(config, "num_attention_heads")
    attention = head_attention(
        config, rope=None, alibi=alibi_slopes(num_heads), **biases(True, True)
    )
    ffn = FFNSpec(
        intermediate_size=4 * hidden_size, activation="gelu_pytorch_tanh", gated=False, bias=True
    )
    return decoder(
        config,
        alike(config, attention, ffn),
        norm,
        context=positive(config, "seq_length", CONTEXT),
        tied=True,
        embedding_norm=True,
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a BLOOM checkpoint keeps its weights."""
    layer = table(MODULES) | packed("self_attention.query_key_value", qkv_by_head(spec))
    return WeightNames(top=TOP, layer=layer, layers="h.{}.", prefixes=("transformer.", ""))

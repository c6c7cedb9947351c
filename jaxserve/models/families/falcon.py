"""Falcon (RefinedWeb 1B, 7B, 11B, 40B, 180B) as data."""

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
from jaxserve.models.config_fields import (
    Config,
    activation,
    flag,
    heads,
    number,
    positive,
    refuse,
    rope_from_config,
)
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import BlockSpec, DecoderSpec

ARCHITECTURES = ("FalconForCausalLM", "RWForCausalLM")
MODULES = {
    "input_norm": "input_layernorm",
    "attention.o_proj": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn.up_proj": "mlp.dense_h_to_4h",
    "ffn.down_proj": "mlp.dense_4h_to_h",
}
TWO_NORMS = {"input_norm": "ln_attn", "ffn_norm": "ln_mlp"}
TOP = top_table("word_embeddings", "ln_f", "lm_head")


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Falcon checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    config = renamed(
        config,
        hidden_size="n_embed",
        num_attention_heads="n_head",
        num_hidden_layers="n_layer",
        num_kv_heads="n_head_kv",
    )
    is_new = flag(config, "new_decoder_architecture")
    num_heads = positive(config, "num_attention_heads")
    # Whoever shares all keys and values has one kv head, whatever num_kv_heads says.
    if flag(config, "multi_query", True) and not is_new:
        num_kv_heads = 1
    else:
        num_kv_heads = positive(config, "num_kv_heads", num_heads)
    config = config | {"num_key_value_heads": num_kv_heads, "head_dim": None}
    head_dim = heads(config)[2]
    parallel = is_new or flag(config, "parallel_attn", True)
    norms = positive(config, "num_ln_in_parallel_attn", 2 if is_new else 1)
    if is_new:
        refuse(config, parallel_attn=True)
    norm = NormSpec(kind="layer", eps=number(config, "layer_norm_epsilon", 1e-5), bias=True)
    context = positive(config, "max_position_embeddings", 2048)
    bias = flag(config, "bias")
    alibi = flag(config, "alibi")
    attention = head_attention(
        config,
        rope=None if alibi else rope_from_config(config, head_dim=head_dim, context=context),
        # Falcon scales its biases as it does the logits.
        alibi=tuple(s * head_dim**-0.5 for s in alibi_slopes(num_heads)) if alibi else None,
        **biases(bias, bias),
    )
    ffn = FFNSpec(
        intermediate_size=positive(config, "ffn_hidden_size", 4 * positive(config, "hidden_size")),
        activation=activation(config, "activation", default="gelu"),
        gated=False,
        bias=bias,
    )
    return decoder(
        config,
        alike(config, attention, ffn),
        norm,
        context=context,
        tied=True,
        block=BlockSpec(parallel=parallel, ffn_in=not parallel or (is_new and norms == 2)),
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a Falcon checkpoint keeps its weights."""
    two = spec.block.parallel and spec.block.ffn_in
    layer = table(MODULES | TWO_NORMS if two else MODULES)
    layer |= packed("self_attention.query_key_value", qkv_by_head(spec))
    return WeightNames(top=TOP, layer=layer, layers="h.{}.", prefixes=("transformer.", ""))

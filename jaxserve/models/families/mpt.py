"""MPT as data."""

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    alike,
    biases,
    decoder,
    head_attention,
    mpt_slopes,
    packed,
    qkv_in_a_row,
    renamed,
    table,
    top_table,
)
from jaxserve.models.config_fields import Config, flag, number, positive, refuse
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("MptForCausalLM", "MPTForCausalLM")
MODULES = {
    "input_norm": "norm_1",
    "attention.o_proj": "attn.out_proj",
    "ffn_norm": "norm_2",
    "ffn.up_proj": "ffn.up_proj",
    "ffn.down_proj": "ffn.down_proj",
}
TOP = top_table("wte", "norm_f", "lm_head")


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of an MPT checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    config = renamed(
        config, hidden_size="d_model", num_attention_heads="n_heads", num_hidden_layers="n_layers"
    )
    attn = config.get("attn_config") or {}
    if not isinstance(attn, dict):
        raise CheckpointError("config.json of an MPT has an attn_config that is no object")
    refuse(config, no_bias=True, embedding_fraction=1.0)
    if config.get("logit_scale") is not None:
        raise UnsupportedError("config.json has logit_scale; only null is supported")
    refuse(attn, attn_type="multihead_attention", prefix_lm=False, qk_ln=False, rope=False)
    if not flag(attn, "alibi", True):
        raise UnsupportedError("attn_config has alibi=false; learned positions are not supported")
    norm = NormSpec(kind="layer", eps=number(config, "layer_norm_epsilon", 1e-5))
    options = {}
    if attn.get("softmax_scale") is not None:
        options["scale"] = number(attn, "softmax_scale")
    if attn.get("clip_qkv"):
        options["clip"] = number(attn, "clip_qkv")
    num_heads = positive(config, "num_attention_heads")
    attention = head_attention(
        config,
        rope=None,
        alibi=mpt_slopes(num_heads, number(attn, "alibi_bias_max", 8)),
        **options,
        **biases(False, False),
    )
    hidden_size = positive(config, "hidden_size")
    ffn = FFNSpec(
        intermediate_size=positive(config, "expansion_ratio", 4) * hidden_size,
        activation="gelu",
        gated=False,
    )
    return decoder(
        config,
        alike(config, attention, ffn),
        norm,
        context=positive(config, "max_seq_len", 2048),
        tied=True,
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where an MPT checkpoint keeps its weights."""
    layer = table(MODULES) | packed("attn.Wqkv", qkv_in_a_row(spec))
    return WeightNames(top=TOP, layer=layer, layers="blocks.{}.", prefixes=("transformer.", ""))

"""Persimmon as data."""

from jaxserve.models.building import (
    LLAMA,
    alike,
    decoder,
    packed,
    qkv_by_head,
    table,
    top_table,
)
from jaxserve.models.config_fields import Config, flag
from jaxserve.models.kin import Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("PersimmonForCausalLM",)
MODULES = LLAMA | {
    "attention.o_proj": "self_attn.dense",
    "attention.q_norm": "self_attn.q_layernorm",
    "attention.k_norm": "self_attn.k_layernorm",
    "ffn.up_proj": "mlp.dense_h_to_4h",
    "ffn.down_proj": "mlp.dense_4h_to_h",
}
TOP = top_table("model.embed_tokens", "model.final_layernorm", "lm_head")
KIN = Kin(
    norm="layer",
    norm_bias=True,
    eps_name="layer_norm_eps",
    eps=1e-5,
    activation="relu2",
    gated=False,
    context=16384,
    partial=0.5,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Persimmon checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    # There are as many keys as queries, whatever num_key_value_heads says.
    config = {**config, "num_key_value_heads": None}
    norm = KIN.norm_spec(config)
    normed = norm if flag(config, "qk_layernorm", True) else None
    return decoder(
        config,
        alike(config, KIN.attention(config, qk_norm=normed), KIN.ffn(config)),
        norm,
        context=KIN.max_positions(config),
        tied=KIN.tied,
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a Persimmon checkpoint keeps its weights."""
    layer = table(MODULES) | packed("self_attn.query_key_value", qkv_by_head(spec))
    return WeightNames(top=TOP, layer=layer)

"""ChatGLM 2, 3 and GLM-4 as data, as their authors store them."""

from jaxserve.models.building import (
    gate_then_up,
    packed,
    qkv_in_a_row,
    renamed,
    table,
)
from jaxserve.models.config_fields import Config, flag, number, positive, refuse
from jaxserve.models.families import glm
from jaxserve.models.names import WeightNames, matrix, plain
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
MODULES = {
    "input_norm": "input_layernorm",
    "attention.o_proj": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn.down_proj": "mlp.dense_4h_to_h",
}
TOP = {
    "embedding.weight": plain("transformer.embedding.word_embeddings.weight"),
    "norm.weight": plain("transformer.encoder.final_layernorm.weight"),
    "head.weight": matrix("transformer.output_layer.weight"),
}


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a ChatGLM checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    refuse(
        config,
        rmsnorm=True,
        post_layer_norm=True,
        original_rope=True,
        add_bias_linear=False,
        apply_residual_connection_post_layernorm=False,
        pre_seq_len=0,
        quantization_bit=0,
        use_cache=True,
    )
    config = renamed(
        config,
        vocab_size="padded_vocab_size",
        intermediate_size="ffn_hidden_size",
        num_hidden_layers="num_layers",
        max_position_embeddings="seq_length",
        head_dim="kv_channels",
        rms_norm_eps="layernorm_epsilon",
    )
    config["architectures"] = ["GlmForCausalLM"]
    config["rope_theta"] = 10000.0 * number(config, "rope_ratio", 1.0)
    config["attention_bias"] = flag(config, "add_qkv_bias")
    if flag(config, "multi_query_attention"):
        config["num_key_value_heads"] = positive(config, "multi_query_group_num", 1)
    return glm.spec_from_config(config)


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a ChatGLM checkpoint keeps its weights."""
    layer = table(MODULES)
    layer |= packed("self_attention.query_key_value", qkv_in_a_row(spec))
    layer |= packed("mlp.dense_h_to_4h", gate_then_up(spec))
    return WeightNames(
        top=TOP,
        layer=layer,
        layers="transformer.encoder.layers.{}.",
        ignored=(r"transformer\.rotary_pos_emb\.inv_freq",),
    )

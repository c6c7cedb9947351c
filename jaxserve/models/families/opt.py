"""OPT as data: learned positions, counted from 2."""

from jaxserve.errors import UnsupportedError
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import alike, biases, decoder, head_attention, table, top_table
from jaxserve.models.config_fields import Config, activation, flag, positive, refuse
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("OPTForCausalLM",)
OFFSET = 2
MODULES = {
    "input_norm": "self_attn_layer_norm",
    **{f"attention.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
    "attention.o_proj": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn.up_proj": "fc1",
    "ffn.down_proj": "fc2",
}
TOP = top_table(
    "decoder.embed_tokens",
    "decoder.final_layer_norm",
    "lm_head",
    position_embedding="decoder.embed_positions",
)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of an OPT checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    hidden_size = positive(config, "hidden_size")
    refuse(config, _remove_final_layer_norm=False, layer_norm_elementwise_affine=True)
    if not flag(config, "do_layer_norm_before", True) or (
        positive(config, "word_embed_proj_dim", hidden_size) != hidden_size
    ):
        raise UnsupportedError(
            "config.json has do_layer_norm_before=false or a word_embed_proj_dim of its own, as "
            "opt-350m has; of OPT, the other sizes are supported"
        )
    context = positive(config, "max_position_embeddings", 2048)
    norm = NormSpec(kind="layer", eps=1e-5, bias=True)
    bias = flag(config, "enable_bias", True)
    ffn = FFNSpec(
        intermediate_size=positive(config, "ffn_dim"),
        activation=activation(config, "activation_function", default="relu"),
        gated=False,
        bias=bias,
    )
    return decoder(
        config,
        alike(config, head_attention(config, rope=None, **biases(bias, bias)), ffn),
        norm,
        context=context,
        tied=True,
        position_rows=context + OFFSET,
        position_offset=OFFSET,
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where an OPT checkpoint keeps its weights."""
    return WeightNames(
        top=TOP, layer=table(MODULES), layers="decoder.layers.{}.", prefixes=("model.", "")
    )

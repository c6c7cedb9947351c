"""GPT-J as data: attention and feed-forward side by side, positions in pairs of columns."""

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.layers.rope import RopeSpec
from jaxserve.models.building import (
    alike,
    biases,
    decoder,
    head_attention,
    renamed,
    table,
    top_table,
)
from jaxserve.models.config_fields import Config, activation, heads, number, positive
from jaxserve.models.families.gpt2 import MASKS, SIZES
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import BlockSpec, DecoderSpec

ARCHITECTURES = ("GPTJForCausalLM",)
MODULES = {
    "input_norm": "ln_1",
    **{f"attention.{part}_proj": f"attn.{part}_proj" for part in "qkv"},
    "attention.o_proj": "attn.out_proj",
    "ffn.up_proj": "mlp.fc_in",
    "ffn.down_proj": "mlp.fc_out",
}
TOP = top_table("wte", "ln_f", "lm_head")
PREFIXES = ("transformer.", "")


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a GPT-J checkpoint, or of a CodeGen.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    config = renamed(config, **SIZES)
    norm = NormSpec(kind="layer", eps=number(config, "layer_norm_epsilon", 1e-5), bias=True)
    # Without rotary_dim, transformers makes angles for the hidden size, and rotates by the first.
    head_dim = heads(config)[2]
    rotated = positive(config, "rotary_dim", 64)
    attention = head_attention(
        config,
        rope=RopeSpec(head_dim=min(rotated, head_dim), theta=10000.0, interleaved=True),
        **biases(False, False),
    )
    ffn = FFNSpec(
        intermediate_size=positive(config, "n_inner", 4 * positive(config, "hidden_size")),
        activation=activation(config, "activation_function", default="gelu_new"),
        gated=False,
        bias=True,
    )
    return decoder(
        config,
        alike(config, attention, ffn),
        norm,
        context=positive(config, "max_position_embeddings", 2048),
        tied=False,
        head_bias=True,
        block=BlockSpec(parallel=True, ffn_in=False),
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a GPT-J checkpoint keeps its weights."""
    return WeightNames(
        top=TOP, layer=table(MODULES), layers="h.{}.", prefixes=PREFIXES, ignored=MASKS
    )

"""GPT-2 as data: learned positions."""

from dataclasses import replace
from typing import Any

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    biases,
    decoder,
    head_attention,
    packed,
    qkv_in_a_row,
    renamed,
    table,
    top_table,
)
from jaxserve.models.config_fields import Config, activation, flag, number, positive, refuse
from jaxserve.models.names import WeightNames, plain
from jaxserve.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("GPT2LMHeadModel",)
SIZES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
MODULES = {
    "input_norm": "ln_1",
    "attention.o_proj": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.up_proj": "mlp.c_fc",
    "ffn.down_proj": "mlp.c_proj",
}
TOP = top_table("wte", "ln_f", "lm_head", position_embedding="wpe")
MASKS = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)  # constants of old checkpoints
PREFIXES = ("transformer.", "")


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a GPT-2 checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    return gpt2_like(config, num_kv_heads=None, default_activation="gelu_new")


def gpt2_like(config: Config, *, num_kv_heads: int | None, default_activation: str) -> DecoderSpec:
    """A model of GPT-2's shape; without `num_kv_heads`, each head has its own keys."""
    config = renamed(config, **SIZES)
    refuse(config, add_cross_attention=False)
    num_layers = positive(config, "num_hidden_layers")
    hidden_size = positive(config, "hidden_size")
    rows = positive(config, "max_position_embeddings", 1024)
    norm = NormSpec(kind="layer", eps=number(config, "layer_norm_epsilon", 1e-5), bias=True)
    options: dict[str, Any] = biases(True, True)
    if not flag(config, "scale_attn_weights", True):
        options["scale"] = 1.0
    attention = head_attention(config | {"num_key_value_heads": num_kv_heads}, rope=None, **options)
    by_layer = flag(config, "scale_attn_by_inverse_layer_idx")
    ffn = FFNSpec(
        intermediate_size=positive(config, "n_inner", 4 * hidden_size),
        activation=activation(config, "activation_function", default=default_activation),
        gated=False,
        bias=True,
    )
    layers = tuple(
        LayerSpec(
            attention=replace(attention, scale=attention.scale / (i + 1 if by_layer else 1)),
            ffn=ffn,
        )
        for i in range(num_layers)
    )
    return decoder(config, layers, norm, context=rows, tied=True, position_rows=rows)


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a GPT-2 checkpoint keeps its weights, as [in, out]."""
    layer = table(MODULES, linear=plain)
    layer |= packed("attn.c_attn", qkv_in_a_row(spec, axis=-1), linear=plain)
    return WeightNames(top=TOP, layer=layer, layers="h.{}.", prefixes=PREFIXES, ignored=MASKS)

"""GPT-Neo as data: learned positions, and a window in every other layer."""

from dataclasses import replace

from jaxserve.errors import CheckpointError
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    biases,
    decoder,
    head_attention,
    renamed,
    table,
    top_table,
)
from jaxserve.models.config_fields import Config, activation, number, positive
from jaxserve.models.families.gpt2 import PREFIXES
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("GPTNeoForCausalLM",)
MODULES = {
    "input_norm": "ln_1",
    **{f"attention.{part}_proj": f"attn.attention.{part}_proj" for part in "qkv"},
    "attention.o_proj": "attn.attention.out_proj",
    "ffn_norm": "ln_2",
    "ffn.up_proj": "mlp.c_fc",
    "ffn.down_proj": "mlp.c_proj",
}
TOP = top_table("wte", "ln_f", "lm_head", position_embedding="wpe")
MASKS = (r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)",)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a GPT-Neo checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    config = renamed(config, num_attention_heads="num_heads", num_hidden_layers="num_layers")
    norm = NormSpec(kind="layer", eps=number(config, "layer_norm_epsilon", 1e-5), bias=True)
    rows = positive(config, "max_position_embeddings", 2048)
    # GPT-Neo does not scale its logits.
    attention = head_attention(config, rope=None, scale=1.0, **biases(False, True))
    ffn = FFNSpec(
        intermediate_size=positive(
            config, "intermediate_size", 4 * positive(config, "hidden_size")
        ),
        activation=activation(config, "activation_function", default="gelu_new"),
        gated=False,
        bias=True,
    )
    window = positive(config, "window_size", 256)
    layers = tuple(
        LayerSpec(attention=replace(attention, window=window if kind == "local" else None), ffn=ffn)
        for kind in _kinds(config)
    )
    return decoder(config, layers, norm, context=rows, tied=True, position_rows=rows)


def _kinds(config: Config) -> list[str]:
    """attention_types [[[kind, ...], repeats], ...] written out."""
    num_layers = positive(config, "num_hidden_layers")
    types = config.get("attention_types") or [[["global", "local"], num_layers // 2]]
    try:
        kinds = [
            k for pattern, repeats in types for _ in range(min(repeats, 1024)) for k in pattern
        ]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != num_layers or not set(kinds) <= {"global", "local"}:
        raise CheckpointError(
            f"config.json has attention_types={str(types)[:200]}; patterns of 'global' and 'local' "
            f"with their repeats are needed, {num_layers} layers in all"
        )
    return kinds


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a GPT-Neo checkpoint keeps its weights."""
    return WeightNames(
        top=TOP, layer=table(MODULES), layers="h.{}.", prefixes=PREFIXES, ignored=MASKS
    )

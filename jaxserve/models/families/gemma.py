"""Gemma 1, 2 and 3 (text) as data."""

import math
from dataclasses import replace
from typing import Any

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.layers.rope import RopeSpec
from jaxserve.models.building import (
    LLAMA,
    biases,
    decoder,
    every,
    head_attention,
    table,
    top_table,
    windows,
)
from jaxserve.models.config_fields import (
    Config,
    activation,
    flag,
    number,
    positive,
    refuse,
    rope_from_config,
)
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import BlockSpec, DecoderSpec, LayerSpec

ARCHITECTURES = (
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
)
# What the nested config of Gemma 3's checkpoints leaves out.
GEMMA3 = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
}
NORMS = LLAMA | {
    "attention_out_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_out_norm": "post_feedforward_layernorm",
}
VISION = (r"(model\.)?(vision_tower|multi_modal_projector)\..*",)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Gemma checkpoint; of one with a vision tower, the text model's part.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    architecture = config["architectures"][0]
    if architecture == "Gemma3ForConditionalGeneration":
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise CheckpointError("config.json of a Gemma 3 with vision needs a text_config")
        config = text
    is_gemma3 = architecture.startswith("Gemma3")
    if is_gemma3:
        if config.get("attn_logit_softcapping") is not None:
            raise UnsupportedError("Gemma 3 caps no logits of attention: no attn_logit_softcapping")
        config = GEMMA3 | {name: value for name, value in config.items() if value is not None}
    refuse(config, use_bidirectional_attention=False)
    norm = NormSpec(eps=number(config, "rms_norm_eps", 1e-6), plus_one=True)
    context = positive(config, "max_position_embeddings", 8192)
    act = activation(config, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    ffn = FFNSpec(
        intermediate_size=positive(config, "intermediate_size"),
        # Released configs say "gelu" and mean its approximation.
        activation="gelu_pytorch_tanh" if act == "gelu" else act,
    )
    bias = flag(config, "attention_bias")
    attention = head_attention(
        config,
        rope=rope_from_config(config, head_dim=positive(config, "head_dim", 256), context=context),
        **biases(bias, bias),
    )
    options: dict[str, Any] = {}
    if architecture == "GemmaForCausalLM":
        layers = (LayerSpec(attention=attention, ffn=ffn),) * positive(config, "num_hidden_layers")
    else:
        scale = number(config, "query_pre_attn_scalar", 256.0) ** -0.5
        attention = replace(
            attention,
            scale=scale,
            soft_cap=None if is_gemma3 else _soft_cap(config, "attn_logit_softcapping", 50.0),
            qk_norm=norm if is_gemma3 else None,
        )
        period = positive(config, "sliding_window_pattern", 6) if is_gemma3 else 2
        ropes = _gemma3_ropes(config, attention.head_dim, context) if is_gemma3 else {}
        layers = tuple(
            LayerSpec(
                attention=replace(
                    attention, window=window, rope=ropes.get(window is None, attention.rope)
                ),
                ffn=ffn,
            )
            for window in windows(config, every(period, config))
        )
        options["logit_soft_cap"] = _soft_cap(
            config, "final_logit_softcapping", None if is_gemma3 else 30.0
        )
    if architecture not in ("GemmaForCausalLM", "VaultGemmaForCausalLM"):
        options["block"] = BlockSpec(attention_out=True, ffn_out=True)
    return decoder(
        config,
        layers,
        norm,
        context=context,
        tied=True,
        embedding_scale=math.sqrt(positive(config, "hidden_size")),
        **options,
    )


def _soft_cap(config: Config, name: str, default: float | None) -> float | None:
    """null switches a cap off; where the field is missing, the family's default counts."""
    value = config.get(name, default)
    return None if value is None else number({name: value}, name)


def _gemma3_ropes(config: Config, head_dim: int, context: int) -> dict[bool, RopeSpec]:
    """Rotary embeddings of layers that attend to all (True), and of those with a window (False).

    Only the former are scaled to longer contexts.
    """
    older = {name: value for name, value in config.items() if name != "rope_scaling"}
    local = number(config, "rope_local_base_freq", 10000.0)
    if config.get("rope_parameters") is None:
        older["rope_theta"] = local
    elif not isinstance(config["rope_parameters"], dict):
        raise UnsupportedError("rope_parameters of Gemma 3 must be an object, by kind of layer")
    return {
        True: rope_from_config(
            config, head_dim=head_dim, context=context, kind="full_attention", theta=1e6
        ),
        False: rope_from_config(
            older, head_dim=head_dim, context=context, kind="sliding_attention", theta=local
        ),
    }


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a Gemma checkpoint keeps its weights; vision's are left alone."""
    return names(NORMS if spec.block.ffn_out else LLAMA)


def names(modules: dict[str, str]) -> WeightNames:
    """The tables for layers of these modules."""
    return WeightNames(
        top=top_table("embed_tokens", "norm", "lm_head"),
        layer=table(modules),
        layers="layers.{}.",
        prefixes=("model.", "language_model.model.", "model.language_model."),
        ignored=VISION,
    )

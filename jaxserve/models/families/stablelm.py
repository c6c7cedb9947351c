"""StableLM 2 and Orion as data: Llama with layer norms."""

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    LLAMA,
    LLAMA_TOP,
    alike,
    biases,
    decoder,
    head_attention,
    renamed,
    table,
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

ARCHITECTURES = ("StableLmForCausalLM", "StableLMEpochForCausalLM", "OrionForCausalLM")
# Norms of queries and keys: a tensor for each head.
MODULES = LLAMA | {
    "attention.q_norm": "self_attn.q_layernorm.norms.{e}",
    "attention.k_norm": "self_attn.k_layernorm.norms.{e}",
}


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a StableLM or Orion checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    is_orion = config["architectures"][0] == "OrionForCausalLM"
    if is_orion:
        refuse(config, attention_bias=False)
    names = {"layer_norm_eps": "rms_norm_eps" if is_orion else "norm_eps"}
    config = renamed(config, partial_rotary_factor="rope_pct", **names)
    eps = number(config, "layer_norm_eps", 1e-5)
    context = positive(config, "max_position_embeddings", 4096)
    attention = head_attention(
        config,
        rope=rope_from_config(
            config,
            head_dim=heads(config)[2],
            context=context,
            partial=1.0 if is_orion else 0.25,
        ),
        qk_norm=NormSpec(kind="layer", eps=eps) if flag(config, "qk_layernorm") else None,
        qk_norm_over="heads",
        **biases(flag(config, "use_qkv_bias"), False),
    )
    ffn = FFNSpec(
        intermediate_size=positive(config, "intermediate_size"),
        activation=activation(config, "hidden_act", default="silu"),
    )
    parallel = flag(config, "use_parallel_residual")
    return decoder(
        config,
        alike(config, attention, ffn),
        NormSpec(kind="layer", eps=eps, bias=True),
        context=context,
        tied=False,
        block=BlockSpec(parallel=parallel, ffn_in=not parallel),
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a StableLM checkpoint keeps its weights."""
    return WeightNames(top=LLAMA_TOP, layer=table(MODULES))

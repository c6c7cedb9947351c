"""Granite and its like as data: Llama with factors here and there."""

from dataclasses import replace

from jaxserve.errors import CheckpointError
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import (
    LLAMA,
    LLAMA_TOP,
    biases,
    decoder,
    every,
    head_attention,
    renamed,
    table,
    windows,
)
from jaxserve.models.config_fields import (
    Config,
    activation,
    flag,
    heads,
    number,
    positive,
    rope_from_config,
)
from jaxserve.models.names import WeightNames, plain
from jaxserve.models.spec import BlockSpec, DecoderSpec, LayerSpec

ARCHITECTURES = (
    "GraniteForCausalLM",
    "GraniteSWAForCausalLM",
    "HyperCLOVAXForCausalLM",
    "MiniCPMForCausalLM",
)
HYPERCLOVAX = {"attention_out_norm": "post_norm1", "ffn_out_norm": "post_norm2"}


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Granite checkpoint, or of HyperCLOVA X or MiniCPM.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    architecture = config["architectures"][0]
    head_dim = heads(config)[2]
    if architecture == "MiniCPMForCausalLM":
        config = _minicpm_as_granite(config)
    default_scale = head_dim**-0.5 if architecture[0] in "HM" else 1.0
    norm = NormSpec(eps=number(config, "rms_norm_eps", 1e-6))
    context = positive(config, "max_position_embeddings", 2048)
    bias = flag(config, "attention_bias")
    attention = head_attention(
        config,
        scale=number(config, "attention_multiplier", default_scale),
        rope=rope_from_config(config, head_dim=head_dim, context=context),
        sinks=architecture == "GraniteSWAForCausalLM",
        **biases(bias, bias),
    )
    ffn = FFNSpec(
        intermediate_size=positive(config, "intermediate_size"),
        activation=activation(config, "hidden_act", default="silu"),
        bias=flag(config, "mlp_bias"),
    )
    num_layers = positive(config, "num_hidden_layers")
    attentions = [attention] * num_layers
    if architecture == "GraniteSWAForCausalLM":
        ropes = _ropes(config, num_layers, head_dim, context)
        attentions = [
            replace(attention, window=window, rope=rope)
            for window, rope in zip(
                windows(config, every(4, config, first=True)), ropes, strict=True
            )
        ]
    is_hyperclovax = architecture == "HyperCLOVAXForCausalLM"
    post = is_hyperclovax and flag(config, "use_post_norm", True)
    logits_scaling = _nonzero(config, "logits_scaling")
    return decoder(
        config,
        tuple(LayerSpec(attention=attention, ffn=ffn) for attention in attentions),
        norm,
        context=context,
        tied=architecture in ("GraniteSWAForCausalLM", "MiniCPMForCausalLM"),
        embedding_scale=number(config, "embedding_multiplier", 1.0),
        logit_scale=logits_scaling if is_hyperclovax else 1 / logits_scaling,
        block=BlockSpec(
            attention_out=post,
            ffn_out=post,
            residual_scale=number(config, "residual_multiplier", 1.0),
        ),
    )


def _nonzero(config: Config, name: str) -> float:
    value = number(config, name, 1.0)
    if value == 0:
        raise CheckpointError(f"config.json has {name}=0; the logits are divided by it")
    return value


def _ropes(config: Config, num_layers: int, head_dim: int, context: int) -> list:
    """Of each layer; a theta of 0 means none."""
    thetas = config.get("layer_rope_theta")
    if thetas is None:
        return [rope_from_config(config, head_dim=head_dim, context=context)] * num_layers
    if not isinstance(thetas, list) or len(thetas) != num_layers:
        raise CheckpointError(f"layer_rope_theta needs {num_layers} numbers, one for each layer")
    ropes = []
    for theta in thetas:
        theta = number({"layer_rope_theta": theta}, "layer_rope_theta")
        rope = rope_from_config(config, head_dim=head_dim, context=context)
        ropes.append(replace(rope, theta=theta) if theta else None)
    return ropes


def _minicpm_as_granite(config: Config) -> Config:
    """MiniCPM's factors (arXiv 2404.06395, section 3) under Granite's names."""
    hidden_size, num_layers = positive(config, "hidden_size"), positive(config, "num_hidden_layers")
    depth = number(config, "scale_depth", num_layers**0.5)
    base = positive(config, "dim_model_base", hidden_size)
    return renamed(config, embedding_multiplier="scale_emb") | {
        "residual_multiplier": depth / num_layers**0.5,
        "logits_scaling": hidden_size / base,
    }


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a checkpoint of these families keeps its weights."""
    sinks = {"attention.sinks": plain("self_attn.sinks")}
    return WeightNames(top=LLAMA_TOP, layer=table(LLAMA | HYPERCLOVAX) | sinks)

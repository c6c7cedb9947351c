"""The text model of Llama 4 as data: chunks and full attention, experts that scale their input."""

from collections.abc import Mapping
from dataclasses import replace

from jaxserve.errors import CheckpointError
from jaxserve.layers.attention import HeadAttentionSpec, Temperature
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.moe import MoESpec, RouterSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.model_index import Part
from jaxserve.models.config_fields import (
    Config,
    activation,
    flag,
    heads,
    layer_kinds,
    number,
    positive,
    rope_from_config,
)
from jaxserve.models.experts import shared_names, with_experts
from jaxserve.models.kin import NAMES
from jaxserve.models.names import Stored, WeightNames, matrix, plain
from jaxserve.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json; of a model that sees images, what is said of its text model.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = text
    config = {name: value for name, value in config.items() if value is not None}
    config = {"rope_theta": 500000.0, **config}
    context = positive(config, "max_position_embeddings", 4096 * 32)
    num_layers = positive(config, "num_hidden_layers")
    act = activation(config, "hidden_act", default="silu")
    attentions = _attentions(config, context, num_layers)
    dense = FFNSpec(
        intermediate_size=positive(config, "intermediate_size_mlp", 16384), activation=act
    )
    size = positive(config, "intermediate_size")
    moe = MoESpec(
        num_experts=positive(config, "num_local_experts"),
        top_k=positive(config, "num_experts_per_tok", 1),
        intermediate_size=size,
        activation=act,
        router=RouterSpec(scoring="sigmoid", scales_input=True),
        shared=FFNSpec(intermediate_size=size, activation=act),
    )
    spec = DecoderSpec(
        vocab_size=positive(config, "vocab_size"),
        hidden_size=positive(config, "hidden_size"),
        max_position_embeddings=context,
        layers=tuple(LayerSpec(attention=each, ffn=dense) for each in attentions),
        norm=NormSpec(eps=number(config, "rms_norm_eps", 1e-5)),
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
    )
    step = positive(config, "interleave_moe_layer_step", 1)
    sparse = set(config.get("moe_layers") or range(step - 1, num_layers, step))
    return with_experts(spec, moe, lambda i: i in sparse)


def _attentions(config: Config, context: int, num_layers: int) -> list[HeadAttentionSpec]:
    """That of each layer: some rotate within chunks, the others see all and do not rotate."""
    num_heads, num_kv_heads, head_dim = heads({"head_dim": 128, **config})
    bias = flag(config, "attention_bias")
    plain_attention = HeadAttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=None,
        q_bias=bias,
        k_bias=bias,
        v_bias=bias,
        output_bias=bias,
    )
    rotated = replace(
        plain_attention,
        rope=rope_from_config(config, head_dim=head_dim, context=context, interleaved=True),
        qk_norm_after_rope=True,
        qk_norm=NormSpec(eps=number(config, "rms_norm_eps", 1e-5), weight=False)
        if flag(config, "use_qk_norm", True)
        else None,
    )
    if flag(config, "attn_temperature_tuning", True):
        plain_attention = replace(
            plain_attention,
            temperature=Temperature(
                floor_scale=number(config, "floor_scale", 8192),
                scale=number(config, "attn_scale", 0.1),
            ),
        )
    interval = positive(config, "no_rope_layer_interval", 4)
    ropes = config.get("no_rope_layers") or [
        int((i + 1) % interval != 0) for i in range(num_layers)
    ]
    if not isinstance(ropes, list) or len(ropes) < num_layers:
        raise CheckpointError(
            f"config.json has no_rope_layers={str(ropes)[:200]}; a list of {num_layers} is needed"
        )
    ropes = ropes[:num_layers]
    kinds = layer_kinds(config, ["chunked_attention" if r else "full_attention" for r in ropes])
    window = positive(config, "attention_chunk_size", 8192)
    found = []
    for rope, kind in zip(ropes, kinds, strict=True):
        attention = rotated if rope else plain_attention
        if kind == "chunked_attention":
            attention = replace(attention, window=window, chunked=True)
        found.append(attention)
    return found


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where such a checkpoint keeps its weights."""
    place = "feed_forward"
    layer: dict[str, Stored] = {
        **NAMES.layer,
        **{
            f"ffn.{part}_proj.weight": matrix(f"{place}.{part}_proj.weight")
            for part in ("gate", "up", "down")
        },
        "ffn.router.weight": matrix(f"{place}.router.weight"),
        "ffn.experts.down_proj.weight": plain(f"{place}.experts.down_proj"),
        **shared_names(f"{place}.shared_expert"),
    }
    moe = next((each.ffn for each in spec.layers if isinstance(each.ffn, MoESpec)), None)
    if moe is not None:
        size = moe.intermediate_size
        for start, part in ((0, "gate"), (size, "up")):
            columns = Part(start=start, stop=start + size, group_size=2 * size, axis=-1)
            layer[f"ffn.experts.{part}_proj.weight"] = plain(
                f"{place}.experts.gate_up_proj", columns
            )
    return WeightNames(
        top={**NAMES.top, "head.weight": matrix("lm_head.weight")},
        layer=layer,
        prefixes=("language_model.", ""),
        ignored=(r"(vision_model|multi_modal_projector)\..*",),
    )

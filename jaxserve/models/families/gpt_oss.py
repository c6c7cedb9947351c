"""GPT-OSS (arXiv 2508.10925) as data: attention sinks, clamped experts, gates and ups in turns."""

from dataclasses import replace

from jaxserve.layers.moe import ClampedSwiGLU, MoESpec, RouterSpec
from jaxserve.model_index import Part
from jaxserve.models.config_fields import Config, number, positive
from jaxserve.models.experts import with_experts
from jaxserve.models.kin import NAMES, Kin
from jaxserve.models.names import Stored, WeightNames, matrix, plain
from jaxserve.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("GptOssForCausalLM",)

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    given = {name: value for name, value in config.items() if value is not None}
    given.setdefault("rope_theta", 150000.0)
    given.setdefault("attention_bias", True)
    given.setdefault("head_dim", 64)
    given.setdefault("sliding_window", 128)
    if "rope_scaling" not in given and "rope_parameters" not in given:
        given["rope_scaling"] = _ROPE
    num_layers = positive(given, "num_hidden_layers")
    kinds = ("sliding_attention", "full_attention")
    given.setdefault("layer_types", [kinds[i % 2] for i in range(num_layers)])
    spec = Kin(window=True, eps=1e-5, context=131072).decoder(given)
    moe = MoESpec(
        num_experts=positive(given, "num_local_experts"),
        top_k=positive(given, "num_experts_per_tok", 4),
        intermediate_size=positive(given, "intermediate_size"),
        clamped=ClampedSwiGLU(
            alpha=number(given, "swiglu_alpha", 1.702), limit=number(given, "swiglu_limit", 7.0)
        ),
        bias=True,
        router=RouterSpec(order="topk_then_softmax", bias=True),
    )
    return with_experts(replace(spec, layers=tuple(_with_sinks(x) for x in spec.layers)), moe)


def _with_sinks(layer: LayerSpec) -> LayerSpec:
    return replace(layer, attention=replace(layer.attention, sinks=True))


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where such a checkpoint keeps its weights; MXFP4 experts bear the names of plain ones."""
    layer: dict[str, Stored] = {
        **NAMES.layer,
        "attention.sinks": plain("self_attn.sinks"),
        "ffn.router.weight": matrix("mlp.router.weight"),
        "ffn.router.bias": plain("mlp.router.bias"),
        "ffn.experts.down_proj.weight": plain("mlp.experts.down_proj"),
        "ffn.experts.down_proj.bias": plain("mlp.experts.down_proj_bias"),
    }
    moe = spec.layers[0].ffn
    for place, part in enumerate(("gate", "up")):
        columns = Part(
            start=place, stop=place + 1, group_size=2, groups=moe.intermediate_size, axis=-1
        )
        layer[f"ffn.experts.{part}_proj.weight"] = plain("mlp.experts.gate_up_proj", columns)
        layer[f"ffn.experts.{part}_proj.bias"] = plain("mlp.experts.gate_up_proj_bias", columns)
    return WeightNames(top=NAMES.top, layer=layer)

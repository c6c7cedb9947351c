"""Qwen2-MoE, Qwen3-MoE and OLMoE as data."""

from dataclasses import replace

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.moe import MoESpec, RouterSpec
from jaxserve.models.config_fields import Config, activation, flag, number, positive
from jaxserve.models.experts import expert_names, shared_names, with_experts
from jaxserve.models.kin import NAMES, Kin
from jaxserve.models.names import WeightNames, matrix
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM")

QWEN2 = Kin(
    qkv_bias=True, output_bias=False, window=True, needs_use_sliding_window=True, context=32768
)
QWEN3 = Kin(qk_norm=True, window=True, needs_use_sliding_window=True, context=32768)
OLMOE = Kin(qk_norm=True, eps=1e-5, context=4096)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    name = config["architectures"][0]
    if name == "OlmoeForCausalLM":
        return _olmoe(config)
    if name == "Qwen2MoeForCausalLM":
        qkv_bias = flag(config, "qkv_bias", True)
        spec = replace(QWEN2, qkv_bias=qkv_bias).decoder(config)
        act = activation(config, "hidden_act", default="silu")
        shared = positive(config, "shared_expert_intermediate_size", 5632)
        moe = replace(
            _experts(config, "moe_intermediate_size"),
            shared=FFNSpec(intermediate_size=shared, activation=act),
            shared_gate=True,
        )
    else:  # whose layers all slide, if any does
        spec = QWEN3.decoder({**config, "max_window_layers": 0})
        moe = _experts(config, "moe_intermediate_size")
    dense = set(config.get("mlp_only_layers") or ())
    step = positive(config, "decoder_sparse_step", 1)
    return with_experts(spec, moe, lambda i: i not in dense and (i + 1) % step == 0)


def _experts(config: Config, size: str) -> MoESpec:
    # transformers saves Qwen3-MoE's under the name that other families have.
    count = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    return MoESpec(
        num_experts=positive(config, count),
        top_k=positive(config, "num_experts_per_tok"),
        intermediate_size=positive(config, size),
        activation=activation(config, "hidden_act", default="silu"),
        router=RouterSpec(normalize=flag(config, "norm_topk_prob")),
    )


def _olmoe(config: Config) -> DecoderSpec:
    clip = config.get("clip_qkv")
    spec = OLMOE.decoder(config)
    layers = tuple(
        replace(
            layer,
            attention=replace(
                layer.attention,
                qk_norm_over="all",
                clip=None if clip is None else number(config, "clip_qkv"),
            ),
        )
        for layer in spec.layers
    )
    return with_experts(replace(spec, layers=layers), _experts(config, "intermediate_size"))


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where such a checkpoint keeps its weights."""
    return WeightNames(
        top=NAMES.top,
        layer={
            **NAMES.layer,
            "ffn.router.weight": matrix("mlp.gate.weight"),
            "ffn.shared_gate.weight": matrix("mlp.shared_expert_gate.weight"),
            **expert_names("mlp"),
            **shared_names("mlp.shared_expert"),
        },
    )

"""Granite's mixtures of experts as data, with and without a shared block."""

from dataclasses import replace

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.moe import MoESpec, RouterSpec
from jaxserve.model_index import Part
from jaxserve.models.config_fields import Config, activation, number, positive
from jaxserve.models.experts import with_experts
from jaxserve.models.kin import NAMES, Kin
from jaxserve.models.names import Stored, WeightNames, matrix
from jaxserve.models.spec import BlockSpec, DecoderSpec

ARCHITECTURES = ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    spec = Kin().decoder(config)
    scale = number(config, "attention_multiplier", 1.0)
    layers = tuple(
        replace(layer, attention=replace(layer.attention, scale=scale)) for layer in spec.layers
    )
    act = activation(config, "hidden_act", default="silu")
    shared = None
    if config["architectures"][0] == "GraniteMoeSharedForCausalLM" and config.get(
        "shared_intermediate_size"
    ):
        size = positive(config, "shared_intermediate_size")
        shared = FFNSpec(intermediate_size=size, activation=act)
    moe = MoESpec(
        num_experts=positive(config, "num_local_experts"),
        top_k=positive(config, "num_experts_per_tok"),
        intermediate_size=positive(config, "intermediate_size"),
        activation=act,
        router=RouterSpec(order="topk_then_softmax"),
        shared=shared,
    )
    spec = replace(
        spec,
        layers=layers,
        block=BlockSpec(residual_scale=number(config, "residual_multiplier", 1.0)),
        embedding_scale=number(config, "embedding_multiplier", 1.0),
        logit_scale=1 / number(config, "logits_scaling", 1.0),
    )
    return with_experts(spec, moe)


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where such a checkpoint keeps its weights: gates and ups share a tensor."""
    moe = spec.layers[0].ffn
    layer: dict[str, Stored] = {**NAMES.layer}
    if isinstance(moe, MoESpec):
        place = "block_sparse_moe"
        layer["ffn.router.weight"] = matrix(f"{place}.router.layer.weight")
        layer |= _fused("ffn.experts", place, moe.intermediate_size)
        if moe.shared is not None:
            layer |= _fused("ffn.shared", "shared_mlp", moe.shared.intermediate_size)
    return WeightNames(top=NAMES.top, layer=layer)


def _fused(ours: str, theirs: str, size: int) -> dict[str, Stored]:
    name = f"{theirs}.input_linear.weight"
    return {
        f"{ours}.gate_proj.weight": matrix(name, Part(start=0, stop=size, group_size=2 * size)),
        f"{ours}.up_proj.weight": matrix(
            name, Part(start=size, stop=2 * size, group_size=2 * size)
        ),
        f"{ours}.down_proj.weight": matrix(f"{theirs}.output_linear.weight"),
    }

"""GLM-4.5 and dots.llm1 as data: DeepSeek-V3's experts, with attention like Llama's."""

from jaxserve.models.config_fields import Config, flag
from jaxserve.models.experts import (
    DEEPSEEK_EXPERTS,
    deepseek_experts,
    deepseek_v3_router,
    later_layers,
    with_experts,
)
from jaxserve.models.kin import NAMES, Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("Glm4MoeForCausalLM", "Dots1ForCausalLM")


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    dense = config.get("first_k_dense_replace")
    if config["architectures"][0] == "Glm4MoeForCausalLM":
        config = {"partial_rotary_factor": 0.5, **config}
        kind = Kin(output_bias=False, qk_norm=flag(config, "use_qk_norm"), eps=1e-5, context=131072)
        router = deepseek_v3_router(config, groups=1, top_groups=1, scale=1.0, normalize=True)
        first = 1 if dense is None else dense
    else:
        config = {"max_window_layers": 62, **config, "use_sliding_window": True}
        kind = Kin(qk_norm=True, window=True, needs_use_sliding_window=True)
        router = deepseek_v3_router(config, groups=1, top_groups=1, scale=1.0, normalize=False)
        first = dense or 0
    spec = kind.decoder(config)
    return with_experts(spec, deepseek_experts(config, router), lambda i: i >= first)


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where such a checkpoint keeps its weights."""
    return WeightNames(
        top=NAMES.top,
        layer={**NAMES.layer, **DEEPSEEK_EXPERTS},
        ignored=later_layers(spec),
    )

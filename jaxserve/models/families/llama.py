"""Llama, Mistral, Qwen2 and Qwen3 as data."""

from jaxserve.models.config_fields import Config
from jaxserve.models.kin import NAMES, Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

KINS = {
    "LlamaForCausalLM": Kin(),
    "LLaMAForCausalLM": Kin(),
    "MistralForCausalLM": Kin(qkv_bias=False, output_bias=False, window=True, context=4096 * 32),
    "MinistralForCausalLM": Kin(qkv_bias=False, output_bias=False, window=True, context=4096 * 32),
    "Qwen2ForCausalLM": Kin(
        qkv_bias=True,
        output_bias=False,
        window=True,
        needs_use_sliding_window=True,
        context=32768,
    ),
    "Qwen3ForCausalLM": Kin(
        qk_norm=True, window=True, needs_use_sliding_window=True, context=32768
    ),
}
ARCHITECTURES = tuple(KINS)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Llama-like checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    return KINS[config["architectures"][0]].decoder(config)


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a Llama-like checkpoint keeps its weights."""
    return NAMES

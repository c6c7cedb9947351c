"""VaultGemma as data: Gemma 2 without the norms after attention and feed-forward."""

from jaxserve.models.building import LLAMA
from jaxserve.models.config_fields import Config
from jaxserve.models.families import gemma
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("VaultGemmaForCausalLM",)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a VaultGemma checkpoint; errors are Gemma's."""
    return gemma.spec_from_config(config)


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a VaultGemma checkpoint keeps its weights."""
    return gemma.names(LLAMA | {"ffn_norm": "pre_feedforward_layernorm"})

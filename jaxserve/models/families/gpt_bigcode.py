"""GPT-BigCode (StarCoder, SantaCoder) as data: GPT-2 whose heads may share keys and values."""

from jaxserve.models.building import heads_of, packed, qkv_by_head, qkv_in_a_row, table
from jaxserve.models.config_fields import Config, flag
from jaxserve.models.families.gpt2 import MASKS, MODULES, PREFIXES, TOP, gpt2_like
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("GPTBigCodeForCausalLM",)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a GPT-BigCode checkpoint; errors are GPT-2's."""
    shared = flag(config, "multi_query", True)
    return gpt2_like(
        config, num_kv_heads=1 if shared else None, default_activation="gelu_pytorch_tanh"
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a GPT-BigCode checkpoint keeps its weights, as [out, in]."""
    shared = heads_of(spec).num_kv_heads == 1
    parts = qkv_in_a_row(spec) if shared else qkv_by_head(spec)
    layer = table(MODULES) | packed("attn.c_attn", parts)
    return WeightNames(top=TOP, layer=layer, layers="h.{}.", prefixes=PREFIXES, ignored=MASKS)

"""CodeGen as data: GPT-J with a fused projection."""

from jaxserve.checkpoint import Part
from jaxserve.errors import CheckpointError
from jaxserve.models.building import heads_of, packed, table
from jaxserve.models.config_fields import Config
from jaxserve.models.families import gptj
from jaxserve.models.families.gpt2 import MASKS
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("CodeGenForCausalLM",)
SHARDS = 4  # the TPU cores that it was trained on: each has its queries, values and keys in a row


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a CodeGen checkpoint; errors are GPT-J's."""
    spec = gptj.spec_from_config(config)
    if heads_of(spec).num_heads % SHARDS:
        raise CheckpointError(f"CodeGen's number of heads is a multiple of {SHARDS}: check n_head")
    return spec


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a CodeGen checkpoint keeps its weights."""
    width = spec.hidden_size // SHARDS
    parts = {
        f"attention.{part}_proj": Part(
            start=i * width, stop=(i + 1) * width, group_size=3 * width, groups=SHARDS
        )
        for i, part in enumerate("qvk")
    }
    layer = table(gptj.MODULES) | packed("attn.qkv_proj", parts)
    masks = (*MASKS, r"(transformer\.)?h\.\d+\.attn\.causal_mask")
    return WeightNames(
        top=gptj.TOP, layer=layer, layers="h.{}.", prefixes=gptj.PREFIXES, ignored=masks
    )

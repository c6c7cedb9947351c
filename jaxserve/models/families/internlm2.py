"""InternLM 2 and 2.5 as data: Llama with a fused projection and names of its own."""

from jaxserve.models.building import packed, qkv_by_head, table, top_table
from jaxserve.models.config_fields import Config, flag, refuse
from jaxserve.models.kin import Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("InternLM2ForCausalLM",)
MODULES = {
    "input_norm": "attention_norm",
    "attention.o_proj": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn.gate_proj": "feed_forward.w1",
    "ffn.up_proj": "feed_forward.w3",
    "ffn.down_proj": "feed_forward.w2",
}
TOP = top_table("model.tok_embeddings", "model.norm", "output")


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of an InternLM 2 checkpoint; errors are Llama's."""
    bias = flag(config, "bias")
    refuse(config, attention_bias=False, mlp_bias=False)
    return Kin(qkv_bias=bias, output_bias=bias).decoder(config)


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where an InternLM 2 checkpoint keeps its weights."""
    return WeightNames(top=TOP, layer=table(MODULES) | packed("attention.wqkv", qkv_by_head(spec)))

"""Apertus as data: norms of queries and keys, and an activation that is learned."""

from jaxserve.layers.ffn import FFNSpec
from jaxserve.models.building import LLAMA, LLAMA_TOP, alike, decoder, table
from jaxserve.models.config_fields import Config, positive, refuse
from jaxserve.models.kin import Kin
from jaxserve.models.names import WeightNames, plain
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("ApertusForCausalLM",)
MODULES = LLAMA | {
    "input_norm": "attention_layernorm",
    "ffn_norm": "feedforward_layernorm",
}
KIN = Kin(eps=1e-5, context=65536, theta=12e6)
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12e6,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of an Apertus checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    refuse(config, hidden_act="xielu", post_norm=False, qk_norm=True, mlp_bias=False)
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config = {**config, "rope_parameters": ROPE}
    norm = KIN.norm_spec(config)
    ffn = FFNSpec(
        intermediate_size=positive(config, "intermediate_size"), activation="xielu", gated=False
    )
    return decoder(
        config,
        alike(config, KIN.attention(config, qk_norm=norm), ffn),
        norm,
        context=KIN.max_positions(config),
        tied=KIN.tied,
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where an Apertus checkpoint keeps its weights."""
    layer = table(MODULES)
    for name in ("alpha_p", "alpha_n"):
        layer[f"ffn.xielu.{name}"] = plain(f"mlp.act_fn.{name}")
    # Constants of the activation, which checkpoints repeat.
    return WeightNames(
        top=LLAMA_TOP, layer=layer, ignored=(r"model\.layers\.\d+\.mlp\.act_fn\.(beta|eps)",)
    )

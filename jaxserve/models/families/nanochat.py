"""nanochat as data: norms without weights, one of the embedding too."""

from dataclasses import replace

from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import LLAMA, LLAMA_TOP, alike, decoder, table
from jaxserve.models.config_fields import Config, number
from jaxserve.models.kin import Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("NanoChatForCausalLM",)
MODULES = LLAMA | {"ffn.up_proj": "mlp.fc1", "ffn.down_proj": "mlp.fc2"}
KIN = Kin(activation="relu2", gated=False, mlp_bias=False)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a nanochat checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    norm = NormSpec(eps=number(config, "rms_norm_eps", 1e-6), weight=False)
    attention = KIN.attention(config, qk_norm=norm, qk_norm_after_rope=True)
    if attention.rope is not None:
        attention = replace(attention, rope=replace(attention.rope, backwards=True))
    cap = config.get("final_logit_softcapping", 15.0)
    return decoder(
        config,
        alike(config, attention, KIN.ffn(config)),
        norm,
        context=KIN.max_positions(config),
        tied=KIN.tied,
        embedding_norm=True,
        logit_soft_cap=None if cap is None else number({"cap": cap}, "cap"),
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a nanochat checkpoint keeps its weights."""
    return WeightNames(top=LLAMA_TOP, layer=table(MODULES))

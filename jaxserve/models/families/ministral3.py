"""Ministral 3 as data: queries that grow with their position."""

from jaxserve.errors import CheckpointError
from jaxserve.layers.attention import Temperature
from jaxserve.models.building import LLAMA, LLAMA_TOP, alike, decoder, table
from jaxserve.models.config_fields import Config, number, positive, rope_parameters
from jaxserve.models.kin import Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("Ministral3ForCausalLM",)
KIN = Kin(eps=1e-5, context=262144, head_dim=128, qkv_bias=False, output_bias=False, mlp_bias=False)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Ministral 3 checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    given = rope_parameters(config)
    if not given.get("llama_4_scaling_beta"):
        raise CheckpointError(
            "config.json of a Ministral 3 needs rope_parameters with llama_4_scaling_beta"
        )
    window = config.get("sliding_window")
    attention = KIN.attention(
        config,
        window=None if window is None else positive(config, "sliding_window"),
        temperature=Temperature(
            floor_scale=number(given, "original_max_position_embeddings"),
            scale=number(given, "llama_4_scaling_beta"),
            first=0,
        ),
    )
    return decoder(
        config,
        alike(config, attention, KIN.ffn(config)),
        KIN.norm_spec(config),
        context=KIN.max_positions(config),
        tied=KIN.tied,
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a Ministral 3 checkpoint keeps its weights."""
    return WeightNames(top=LLAMA_TOP, layer=table(LLAMA))

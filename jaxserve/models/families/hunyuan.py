"""Hunyuan (dense) as data: queries and keys are normalised after their rotation."""

from jaxserve.models.building import LLAMA, LLAMA_TOP, alike, decoder, table
from jaxserve.models.config_fields import Config, heads, refuse, rope_parameters
from jaxserve.models.kin import Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("HunYuanDenseV1ForCausalLM",)
MODULES = LLAMA | {
    "attention.q_norm": "self_attn.query_layernorm",
    "attention.k_norm": "self_attn.key_layernorm",
}
KIN = Kin(eps=1e-5, mlp_bias=False)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Hunyuan checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    refuse(config, use_qk_norm=True, use_cla=False)
    norm = KIN.norm_spec(config)
    attention = KIN.attention(_with_alpha(config), qk_norm=norm, qk_norm_after_rope=True)
    return decoder(
        config,
        alike(config, attention, KIN.ffn(config)),
        norm,
        context=KIN.max_positions(config),
        tied=KIN.tied,
    )


def _with_alpha(config: Config) -> Config:
    """The config with rotary scaling by `alpha` as what it is: a larger theta."""
    given = dict(rope_parameters(config))
    alpha = given.pop("alpha", None)
    if not alpha or given.get("rope_type", given.get("type")) != "dynamic":
        return config
    head_dim = heads(config)[2]
    theta = float(given.get("rope_theta") or KIN.theta) * alpha ** (head_dim / (head_dim - 2))
    given = {"rope_type": "default", "rope_theta": theta}
    return {**config, "rope_scaling": None, "rope_parameters": given}


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a Hunyuan checkpoint keeps its weights."""
    return WeightNames(top=LLAMA_TOP, layer=table(MODULES))

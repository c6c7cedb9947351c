"""StarCoder 2 as data."""

from jaxserve.models.building import LLAMA, LLAMA_TOP, alike, decoder, table
from jaxserve.models.config_fields import Config, positive
from jaxserve.models.kin import Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("Starcoder2ForCausalLM",)
MODULES = LLAMA | {"ffn.up_proj": "mlp.c_fc", "ffn.down_proj": "mlp.c_proj"}
KIN = Kin(
    norm="layer",
    norm_bias=True,
    eps_name="norm_epsilon",
    eps=1e-5,
    activation="gelu_pytorch_tanh",
    gated=False,
    context=4096,
    tied=True,
    qkv_bias=("use_bias", True),
    output_bias=("use_bias", True),
    mlp_bias=("use_bias", True),
)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a StarCoder 2 checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    window = config.get("sliding_window")
    attention = KIN.attention(
        config, window=None if window is None else positive(config, "sliding_window")
    )
    return decoder(
        config,
        alike(config, attention, KIN.ffn(config)),
        KIN.norm_spec(config),
        context=KIN.max_positions(config),
        tied=KIN.tied,
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a StarCoder 2 checkpoint keeps its weights."""
    return WeightNames(top=LLAMA_TOP, layer=table(MODULES))

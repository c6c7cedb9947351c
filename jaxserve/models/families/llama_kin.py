"""Families whose checkpoints have Llama's names, and nearly its layers, as data."""

from dataclasses import replace

from jaxserve.errors import CheckpointError
from jaxserve.layers.attention import HeadAttentionSpec
from jaxserve.models.building import every, windows
from jaxserve.models.config_fields import Config, flag, positive, refuse
from jaxserve.models.kin import NAMES, Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

KINS = {
    "AquilaForCausalLM": Kin(),
    "AquilaModel": Kin(),
    "ArceeForCausalLM": Kin(activation="relu2", gated=False, eps=1e-5, context=4096),
    "CwmForCausalLM": Kin(
        eps=1e-5,
        context=131072,
        theta=1e6,
        head_dim=128,
        qkv_bias=False,
        output_bias=False,
    ),
    "Ernie4_5ForCausalLM": Kin(
        eps=1e-5,
        context=131072,
        theta=500000.0,
        head_dim=128,
        interleaved=True,
        tied=True,
        qkv_bias=("use_bias", False),
        output_bias=("use_bias", False),
        mlp_bias=("use_bias", False),
    ),
    "HeliumForCausalLM": Kin(
        eps=1e-8,
        context=4096,
        theta=100000.0,
        head_dim=128,
        interleaved=True,
        output_bias=False,
    ),
    "InternLMForCausalLM": Kin(qkv_bias=("bias", True), output_bias=("bias", True), mlp_bias=False),
    "InternLM3ForCausalLM": Kin(
        eps=1e-5,
        context=32768,
        qkv_bias=("qkv_bias", False),
        output_bias=("bias", False),
        mlp_bias=("bias", False),
    ),
    "Jais2ForCausalLM": Kin(
        norm="layer",
        norm_bias=True,
        eps_name="layer_norm_eps",
        eps=1e-5,
        activation="relu2",
        gated=False,
        context=8192,
        qkv_bias=("attention_bias", True),
        output_bias=("attention_bias", True),
        mlp_bias=("mlp_bias", True),
    ),
    "NemotronForCausalLM": Kin(
        norm="layer",
        norm_bias=True,
        norm_plus_one=True,
        eps_name="norm_eps",
        eps=1e-5,
        activation="relu2",
        gated=False,
        context=4096,
        partial=0.5,
    ),
    "SeedOssForCausalLM": Kin(
        context=524288,
        head_dim=128,
        qkv_bias=("attention_bias", True),
        output_bias=("attention_out_bias", False),
    ),
    "SmolLM3ForCausalLM": Kin(context=32768, theta=2e6, tied=True),
    "XverseForCausalLM": Kin(qkv_bias=False, output_bias=False, mlp_bias=False),
}
ARCHITECTURES = tuple(KINS)
CWM_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a checkpoint of these families.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    architecture = config["architectures"][0]
    kin = KINS[architecture]
    if architecture == "CwmForCausalLM" and not (
        config.get("rope_parameters") or config.get("rope_scaling")
    ):
        config = {**config, "rope_parameters": CWM_ROPE}
    if architecture == "CwmForCausalLM":
        attention = kin.attention(config)
        seen = windows(config, every(4, config, first=True))
        return kin.decoder(config, [replace(attention, window=window) for window in seen])
    if architecture == "SmolLM3ForCausalLM":
        return kin.decoder(config, _smollm3(config, kin.attention(config)))
    refuse(config, use_sliding_window=False)
    return kin.decoder(config)


def _smollm3(config: Config, attention: HeadAttentionSpec) -> list[HeadAttentionSpec]:
    """Some layers rotate no positions; with use_sliding_window, those may have a window."""
    num_layers = positive(config, "num_hidden_layers")
    interval = positive(config, "no_rope_layer_interval", 4)
    rotates = config.get("no_rope_layers")
    if rotates is None:
        rotates = [int((i + 1) % interval != 0) for i in range(num_layers)]
    if not isinstance(rotates, list) or len(rotates) < num_layers:
        raise CheckpointError(f"no_rope_layers needs a 1 or 0 for each of {num_layers} layers")
    seen: list[int | None] = [None] * num_layers
    if flag(config, "use_sliding_window") and config.get("sliding_window") is not None:
        kinds = ["full_attention" if on else "sliding_attention" for on in rotates[:num_layers]]
        seen = windows(config, kinds)
    return [
        replace(attention, window=window, rope=attention.rope if on else None)
        for window, on in zip(seen, rotates, strict=False)
    ]


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where these checkpoints keep their weights: as Llama does."""
    return NAMES

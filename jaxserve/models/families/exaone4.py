"""EXAONE 4 as data: norms after attention and feed-forward, windows in three of four layers."""

from dataclasses import replace

from jaxserve.models.building import LLAMA, LLAMA_TOP, POST_NORMS, decoder, table, windows
from jaxserve.models.config_fields import Config, positive
from jaxserve.models.kin import Kin
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import BlockSpec, DecoderSpec, LayerSpec

ARCHITECTURES = ("Exaone4ForCausalLM",)
KIN = Kin(eps=1e-5, qkv_bias=False, output_bias=False, mlp_bias=False)


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of an EXAONE 4 checkpoint.

    Where there are windows, layers that attend to all rotate no positions.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that is not computed.
    """
    norm = KIN.norm_spec(config)
    attention = KIN.attention(config, qk_norm=norm)
    ffn = KIN.ffn(config)
    seen = windows(config, _kinds(config))
    is_hybrid = config.get("sliding_window") is not None
    return decoder(
        config,
        tuple(
            LayerSpec(
                attention=replace(
                    attention,
                    window=window,
                    rope=None if is_hybrid and window is None else attention.rope,
                ),
                ffn=ffn,
            )
            for window in seen
        ),
        norm,
        context=KIN.max_positions(config),
        tied=KIN.tied,
        block=BlockSpec(attention_in=False, ffn_in=False, attention_out=True, ffn_out=True),
    )


def _kinds(config: Config) -> list[str]:
    """By sliding_window_pattern: a number of layers, or letters ("LLLG"; the last sees all)."""
    num_layers = positive(config, "num_hidden_layers")
    pattern = config.get("sliding_window_pattern", 4)
    if config.get("sliding_window") is None or not pattern:
        return ["full_attention"] * num_layers
    if isinstance(pattern, str):
        letters = [pattern[i % len(pattern)] for i in range(num_layers - 1)]
        return [
            *("sliding_attention" if letter == "L" else "full_attention" for letter in letters),
            "full_attention",
        ]
    period = positive(config, "sliding_window_pattern")
    return [
        "sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)
    ]


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where an EXAONE 4 checkpoint keeps its weights."""
    return WeightNames(top=LLAMA_TOP, layer=table(LLAMA | POST_NORMS))

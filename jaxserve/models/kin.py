"""Llama's many kin: in what each differs, and the decoder that this makes."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxserve.errors import UnsupportedError
from jaxserve.layers.attention import HeadAttentionSpec
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import LLAMA, LLAMA_TOP, biases, decoder, head_attention, table
from jaxserve.models.config_fields import (
    Config,
    activation,
    flag,
    heads,
    layer_kinds,
    number,
    positive,
    rope_from_config,
)
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec, LayerSpec

NAMES = WeightNames(top=LLAMA_TOP, layer=table(LLAMA))  # where Llama keeps its weights

type Switch = tuple[str, bool] | bool  # a field of config.json and its default, or fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Kin:
    """In what a family differs from Llama where its config.json says nothing."""

    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_plus_one: bool = False
    eps_name: str = "rms_norm_eps"
    eps: float = 1e-6
    activation: str = "silu"
    gated: bool = True
    head_dim: int | None = None  # where config.json has none; None: hidden size / heads
    context: int = 2048
    theta: float = 10000.0
    partial: float = 1.0
    interleaved: bool = False
    tied: bool = False
    qkv_bias: Switch = ("attention_bias", False)
    output_bias: Switch = ("attention_bias", False)
    mlp_bias: Switch = ("mlp_bias", False)
    qk_norm: bool = False
    window: bool = False  # sliding_window counts
    needs_use_sliding_window: bool = False  # and only if use_sliding_window says so

    def decoder(
        self, config: Config, attentions: list[HeadAttentionSpec] | None = None
    ) -> DecoderSpec:
        """The whole; `attentions` is each layer's, where it is not the same but for windows.

        Raises:
            CheckpointError: A needed field is missing or has the wrong type.
            UnsupportedError: The config asks for something that is not computed.
        """
        if attentions is None:
            attention = self.attention(config)
            attentions = [replace(attention, window=seen) for seen in self._windows(config)]
        ffn = self.ffn(config)
        return decoder(
            config,
            tuple(LayerSpec(attention=each, ffn=ffn) for each in attentions),
            self.norm_spec(config),
            context=self.max_positions(config),
            tied=self.tied,
        )

    def norm_spec(self, config: Config) -> NormSpec:
        """The norm of hidden states."""
        return NormSpec(
            kind=self.norm,
            eps=number(config, self.eps_name, self.eps),
            bias=self.norm_bias,
            plus_one=self.norm_plus_one,
        )

    def max_positions(self, config: Config) -> int:
        """Tokens of a sequence."""
        return positive(config, "max_position_embeddings", self.context)

    def attention(self, config: Config, **options: Any) -> HeadAttentionSpec:
        """Attention with rotary positions and no window, unless `options` say otherwise."""
        if config.get("head_dim") is None and self.head_dim is not None:
            config = {**config, "head_dim": self.head_dim}
        rope = rope_from_config(
            config,
            head_dim=heads(config)[2],
            context=self.max_positions(config),
            theta=self.theta,
            partial=self.partial,
            interleaved=self.interleaved,
        )
        switches = biases(_on(config, self.qkv_bias), _on(config, self.output_bias))
        norm = self.norm_spec(config) if self.qk_norm else None
        return head_attention(config, **({"rope": rope, "qk_norm": norm} | switches | options))

    def ffn(self, config: Config) -> FFNSpec:
        """The feed-forward block."""
        return FFNSpec(
            intermediate_size=positive(config, "intermediate_size"),
            activation=activation(config, "hidden_act", default=self.activation),
            gated=self.gated,
            bias=_on(config, self.mlp_bias),
        )

    def _windows(self, config: Config) -> list[int | None]:
        """The sliding window of each layer."""
        on = self.window and config.get("sliding_window") is not None
        if self.needs_use_sliding_window:
            on = on and flag(config, "use_sliding_window")
        window = positive(config, "sliding_window") if on else None
        # Qwen2 and 3 slide from layer max_window_layers on.
        first = config.get("max_window_layers", 28) if self.needs_use_sliding_window else 0
        default = [
            "sliding_attention" if on and i >= first else "full_attention"
            for i in range(positive(config, "num_hidden_layers"))
        ]
        kinds = layer_kinds(config, default)
        if "chunked_attention" in kinds or ("sliding_attention" in kinds and not on):
            raise UnsupportedError(
                f"layer_types has {sorted(set(kinds))}, but sliding_window="
                f"{config.get('sliding_window')!r}; only sliding and full attention are supported"
            )
        return [window if kind == "sliding_attention" else None for kind in kinds]


def _on(config: Config, switch: Switch) -> bool:
    return switch if isinstance(switch, bool) else flag(config, *switch)

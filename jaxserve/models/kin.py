"""What Llama's many kin share: a table of differences, and the decoder that it makes."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.layers.attention import HeadAttentionSpec
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.building import biases, head_attention
from jaxserve.models.config_fields import (
    Config,
    activation,
    flag,
    heads,
    number,
    positive,
    rope_from_config,
)

type Switch = tuple[str, bool] | bool  # a field of config.json and its default, or fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Kin:
    """In what a family differs from Llama."""

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
        return head_attention(config, **({"rope": rope} | switches | options))

    def ffn(self, config: Config) -> FFNSpec:
        """The feed-forward block."""
        return FFNSpec(
            intermediate_size=positive(config, "intermediate_size"),
            activation=activation(config, "hidden_act", default=self.activation),
            gated=self.gated,
            bias=_on(config, self.mlp_bias),
        )


def _on(config: Config, switch: Switch) -> bool:
    return switch if isinstance(switch, bool) else flag(config, *switch)
